"""What is done to a model from outside before it trains, in this order: activation checkpointing,
compilation, sharding (FSDP2).

The first two replace `forward` of a block and leave its class, its hooks and the names of its
weights alone, so FSDP2's gathering stays outside of what is compiled and recomputed, and
checkpoints do not know of any of it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ipt.config import TrainerConfig

MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def parallelize(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh | None, config: TrainerConfig
) -> None:
    """Checkpoint and compile each of `blocks`, then shard them and what is left of `model` over
    `mesh`, if there is one.
    """
    checkpoint_activations(blocks, config.activation_checkpointing)
    if config.compile:
        compile_blocks(blocks, config)
    if mesh is not None:
        shard(model, blocks, data_mesh(mesh, config.replicas), config)


def checkpoint_activations(blocks: Iterable[nn.Module], mode: str) -> None:
    """Recompute activations of `blocks` in the backward pass: all (`full`), or cheap ones
    (`selective`). `budget` is the compiler's.
    """
    if mode in ("full", "selective"):
        for block in blocks:
            block.forward = MethodType(
                _recomputed if mode == "full" else _recomputed_selectively, block
            )  # a method, to be copied with it


def compile_blocks(blocks: Iterable[nn.Module], config: TrainerConfig) -> None:
    """Compile each block; blocks of one kind share their program."""
    if config.activation_checkpointing == "budget":
        from torch._functorch import config as functorch

        functorch.activation_memory_budget = config.activation_budget
    for block in blocks:
        block.forward = torch.compile(block.forward)


def data_mesh(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    """Devices as [shard], or as [replicate, shard], neighbours sharing one copy (HSDP), which
    Lightning does not make.
    """
    if replicas == 1:
        return mesh
    return init_device_mesh(
        mesh.device_type, (replicas, mesh.size() // replicas), mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, config: TrainerConfig
) -> None:
    """Shard each of `blocks`, then what is left of `model` as one group, over `mesh`.

    Embeddings, last norm and projection stay in the root group, which is gathered for the whole
    forward pass: so the chunked loss may use the projection's weight directly, tied or not.
    Gradients are reduced in fp32. Quantised weights, which are frozen and small, stay whole on each
    device.
    """
    dtype = torch.bfloat16 if config.bf16_arithmetic else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ignored = {
        parameter
        for parameter in model.parameters()
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state")
    }
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored
    )


def set_gradient_sync(model: nn.Module, last: bool, config: TrainerConfig) -> None:
    """Before the backward pass of a micro-batch: reduce gradients over devices if it is the last of
    its step.

    Copies of the model (HSDP) always wait for the last one, which costs nothing. Within a copy that
    would keep whole gradients meanwhile, in fp32, so it is asked for by `no_sync`.
    """
    if not isinstance(model, FSDPModule):
        return
    if config.no_sync:
        model.set_requires_gradient_sync(last)
    elif config.replicas > 1:
        model.set_requires_all_reduce(last)


def _recomputed(block: nn.Module, *arguments: Any, **options: Any) -> Any:
    return checkpoint(_forward(block), *arguments, use_reentrant=False, **options)


def _recomputed_selectively(block: nn.Module, *arguments: Any, **options: Any) -> Any:
    return checkpoint(
        _forward(block), *arguments, use_reentrant=False, context_fn=_selective_contexts, **options
    )


def _forward(block: nn.Module) -> Callable[..., Any]:
    """The forward of the block's class, which `block.forward` now hides."""
    return partial(type(block).forward, block)


def _selective_contexts() -> Any:
    """Keep attention's outputs and every second matrix product's, and recompute all else, as
    torchtitan found to be a good trade.
    """
    products = {False: 0, True: 0}  # seen in the forward pass, and while recomputing

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        if operation in MATRIX_PRODUCTS:
            products[context.is_recompute] += 1
            return (
                CheckpointPolicy.MUST_SAVE
                if products[context.is_recompute] % 2
                else CheckpointPolicy.PREFER_RECOMPUTE
            )
        kept = any(
            part in str(operation) for part in ("attention", "attn")
        ) and "backward" not in str(operation)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
