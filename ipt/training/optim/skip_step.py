"""Steps that would harm the model are skipped: those whose gradients are not finite, and spikes of
the loss or the gradient norm.

Everything here happens on the device, in tensors that are equal on all of them, so nobody waits and
all skip the same steps.
"""

import torch
from torch import Tensor, nn

WINDOW = 128  # accepted steps that a step is compared with
LEAST = 32  # before there are so many, only what is not finite is skipped
# spikes in a row after which it is the level that has changed: the step is taken and the window
# begins anew
PATIENCE = 8
LEAST_DEVIATION = (
    0.02  # as a share of the median: in a very smooth stretch every ripple would be a spike
)
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class SkipStep(nn.Module):
    """Whether a step is to be skipped, from the loss and the gradient norms of the accepted steps
    before it.

    A step is a spike if either lies more than `limit` robust standard deviations (by the median
    absolute deviation) above its median. Skipped steps do not enter the window, so a spike does not
    widen what comes after it. Statistics are buffers: checkpoints hold them.
    """

    window: Tensor
    accepted: Tensor
    in_a_row: Tensor
    skipped: Tensor

    def __init__(self, limit: float | None) -> None:
        """`limit` None: only skip what is not finite."""
        super().__init__()
        self.limit = limit
        self.register_buffer("window", torch.zeros(2, WINDOW))  # losses and gradient norms
        self.register_buffer(
            "accepted", torch.zeros((), dtype=torch.int64)
        )  # since the window began
        self.register_buffer(
            "in_a_row", torch.zeros((), dtype=torch.int64)
        )  # steps skipped until now without one accepted
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))  # in all

    @torch.no_grad()
    def forward(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """0-dimensional, 1.0 to skip and 0.0 to take the step; loss and norm are 0-dimensional and
        of all devices together.
        """
        values = torch.stack([loss.float(), grad_norm.float()])
        finite = values.isfinite().all()
        spike = self._is_spike(values) if self.limit is not None else torch.zeros_like(finite)
        new_level = finite & spike & (self.in_a_row >= PATIENCE)
        skip = ~finite | (spike & ~new_level)
        self.accepted.mul_(~new_level)
        place = torch.arange(WINDOW, device=values.device) == self.accepted % WINDOW
        self.window.copy_(torch.where(place & ~skip, values[:, None], self.window))
        self.accepted.add_(~skip)
        self.in_a_row.add_(1).mul_(skip)
        self.skipped.add_(skip)
        return skip.float()

    def _is_spike(self, values: Tensor) -> Tensor:
        assert self.limit is not None
        empty = torch.arange(WINDOW, device=values.device) >= self.accepted
        known = self.window.masked_fill(empty, torch.nan)
        median = known.nanmedian(1).values
        deviation = NORMAL * (known - median[:, None]).abs().nanmedian(1).values
        deviation = deviation.maximum(LEAST_DEVIATION * median.abs())
        return (values > median + self.limit * deviation).any() & (self.accepted >= LEAST)
