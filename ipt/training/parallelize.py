"""What is applied to a model from outside before training, in this order: activation checkpointing,
compilation, sharding (FSDP2).

The first two replace `forward` of a block and leave its class, hooks and weight names alone. So
FSDP2 gathers weights outside of what is compiled and recomputed, and checkpoints do not depend on
any of it.
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


def uses_fsdp(config: TrainerConfig, has_gpu: bool) -> bool:
    """Whether the model is sharded by FSDP2. `auto`: with several processes, and on a single GPU,
    so that one GPU and many do the same arithmetic.
    """
    if config.strategy == "auto":
        return config.world_size > 1 or (has_gpu and config.accelerator != "cpu")
    return config.strategy == "fsdp2"


def parallelize(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh | None, config: TrainerConfig
) -> None:
    """Checkpoint and compile each of `blocks`, then shard them and the rest of `model` over `mesh`,
    if there is one.
    """
    checkpoint_activations(blocks, config.activation_checkpointing)
    if config.compile:
        compile_blocks(blocks, config)
    if mesh is not None:
        shard(model, blocks, data_mesh(mesh, config.replicas), config)


def checkpoint_activations(blocks: Iterable[nn.Module], mode: str) -> None:
    """Recompute activations of `blocks` in the backward pass: all (`full`) or the cheap ones
    (`selective`). `budget` is handled by the compiler.
    """
    if mode not in ("full", "selective"):
        return
    forward = _recomputed if mode == "full" else _recomputed_selectively
    for block in blocks:
        block.forward = MethodType(forward, block)  # a method, so that copies of the block work


def compile_blocks(blocks: Iterable[nn.Module], config: TrainerConfig) -> None:
    """Compile each block; blocks of the same class share a program."""
    if config.activation_checkpointing == "budget":
        from torch._functorch import config as functorch

        functorch.activation_memory_budget = config.activation_budget
    for block in blocks:
        block.forward = torch.compile(block.forward)


def data_mesh(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    """The devices as a mesh [shard], or [replicate, shard] with several replicas (HSDP), where
    neighbouring devices share a replica. Lightning does not create such a mesh.
    """
    if replicas == 1:
        return mesh
    return init_device_mesh(
        mesh.device_type, (replicas, mesh.size() // replicas), mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, config: TrainerConfig
) -> None:
    """Shard each of `blocks`, then the rest of `model` as one group, over `mesh`.

    Embeddings, last norm and projection are in the root group, which stays gathered for the whole
    forward pass, so the chunked loss can use the projection's weight directly, tied or not.
    Gradients are reduced in fp32. Quantised weights, which are frozen and small, are replicated.
    """
    dtype = torch.bfloat16 if config.bf16_arithmetic else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ignored = set()
    for parameter in model.parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            ignored.add(parameter)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored
    )


def set_gradient_sync(model: nn.Module, last: bool, config: TrainerConfig) -> None:
    """Call before the backward pass of a micro-batch; `last`: it is the last one of its step.

    With `no_sync`, gradients are reduced after the last micro-batch only, and each device keeps
    whole gradients in fp32 until then. Replicas (HSDP) always exchange gradients after the last
    micro-batch only, which costs no memory.
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
    """The forward method of the block's class, which `block.forward` hides."""
    return partial(type(block).forward, block)


def _selective_contexts() -> Any:
    """Save the outputs of attention and of every second matrix product, and recompute the rest, as
    torchtitan does.
    """
    products = {False: 0, True: 0}  # counts in the forward pass, and while recomputing

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        name = str(operation)
        if operation in MATRIX_PRODUCTS:
            products[context.is_recompute] += 1
            saves = products[context.is_recompute] % 2 == 1
        else:
            saves = ("attention" in name or "attn" in name) and "backward" not in name
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
