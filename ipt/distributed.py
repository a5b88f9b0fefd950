"""Several processes that score together: those that torchrun has started, or those of a training
run.

Whoever has set up torch.distributed works together; a process without it works alone.
"""

import os
from typing import TypeVar

from ipt.errors import UserError

Value = TypeVar("Value")


def launcher_number(variable: str) -> int | None:
    """The value of an environment variable that a launcher such as torchrun sets; None if it is
    unset or empty.
    """
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
    """Set up the processes of a torchrun, one for each GPU, or on the CPU; does nothing in a
    process that stands alone.
    """
    local_rank = launcher_number("LOCAL_RANK")
    if launcher_number("WORLD_SIZE") in (None, 1) or local_rank is None:
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """From here on each process stands alone."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Number of this process, and how many work together."""
    from torch import distributed

    return (
        (distributed.get_rank(), distributed.get_world_size())
        if distributed.is_initialized()
        else (0, 1)
    )


def gathered(own: dict[int, Value]) -> dict[int, Value]:
    """What all processes have found, for each of them."""
    from torch import distributed

    _, size = place()
    if size == 1:
        return own
    found: list[dict[int, Value]] = [{}] * size
    distributed.all_gather_object(found, own)
    return {key: value for part in found for key, value in part.items()}
