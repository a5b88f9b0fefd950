"""How a model is spread over devices, applied from outside the model: activation checkpointing, then FSDP2."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ipt.config import TrainerConfig


def parallelize(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, config: TrainerConfig) -> None:
    """Shard each of `blocks`, then what is left of `model` as one group, over `mesh`.

    Embeddings, last norm and projection stay in the root group, which is gathered for the whole forward pass: so the
    chunked loss may use the projection's weight directly, tied or not. Gradients are reduced in fp32.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
