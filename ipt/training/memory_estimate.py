"""Memory of a training step on one device, by part, from a model on the meta device.

The lasting parts (weights, gradients, optimizer state) are exact for our optimizers and FSDP2's
sharding by rows. Temporary memory is traced through one micro-batch (ipt.training.memory_trace),
plus the whole weights that FSDP2 gathers. Not included, and covered by `RESERVE`: rounding by the
allocator, and the memory of the driver, the collectives and compiled kernels.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipt.config import Config, OptimizerConfig, TrainerConfig
from ipt.training.memory_trace import (
    BY_DOCUMENT,
    FUSED,
    MASKED,
    Traced,
    register_traced_attention,
    trace_step,
)
from ipt.training.model import meta_model, transformer_blocks
from ipt.training.optim.build import parameter_groups
from ipt.training.optim.optimizers import BLOCK, MIN_8BIT, PIECE
from ipt.training.parallelize import checkpoint_activations, uses_fsdp

GIB = 1 << 30
# CUDA context, buffers of collectives, fragmentation: the observed maximum, rounded up.
RESERVE = 2 * GIB

# GPU -> memory in GiB as torch reports it.
GPU_GIB = {
    "H100": 79.1,
    "H200": 139.8,
    "B200": 178.3,
    "A100": 79.1,
    "A100-40": 39.4,
    "RTX4090": 23.5,
    "RTX3090": 23.5,
    "L4": 22.0,
}
GPU_MEMORY = {name: int(gib * GIB) for name, gib in GPU_GIB.items()}  # in bytes

# The other implementations keep what flash attention keeps.
TRACED_ATTENTION = {"packed": BY_DOCUMENT, "sdpa": MASKED}

# Optimizer -> (moments per number, whether in 8 bits). Paged moments leave a full device.
STATES = {
    "adamw": (2, False),
    "lion": (1, False),
    "muon": (1, False),
    "adamw_8bit": (2, True),
    "paged_adamw_8bit": (2, True),
    "lion_8bit": (1, True),
}
# Bytes per number to update a piece of a bf16 weight: its fp32 copy, noise, and temporaries.
ROUNDING = 15
# bitsandbytes: numbers that share a scale of one byte, and scales that share an fp32 scale.
BLOCK_4BIT, NESTED_4BIT = 64, 256


@dataclass(frozen=True)
class MemoryPhase:
    """Memory of one phase of a step in addition to the lasting parts, in bytes."""

    name: str
    whole_weights: int = 0  # gathered groups, in the compute dtype
    whole_gradients: int = 0  # before and while they are reduced to shards
    activations: int = 0
    temporary: int = 0  # logits of a chunk, recomputed activations, gradients of activations

    @property
    def total(self) -> int:
        return self.whole_weights + self.whole_gradients + self.activations + self.temporary


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: the lasting parts, and the phases of a step. Gradients last from the
    first micro-batch to the update.
    """

    weights: int
    gradients: int
    optimizer: int
    moments: list[MemoryPhase]

    @property
    def lasting(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.lasting + max(phase.total for phase in self.moments)


def memory_model(config: Config) -> Any:
    """The model of the run on the meta device, with activation checkpointing, and with an attention
    that keeps the same tensors as the run's.
    """
    register_traced_attention()
    attention = config.trainer.attn_implementation
    if attention == "auto":
        attention = "packed" if config.trainer.accelerator == "cpu" else "varlen"
    model = meta_model(config, TRACED_ATTENTION.get(attention, FUSED))
    checkpoint_activations(transformer_blocks(model), config.trainer.activation_checkpointing)
    return model


def training_memory(model: Any, config: Config) -> Memory:
    """Memory of the device that needs most; `model` comes from `memory_model`."""
    trainer, shards = config.trainer, shard_count(config.trainer)
    optimizers = _optimizers(model, config.optimizer)
    weights = gradients = optimizer = 0
    unquantized, updated_by = [], {}
    for name, parameter in model.named_parameters():
        if config.lora.quantize and "base_layer" in name:
            weights += _quantized_weight_bytes(parameter, shards, config.lora.quantize)
        else:
            weights += sharded(parameter, shards) * parameter.element_size()
            unquantized.append(parameter)
        if parameter.requires_grad:
            gradients += _gradient_bytes(parameter, shards, trainer)
            optimizer += optimizer_bytes(parameter, shards, optimizers[parameter])
            updated_by[parameter] = optimizers[parameter]
    traced = _traced(model, config)
    phases_of = _fsdp_phases if is_sharded(trainer) else _single_phases
    phases = phases_of(unquantized, transformer_blocks(model), config, traced)
    update = _update_bytes(updated_by, shards, config.optimizer.name)
    return Memory(weights, gradients, optimizer, [*phases, MemoryPhase("update", temporary=update)])


def sharded(parameter: Tensor, shards: int) -> int:
    """Numbers of a parameter on the first of `shards` devices: FSDP2 shards along the first
    dimension and pads the last shard.
    """
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(1, rows))


def optimizer_bytes(parameter: Tensor, shards: int, name: str) -> int:
    """State of a parameter's slice: its step count, and moments in fp32, or in 8 bits with scales
    (ipt.training.optim.optimizers).
    """
    moments, is_8bit = STATES[name]
    numbers = sharded(parameter, shards)
    if is_8bit and parameter.numel() >= MIN_8BIT:
        codes = 0 if name.startswith("paged") else numbers
        return 4 + moments * (codes + 4 * -(-numbers // BLOCK))
    return 4 + moments * 4 * numbers


def quantized_bytes(rows: int, columns: int, quantize: str) -> int:
    """A frozen matrix in bitsandbytes: in 4 bits with nested scales, or in 8 bits with a scale per
    row.
    """
    if quantize == "8bit":
        return rows * columns + 4 * rows
    scales = -(-rows * columns // BLOCK_4BIT)
    return -(-rows * columns // 2) + scales + 4 * -(-scales // NESTED_4BIT)


def is_sharded(trainer: TrainerConfig) -> bool:
    """Whether the run uses FSDP2 on a machine that has the GPUs which the config asks for."""
    return uses_fsdp(trainer, has_gpu=True)


def shard_count(trainer: TrainerConfig) -> int:
    """Devices that share one replica of the weights."""
    return trainer.world_size // trainer.replicas if is_sharded(trainer) else 1


def compute_dtype(trainer: TrainerConfig) -> torch.dtype:
    return torch.bfloat16 if trainer.bf16_arithmetic else torch.float32


def _traced(model: Any, config: Config) -> Traced:
    """With a memory budget, a fraction of the activations that could be recomputed is kept."""
    trainer = config.trainer
    shape = (
        trainer.micro_batch_size,
        config.mixture.seq_len,
        compute_dtype(trainer),
        trainer.loss_chunk,
    )
    traced = trace_step(model, *shape)
    if trainer.activation_checkpointing != "budget":
        return traced
    model = copy.deepcopy(model)
    checkpoint_activations(transformer_blocks(model), "full")
    least = trace_step(model, *shape)
    kept = least.activations + trainer.activation_budget * (traced.activations - least.activations)
    return Traced(int(kept), traced.loss, max(traced.backward, least.backward))


def _quantized_weight_bytes(parameter: Tensor, shards: int, quantize: str) -> int:
    """Quantised matrices are replicated; other frozen tensors, such as biases, are sharded."""
    if parameter.ndim == 2:
        return quantized_bytes(parameter.shape[0], parameter.shape[1], quantize)
    return sharded(parameter, shards) * parameter.element_size()


def _gradient_bytes(parameter: Tensor, shards: int, trainer: TrainerConfig) -> int:
    """The shard, and with `no_sync` the whole fp32 gradient that waits for the last micro-batch."""
    waits = is_sharded(trainer) and trainer.no_sync and trainer.accumulate_grad_batches > 1
    whole = 4 * parameter.numel() if waits else 0
    return sharded(parameter, shards) * parameter.element_size() + whole


def _optimizers(model: nn.Module, config: OptimizerConfig) -> dict[Tensor, str]:
    """The optimizer of each parameter: Muon leaves some to AdamW."""
    if config.name != "muon":
        return dict.fromkeys(model.parameters(), config.name)
    optimizers = {}
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            optimizers[parameter] = "muon" if group["orthogonal"] else "adamw"
    return optimizers


def _update_bytes(updated_by: Mapping[Tensor, str], shards: int, optimizer: str) -> int:
    """Temporary memory of the update, for the weight that needs most. torch's AdamW on fp32 weights
    needs none.
    """
    if optimizer == "adamw" and all(parameter.element_size() == 4 for parameter in updated_by):
        return 0
    return max(_piece_bytes(parameter, shards, name) for parameter, name in updated_by.items())


def _piece_bytes(parameter: Tensor, shards: int, name: str) -> int:
    """Backup of a piece, and for bf16 weights rounding and the fp32 gradient. Muon has the gradient
    of a whole matrix.
    """
    numbers, is_bf16 = sharded(parameter, shards), parameter.dtype == torch.bfloat16
    piece = min(numbers, PIECE)
    state = optimizer_bytes(parameter, shards, name) * piece // max(1, numbers)
    backup = piece * parameter.element_size() + state
    # Lion averages gradient and momentum in a separate tensor.
    arithmetic = piece * (ROUNDING if is_bf16 else 4 * (name == "lion"))
    if name == "muon":
        return max(_orthogonal_bytes(parameter, shards), backup + arithmetic + 4 * numbers)
    return backup + arithmetic + 4 * piece * is_bf16


def _orthogonal_bytes(parameter: Tensor, shards: int) -> int:
    """Temporary memory of Muon's orthogonalisation: momentum and average in fp32 first, then the
    whole matrix in bf16 and its products.
    """
    numbers, gram = sharded(parameter, shards), 2 * min(parameter.shape) ** 2
    averaged = numbers * (4 * (parameter.dtype == torch.bfloat16) + 4 + 4 + 2)
    gathered = 2 * numbers if shards > 1 else 0
    return max(averaged, gathered + 3 * 2 * parameter.numel() + 2 * gram)


def _fsdp_phases(
    parameters: Sequence[Tensor], blocks: list[nn.Module], config: Config, traced: Traced
) -> list[MemoryPhase]:
    """FSDP2 keeps the root group gathered from its first use on, and two blocks: the current and
    the prefetched one.
    """
    size, considered = compute_dtype(config.trainer).itemsize, set(parameters)
    root = set(parameters)
    largest: Sequence[Tensor] = []
    for block in blocks:
        group = [parameter for parameter in block.parameters() if parameter in considered]
        root -= set(group)
        largest = max(largest, group, key=_numbers)
    whole_root, whole_blocks = size * _numbers(root), 2 * size * _numbers(largest)
    # Gradients exist in the compute dtype, and in fp32 while they are reduced.
    reduced = size + 4
    whole = whole_root + whole_blocks
    gradients = reduced * _trainable(largest)
    return [
        MemoryPhase("loss", whole, 0, traced.activations, traced.loss),
        MemoryPhase("backward", whole, gradients, traced.activations, traced.backward),
        MemoryPhase("end of backward", whole_root, reduced * _trainable(root)),
    ]


def _single_phases(
    parameters: Sequence[Tensor], blocks: list[nn.Module], config: Config, traced: Traced
) -> list[MemoryPhase]:
    """One process without FSDP2: with bf16-mixed, autocast keeps a bf16 copy of each matrix."""
    copies = 0
    if config.trainer.bf16_arithmetic:
        copies = 2 * _numbers([parameter for parameter in parameters if parameter.ndim > 1])
    return [
        MemoryPhase("loss", copies, 0, traced.activations, traced.loss),
        MemoryPhase("backward", copies, 0, traced.activations, traced.backward),
    ]


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trainable(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
