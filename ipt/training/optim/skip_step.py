"""Skips steps that would harm the model: steps with non-finite gradients, and spikes of the loss or
the gradient norm.

Everything is computed on the device from values that are equal on all ranks, so the host never
waits and all ranks skip the same steps.
"""

import torch
from torch import Tensor, nn

WINDOW = 128  # accepted steps that a step is compared with
MIN_STEPS = 32  # accepted steps before spikes are detected
# Consecutive spikes after which the level has changed: the step is taken, and the window restarts.
PATIENCE = 8
# Relative to the median; otherwise every ripple of a very smooth curve would be a spike.
MIN_DEVIATION = 0.02
NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class SkipStep(nn.Module):
    """Decides whether to skip a step, from the losses and gradient norms of accepted steps.

    A step is a spike if its loss or its gradient norm is more than `limit` robust standard
    deviations (from the median absolute deviation) above the median. Skipped steps do not enter the
    window, so a spike does not widen the limit for later steps. The statistics are buffers, so
    checkpoints contain them.
    """

    window: Tensor
    accepted: Tensor
    in_a_row: Tensor
    skipped: Tensor

    def __init__(self, limit: float | None) -> None:
        """`limit` None: skip only non-finite steps."""
        super().__init__()
        self.limit = limit
        self.register_buffer("window", torch.zeros(2, WINDOW))  # losses and gradient norms
        # Steps accepted since the window started, skipped since the last accepted one, skipped.
        for name in ("accepted", "in_a_row", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Returns 1.0 to skip the step, else 0.0. All tensors are 0-dimensional; loss and norm are
        reduced over all ranks.
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
        deviation = deviation.maximum(MIN_DEVIATION * median.abs())
        return (values > median + self.limit * deviation).any() & (self.accepted >= MIN_STEPS)
