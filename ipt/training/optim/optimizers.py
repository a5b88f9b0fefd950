"""Optimizers that update one parameter at a time, on the slice of it that this device holds.

Beside what torch has, they can do three things. They take a step or leave everything as it is by
`found_inf`, a tensor on the device, as torch's fused AdamW does, so that nobody waits for the
device. Weights in bf16 are updated in fp32 and rounded stochastically: a change smaller than half a
unit in the last place is then right on average, where rounding to the nearest would lose it each
time. And their state is cut like the weights (DTensor), so that checkpoints can be read by another
number of devices.

A slice is updated a piece at a time: what is in fp32 for the update alone, the noise, and the
copies to go back to, are of a piece.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ipt.training.optim.dtensor import like, local, rows, slice_count, slice_number

BLOCK, MIN_8BIT = (
    256,
    4096,
)  # bitsandbytes: numbers that share a scale; smaller tensors keep their state in fp32
PIECE = (
    1 << 24
)  # numbers that are updated at a time: whole blocks, and enough of them to keep a GPU busy
NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Keller Jordan's coefficients: five rounds bring singular values to between 0.7 and 1.2

Group = dict[str, Any]
State = dict[str, Tensor]


class ShardedOptimizer(Optimizer):
    """Base: `_start` makes a parameter's state, `_update` changes a piece of the weight, in fp32,
    and of the state, in place.
    """

    found_inf: Tensor | None = None  # 0-dimensional; not 0: leave weights and state as they are

    def __init__(self, groups: Iterable[Group], defaults: Group, seed: int) -> None:
        super().__init__(groups, defaults)
        self.seed = seed
        self._steps = StepCount()
        self._noise: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        **self._start(parameter, group),
                    }
        if not self.state:  # no gradients
            return loss
        step = self._steps.read(self.state) + 1
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update_or_leave(parameter, group, step, number)
        self._steps.write(self.state)
        return loss

    @abstractmethod
    def _start(self, parameter: Tensor, group: Group) -> State:
        """The state of a parameter before its first update."""

    @abstractmethod
    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        """Update a piece of `weight` and `state`, all flat, in place, but for `state["step"]`: the
        steps before this one.
        """

    def _update_or_leave(self, parameter: Tensor, group: Group, step: int, number: int) -> None:
        grad = self._gradient(parameter, group).reshape(-1)
        weight, state = (
            local(parameter),
            {name: local(value) for name, value in self.state[parameter].items()},
        )
        noise = self._generator(parameter, step, number)
        for start in range(0, weight.numel(), PIECE):
            stop = min(start + PIECE, weight.numel())
            piece = {name: _cut(name, value, start, stop) for name, value in state.items()}
            self._update_piece(
                _cut("weight", weight, start, stop),
                grad[start:stop].float(),
                piece,
                group,
                step,
                noise,
            )
        state["step"] += 1 if self.found_inf is None else self.found_inf == 0

    def _update_piece(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        group: Group,
        step: int,
        noise: torch.Generator,
    ) -> None:
        updated = weight.float() if weight.dtype != torch.float32 else weight
        changed = [weight, *(value for name, value in state.items() if name != "step")]
        kept = [tensor.clone() for tensor in changed] if self.found_inf is not None else []
        self._update(updated, grad, state, group, step)
        if updated is not weight:
            weight.copy_(round_stochastically(updated, noise))
        for tensor, before in zip(
            changed, kept, strict=False
        ):  # none are kept where nothing is to be left
            self._leave(tensor, before)

    def _leave(self, tensor: Tensor, before: Tensor) -> None:
        """Make `tensor` what it was, if this step is not to be taken."""
        assert self.found_inf is not None
        torch.where(self.found_inf.bool(), before, tensor, out=tensor)

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """What `_update` gets of the gradient, before that is cut into pieces."""
        assert parameter.grad is not None
        return local(parameter.grad)

    def _generator(self, parameter: Tensor, step: int, number: int) -> torch.Generator:
        """Noise by seed, step, parameter and slice, drawn piece by piece: a resumed run draws it
        again, as do copies of a slice.
        """
        generator = self._noise.setdefault(parameter.device, torch.Generator(parameter.device))
        return generator.manual_seed(
            hash((self.seed, step, number, slice_number(parameter))) & (2**63 - 1)
        )


class AdamW(ShardedOptimizer):
    """AdamW with moments in fp32, for weights in bf16; for weights in fp32 torch's fused one does
    the same.
    """

    def _start(self, parameter: Tensor, group: Group) -> State:
        return {"exp_avg": zero_moment(parameter), "exp_avg_sq": zero_moment(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        _adamw(weight, grad, state, group)


class AdamW8bit(ShardedOptimizer):
    """bitsandbytes' AdamW with moments in 8 bits, a scale for each block of 256; `paged`: those may
    move to host memory.
    """

    def __init__(
        self, groups: Iterable[Group], defaults: Group, seed: int, paged: bool = False
    ) -> None:
        super().__init__(groups, defaults, seed)
        self.paged = paged
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.paged or closure is None:
            return super().step(closure)
        with (
            torch.enable_grad()
        ):  # paged memory cannot be chosen between on the device: the host must know
            loss = closure()
        if self.found_inf is None or not self.found_inf.item():
            self.found_inf = None
            super().step()
        return loss

    def _start(self, parameter: Tensor, group: Group) -> State:
        if parameter.numel() < MIN_8BIT:
            return {"exp_avg": zero_moment(parameter), "exp_avg_sq": zero_moment(parameter)}
        codes = self._paged_codes if self.paged else zero_codes
        return {
            "state1": codes(parameter),
            "absmax1": zero_scales(parameter),
            "state2": codes(parameter),
            "absmax2": zero_scales(parameter),
        }

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        if "exp_avg" in state:
            _adamw(weight, grad, state, group)
        else:
            _update_8bit("adam", weight, grad, state, group, step, self._maps_on(weight.device))

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The numbers that 256 codes stand for: of either sign, and of squares."""
        from bitsandbytes.functional import create_dynamic_map

        if device not in self._maps:
            self._maps[device] = (
                create_dynamic_map(signed=True).to(device),
                create_dynamic_map(signed=False).to(device),
            )
        return self._maps[device]

    def _paged_codes(self, parameter: Tensor) -> Tensor:
        """Codes in memory that the driver moves between host and device. Not cut like the weights:
        read back by as many devices only.
        """
        from bitsandbytes import functional

        codes = functional.get_paged(
            *local(parameter).shape, dtype=torch.uint8, device=parameter.device
        )
        functional.fill(codes, 0)
        return codes


class Lion(ShardedOptimizer):
    """Lion (arXiv 2302.06675): the sign of a mix of momentum and gradient, as long as the rate
    says.
    """

    def _start(self, parameter: Tensor, group: Group) -> State:
        return {"exp_avg": zero_moment(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        _lion(weight, grad, state, group)


class Lion8bit(AdamW8bit):
    """bitsandbytes' Lion with its momentum in 8 bits."""

    def _start(self, parameter: Tensor, group: Group) -> State:
        if parameter.numel() < MIN_8BIT:
            return {"exp_avg": zero_moment(parameter)}
        return {"state1": zero_codes(parameter), "absmax1": zero_scales(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        if "exp_avg" in state:
            _lion(weight, grad, state, group)
        else:
            _update_8bit("lion", weight, grad, state, group, step, self._maps_on(weight.device))


class Muon(ShardedOptimizer):
    """Muon for groups with `orthogonal`, AdamW for the others; rates are as AdamW's (arXiv
    2502.16982 matches the size of its updates).

    A sharded matrix is orthogonalised as a whole: its update is gathered once, in bf16, and each
    device keeps its slice.
    """

    def _start(self, parameter: Tensor, group: Group) -> State:
        if group["orthogonal"]:
            return {"momentum_buffer": zero_moment(parameter)}
        return {"exp_avg": zero_moment(parameter), "exp_avg_sq": zero_moment(parameter)}

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """For Muon the slice of the orthogonal update, as long as AdamW's are; it takes all slices,
        so momentum is advanced here.
        """
        grad = super()._gradient(parameter, group)
        if not group["orthogonal"]:
            return grad
        update = like(
            parameter,
            self._advance(local(self.state[parameter]["momentum_buffer"]), grad.float(), group),
            parameter.shape,
        )
        whole = orthogonalised(update.full_tensor() if isinstance(update, DTensor) else update)
        return whole[slice(*rows(parameter))].float().mul_(0.2 * max(parameter.shape) ** 0.5)

    def _advance(self, momentum: Tensor, grad: Tensor, group: Group) -> Tensor:
        """Move the momentum on, if this step is to be taken; gives the mix of it and the gradient
        (Nesterov), in bf16.
        """
        before = momentum.clone() if self.found_inf is not None else None
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]).bfloat16()
        if before is not None:
            self._leave(momentum, before)
        return update

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        if not group["orthogonal"]:
            _adamw(weight, grad, state, group)
            return
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(grad, alpha=-group["lr"])


class StepCount:
    """The number of steps taken, on the host, where some kernels want it, without waiting for the
    step that is on its way.

    Whether a step was taken is known on the device alone. Its count is copied here behind each
    step, and read at the next one.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._version = 0
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, states: dict[Tensor, State]) -> int:
        count = _any_count(states)
        if (
            self._copy is None or count is not self._count or count._version != self._version
        ):  # a checkpoint has been read
            self.write(states)
        if self._copied is not None:
            self._copied.synchronize()
        assert self._copy is not None
        return int(self._copy)

    def write(self, states: dict[Tensor, State]) -> None:
        self._count = count = _any_count(states)
        self._version = count._version
        self._copy = count.to("cpu", non_blocking=True, copy=True)
        if count.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()


def _any_count(states: dict[Tensor, State]) -> Tensor:
    """All parameters have taken the same steps."""
    return next(state["step"] for state in states.values())


# What optimizers do to a slice
# ----------------------------------------------------------------------------------------------


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes it right on average; numbers that
    bf16 has stay as they are.
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix with all singular values about 1, by Newton and Schulz's iteration, in the
    matrix's type.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(rounds):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _adamw(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [weight],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"].clone()],  # it counts this step there
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _lion(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
    state["exp_avg"].lerp_(grad, 1 - beta2)


def _update_8bit(
    name: str,
    weight: Tensor,
    grad: Tensor,
    state: State,
    group: Group,
    step: int,
    maps: tuple[Tensor, Tensor],
) -> None:
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    beta1, beta2 = group["betas"]
    second = "state2" in state
    optimizer_update_8bit_blockwise(
        name,
        grad,
        weight,
        state["state1"],
        state["state2"] if second else None,
        beta1,
        beta2,
        0.0,
        0.0,
        group["eps"],
        step,
        group["lr"],
        maps[0],
        maps[1] if second else None,
        state["absmax1"],
        state["absmax2"] if second else None,
        group["weight_decay"],
    )


# State of a slice
# ----------------------------------------------------------------------------------------------


def _cut(name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """A flat view of what a slice's tensor of this name has for the numbers from `start` to `stop`;
    of `step` all there is.
    """
    if name == "step":
        return tensor
    size = BLOCK if name in ("absmax1", "absmax2") else 1
    piece = tensor.view(-1)[start // size : -(-stop // size)]
    if getattr(
        tensor, "is_paged", False
    ):  # bitsandbytes' mark of memory that is on no one device; a view has lost it
        vars(piece).update(vars(tensor))
    return piece


def zero_moment(parameter: Tensor) -> Tensor:
    return like(parameter, torch.zeros_like(local(parameter), dtype=torch.float32), parameter.shape)


def zero_codes(parameter: Tensor) -> Tensor:
    return like(parameter, torch.zeros_like(local(parameter), dtype=torch.uint8), parameter.shape)


def zero_scales(parameter: Tensor) -> Tensor:
    """A scale for each block of the slice, cut like the parameter.

    Where rows are whole blocks, [rows, blocks of a row]: then another number of devices can read
    them. Else as many for each device as the largest slice has.
    """
    count, part = parameter.shape[0], local(parameter)
    columns = parameter.numel() // max(1, count)
    if columns % BLOCK == 0:
        return like(
            parameter,
            part.new_zeros(part.shape[0], columns // BLOCK, dtype=torch.float32),
            (count, columns // BLOCK),
        )
    slices = slice_count(parameter)
    blocks = -(-(-(-count // slices) * columns) // BLOCK)
    return like(parameter, part.new_zeros(blocks, dtype=torch.float32), (slices * blocks,))
