"""Processes that work together: started by torchrun, or the ranks of a training run."""

import os
from typing import TypeVar

from ipt.errors import UserError

Value = TypeVar("Value")


def launcher_number(variable: str) -> int | None:
    """The value of a launcher's environment variable, such as RANK; None if unset or empty."""
    value = os.environ.get(variable)
    if not value:
        return None
    if not value.isdecimal():
        raise UserError(
            f"the environment variable {variable} is {value!r}, expected a number: unset it, or "
            "start with torchrun"
        )
    return int(value)


def rank() -> int:
    """Number of this process in its torchrun or SLURM job; 0 without one."""
    return launcher_number("RANK") or launcher_number("SLURM_PROCID") or 0


def join() -> None:
    """Initialise torch.distributed under torchrun. Does nothing in a single process."""
    local_rank = launcher_number("LOCAL_RANK")
    if launcher_number("WORLD_SIZE") in (None, 1) or local_rank is None:
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Destroy the process group."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
    from torch import distributed

    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(own: dict[int, Value]) -> dict[int, Value]:
    """The union of all processes' entries, on every process."""
    from torch import distributed

    _, size = place()
    if size == 1:
        return own
    found: list[dict[int, Value]] = [{}] * size
    distributed.all_gather_object(found, own)
    return {key: value for part in found for key, value in part.items()}
