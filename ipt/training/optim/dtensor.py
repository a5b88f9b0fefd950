"""Slices: the rows that a device holds of a tensor that FSDP2 has sharded."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """The slice of a sharded tensor that this device holds; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, part: Tensor, shape: Iterable[int]) -> Tensor:
    """A tensor of `shape` that is sharded like `parameter`, with `part` as this device's slice.
    Returns `part` itself if `parameter` is not sharded.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )


def rows(parameter: Tensor) -> tuple[int, int]:
    """Start and end of the rows in this device's slice. All slices have the same size, except the
    last ones, which may be smaller or empty.
    """
    size = -(-parameter.shape[0] // slice_count(parameter))
    start = min(slice_number(parameter) * size, parameter.shape[0])
    return start, min(start + size, parameter.shape[0])


def slice_count(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    return parameter.device_mesh.size(_sharded_dimension(parameter))


def slice_number(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 0
    return parameter.device_mesh.get_local_rank(_sharded_dimension(parameter))


def _sharded_dimension(parameter: DTensor) -> int:
    """The mesh dimension that shards; another one may replicate (HSDP)."""
    for index, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            return index
    raise AssertionError("a DTensor that is not sharded")
