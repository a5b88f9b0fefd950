"""The arithmetic of optimizers on flat tensors, in place."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Keller Jordan's coefficients: five iterations bring singular values to between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Group = dict[str, Any]
State = dict[str, Tensor]


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> bf16, rounded up or down so that the expected value is exact. Numbers that bf16 can
    represent do not change.
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix whose singular values are all about 1, by Newton-Schulz iteration in the
    dtype of `matrix`.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(rounds):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def adamw_step(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [weight],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"].clone()],  # adamw increments it
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def lion_step(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
    state["exp_avg"].lerp_(grad, 1 - beta2)


def step_8bit(
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
