"""Optimizers that update one parameter at a time, on the slice of it that this device holds.

They differ from torch's optimizers in three ways:

- `found_inf`, a tensor on the device, decides whether the step is taken or skipped, as in torch's
  fused AdamW, so the host never waits for the device.
- Weights in bf16 are updated in fp32 and rounded stochastically. A change of less than half a unit
  in the last place is then correct on average, while rounding to the nearest would lose it.
- Their state is sharded like the weights (DTensor), so another number of devices can read
  checkpoints.

A slice is updated in pieces, which bounds the memory for fp32 copies, noise and backups.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ipt.training.optim.arithmetic import (
    Group,
    State,
    adamw_step,
    lion_step,
    orthogonalised,
    round_stochastically,
    step_8bit,
)
from ipt.training.optim.dtensor import like, local, rows, slice_count, slice_number

BLOCK = 256  # bitsandbytes: numbers that share a scale
MIN_8BIT = 4096  # tensors with fewer numbers keep their state in fp32
PIECE = 1 << 24  # numbers that are updated at a time: whole blocks, enough to keep a GPU busy


class ShardedOptimizer(Optimizer):
    """Base class. `_start` creates the state of a parameter; `_update` changes a piece of the
    weight (in fp32) and of the state in place.
    """

    found_inf: Tensor | None = None  # 0-dimensional; not 0: skip the step

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
                    self._update_or_skip(parameter, group, step, number)
        self._steps.write(self.state)
        return loss

    @abstractmethod
    def _start(self, parameter: Tensor, group: Group) -> State:
        """The state of a parameter before its first update."""

    @abstractmethod
    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        """Update a piece of `weight` and `state` in place, all flat. `state["step"]`, the number of
        earlier steps, is not changed.
        """

    def _update_or_skip(self, parameter: Tensor, group: Group, step: int, number: int) -> None:
        grad = self._gradient(parameter, group).reshape(-1)
        weight = local(parameter)
        state = {name: local(value) for name, value in self.state[parameter].items()}
        noise = self._generator(parameter, step, number)
        for start in range(0, weight.numel(), PIECE):
            stop = min(start + PIECE, weight.numel())
            piece = {name: _piece(name, value, start, stop) for name, value in state.items()}
            weight_piece = _piece("weight", weight, start, stop)
            grad_piece = grad[start:stop].float()
            self._update_piece(weight_piece, grad_piece, piece, group, step, noise)
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
        backups = [tensor.clone() for tensor in changed] if self.found_inf is not None else []
        self._update(updated, grad, state, group, step)
        if updated is not weight:
            weight.copy_(round_stochastically(updated, noise))
        for tensor, backup in zip(changed, backups, strict=False):  # no backups: never skipped
            self._restore_if_skipped(tensor, backup)

    def _restore_if_skipped(self, tensor: Tensor, backup: Tensor) -> None:
        assert self.found_inf is not None
        torch.where(self.found_inf.bool(), backup, tensor, out=tensor)

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """The gradient of this device's slice, which is then passed to `_update` in pieces."""
        assert parameter.grad is not None
        return local(parameter.grad)

    def _generator(self, parameter: Tensor, step: int, number: int) -> torch.Generator:
        """Noise of a seed, step, parameter and slice: a resumed run and replicas of the slice draw
        the same.
        """
        generator = self._noise.setdefault(parameter.device, torch.Generator(parameter.device))
        entropy = [self.seed, step, number, slice_number(parameter)]
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return generator.manual_seed(int(seed >> np.uint64(1)))  # torch takes 63 bits


class AdamW(ShardedOptimizer):
    """AdamW with fp32 moments for bf16 weights. For fp32 weights torch's fused AdamW is used."""

    def _start(self, parameter: Tensor, group: Group) -> State:
        return {"exp_avg": zero_moment(parameter), "exp_avg_sq": zero_moment(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        adamw_step(weight, grad, state, group)


class AdamW8bit(ShardedOptimizer):
    """bitsandbytes' AdamW with 8-bit moments and a scale for each block of 256 numbers. `paged`:
    moments may move to host memory.
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
        # Backups of paged memory are not possible, so the host decides whether to skip the step.
        with torch.enable_grad():
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
            adamw_step(weight, grad, state, group)
        else:
            step_8bit("adam", weight, grad, state, group, step, self._maps_on(weight.device))

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The numbers that the 256 codes represent: for signed values, and for squares."""
        from bitsandbytes.functional import create_dynamic_map

        if device not in self._maps:
            signed = create_dynamic_map(signed=True).to(device)
            self._maps[device] = (signed, create_dynamic_map(signed=False).to(device))
        return self._maps[device]

    def _paged_codes(self, parameter: Tensor) -> Tensor:
        """Codes in memory that the driver moves between host and device. They are not sharded like
        the weights, so only the same number of devices can read them from a checkpoint.
        """
        from bitsandbytes import functional

        codes = functional.get_paged(
            *local(parameter).shape, dtype=torch.uint8, device=parameter.device
        )
        functional.fill(codes, 0)
        return codes


class Lion(ShardedOptimizer):
    """Lion (arXiv 2302.06675): updates by the sign of an average of momentum and gradient."""

    def _start(self, parameter: Tensor, group: Group) -> State:
        return {"exp_avg": zero_moment(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        lion_step(weight, grad, state, group)


class Lion8bit(AdamW8bit):
    """bitsandbytes' Lion with 8-bit momentum."""

    def _start(self, parameter: Tensor, group: Group) -> State:
        if parameter.numel() < MIN_8BIT:
            return {"exp_avg": zero_moment(parameter)}
        return {"state1": zero_codes(parameter), "absmax1": zero_scales(parameter)}

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        if "exp_avg" in state:
            lion_step(weight, grad, state, group)
        else:
            step_8bit("lion", weight, grad, state, group, step, self._maps_on(weight.device))


class Muon(ShardedOptimizer):
    """Muon for groups with `orthogonal`, AdamW for the others. Updates are scaled to the size of
    AdamW's (arXiv 2502.16982), so learning rates are those of AdamW.

    A sharded matrix is orthogonalised as a whole: its update is gathered once in bf16, and each
    device keeps its slice.
    """

    def _start(self, parameter: Tensor, group: Group) -> State:
        if group["orthogonal"]:
            return {"momentum_buffer": zero_moment(parameter)}
        return {"exp_avg": zero_moment(parameter), "exp_avg_sq": zero_moment(parameter)}

    def _gradient(self, parameter: Tensor, group: Group) -> Tensor:
        """The slice of the orthogonalised update, which depends on all slices. So the momentum is
        updated here.
        """
        grad = super()._gradient(parameter, group)
        if not group["orthogonal"]:
            return grad
        momentum = local(self.state[parameter]["momentum_buffer"])
        own_update = self._update_momentum(momentum, grad.float(), group)
        update = like(parameter, own_update, parameter.shape)
        whole = orthogonalised(update.full_tensor() if isinstance(update, DTensor) else update)
        return whole[slice(*rows(parameter))].float().mul_(0.2 * max(parameter.shape) ** 0.5)

    def _update_momentum(self, momentum: Tensor, grad: Tensor, group: Group) -> Tensor:
        """Update the momentum unless the step is skipped; returns its average with the gradient
        (Nesterov) in bf16.
        """
        backup = momentum.clone() if self.found_inf is not None else None
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]).bfloat16()
        if backup is not None:
            self._restore_if_skipped(momentum, backup)
        return update

    def _update(self, weight: Tensor, grad: Tensor, state: State, group: Group, step: int) -> None:
        if not group["orthogonal"]:
            adamw_step(weight, grad, state, group)
            return
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(grad, alpha=-group["lr"])


class StepCount:
    """The number of steps taken, on the host, where some kernels need it.

    Only the device knows whether a step was skipped. Its count is copied to the host after each
    step and read at the next one, so the host does not wait for the current step.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._version = 0
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, states: dict[Tensor, State]) -> int:
        count = _any_count(states)
        # The count was replaced or changed by reading a checkpoint.
        if self._copy is None or count is not self._count or count._version != self._version:
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
    """The step count of any parameter: all have the same."""
    return next(state["step"] for state in states.values())


# State of a slice
# ----------------------------------------------------------------------------------------------


def _piece(name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """A flat view of the numbers `start` to `stop` of a slice's weight or state tensor `name`; the
    tensor itself for `step`.
    """
    if name == "step":
        return tensor
    size = BLOCK if name in ("absmax1", "absmax2") else 1
    piece = tensor.view(-1)[start // size : -(-stop // size)]
    if getattr(tensor, "is_paged", False):  # an attribute of bitsandbytes, which views do not have
        vars(piece).update(vars(tensor))
    return piece


def zero_moment(parameter: Tensor) -> Tensor:
    return like(parameter, torch.zeros_like(local(parameter), dtype=torch.float32), parameter.shape)


def zero_codes(parameter: Tensor) -> Tensor:
    return like(parameter, torch.zeros_like(local(parameter), dtype=torch.uint8), parameter.shape)


def zero_scales(parameter: Tensor) -> Tensor:
    """A scale for each block of the slice, sharded like the parameter.

    The shape is [rows, blocks per row] if rows consist of whole blocks, so that another number of
    devices can read it. Otherwise each device has as many as the largest slice needs.
    """
    count, part = parameter.shape[0], local(parameter)
    columns = parameter.numel() // max(1, count)
    if columns % BLOCK == 0:
        scales = part.new_zeros(part.shape[0], columns // BLOCK, dtype=torch.float32)
        return like(parameter, scales, (count, columns // BLOCK))
    slices = slice_count(parameter)
    blocks = -(-(-(-count // slices) * columns) // BLOCK)
    return like(parameter, part.new_zeros(blocks, dtype=torch.float32), (slices * blocks,))
