"""Slices: what one device holds of a tensor that FSDP2 has cut along its first dimension."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """The slice of a sharded tensor that this device holds; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, part: Tensor, shape: Iterable[int]) -> Tensor:
    """`part` as this device's slice of a tensor of `shape` that is cut like `parameter`; `part`
    itself if that is not cut.
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
    """First row of this device's slice, and the one behind its last; slices are of equal size but
    for the last ones.
    """
    size = -(-parameter.shape[0] // slice_count(parameter))
    start = min(slice_number(parameter) * size, parameter.shape[0])
    return start, min(start + size, parameter.shape[0])


def slice_count(parameter: Tensor) -> int:
    return parameter.device_mesh.size(_cut_by(parameter)) if isinstance(parameter, DTensor) else 1


def slice_number(parameter: Tensor) -> int:
    return (
        parameter.device_mesh.get_local_rank(_cut_by(parameter))
        if isinstance(parameter, DTensor)
        else 0
    )


def _cut_by(parameter: DTensor) -> int:
    """The dimension of the mesh along which it is cut; along another one there may be copies
    (HSDP).
    """
    return next(
        index
        for index, placement in enumerate(parameter.placements)
        if not isinstance(placement, Replicate)
    )
