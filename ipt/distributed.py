"""Several processes that score together: those that torchrun has started, or those of a training run.

Whoever has set up torch.distributed works together; a process without it works alone.
"""

import os
from typing import TypeVar

Value = TypeVar("Value")


def join() -> None:
    """Set up the processes of a torchrun, one for each GPU, or on the CPU; does nothing in a process that stands alone."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "LOCAL_RANK" not in os.environ:
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """From here on each process stands alone."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Number of this process, and how many work together."""
    from torch import distributed

    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gathered(own: dict[int, Value]) -> dict[int, Value]:
    """What all processes have found, for each of them."""
    from torch import distributed

    _, size = place()
    if size == 1:
        return own
    found: list[dict[int, Value]] = [{}] * size
    distributed.all_gather_object(found, own)
    return {key: value for part in found for key, value in part.items()}
