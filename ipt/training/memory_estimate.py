"""Memory of a training step on one device, by part, from a model on the meta device.

What lies on a device throughout (weights, gradients, optimizer state) is exact for torch's AdamW
and FSDP2's sharding by rows. What comes and goes is followed through one micro-batch
(ipt.training.memory_trace) and added to the whole weights that FSDP2 holds for it. The allocator's
rounding and what the driver, the collectives and compiled kernels take are not in it: `RESERVE` is
to be left for them.
"""

import copy
from collections.abc import Mapping, Sequence
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
from ipt.training.model import transformer_blocks
from ipt.training.optim.build import parameter_groups
from ipt.training.optim.optimizers import BLOCK, MIN_8BIT, PIECE
from ipt.training.parallelize import checkpoint_activations
from ipt.training.shapes import meta_model

GIB = 1 << 30
RESERVE = (
    2 * GIB
)  # context, collectives' buffers, fragmentation: what runs of this kind were seen to take, rounded up

# Of a GPU as torch reports it, in bytes: datasheet name -> memory.
GPU_MEMORY = {
    name: int(gib * GIB)
    for name, gib in {
        "H100": 79.1,
        "H200": 139.8,
        "B200": 178.3,
        "A100": 79.1,
        "A100-40": 39.4,
        "RTX4090": 23.5,
        "RTX3090": 23.5,
        "L4": 22.0,
    }.items()
}
TRACED_ATTENTION = {
    "packed": BY_DOCUMENT,
    "sdpa": MASKED,
}  # all others are kernels that keep what flash attention keeps

# Moments that an optimizer keeps of each number, and whether in 8 bits. The pages of a paged one
# leave the device when it is full.
STATES = {"adamw": (2, False), "lion": (1, False), "muon": (1, False)}
STATES |= {"adamw_8bit": (2, True), "paged_adamw_8bit": (2, True), "lion_8bit": (1, True)}
# bytes a number, of a piece of a weight in bf16 that is updated: it in fp32, noise, and what it
# takes to add them
ROUNDING = 15
BLOCK_4BIT, NESTED_4BIT = (
    64,
    256,
)  # bitsandbytes: numbers that share a scale of one byte, and scales that share one in fp32


@dataclass(frozen=True)
class MemoryPhase:
    """What comes on top of the lasting parts at one moment of a step, in bytes."""

    name: str
    whole_weights: int = 0  # of the groups that are in use, in the type that is computed in
    whole_gradients: int = 0  # before and while they are reduced to their shards
    activations: int = 0
    temporary: int = 0  # logits of a chunk, what is recomputed, gradients of activations

    @property
    def total(self) -> int:
        return self.whole_weights + self.whole_gradients + self.activations + self.temporary


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: parts that last, and the moments of a step. Gradients last from the
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
        return self.lasting + max(moment.total for moment in self.moments)


def memory_model(config: Config) -> Any:
    """The model that a run trains, on the meta device and as it is run, but for attention: that
    keeps what the run's keeps.
    """
    register_traced_attention()
    on_cpu = config.trainer.accelerator == "cpu"
    attention = (
        config.trainer.attn_implementation
        if config.trainer.attn_implementation != "auto"
        else "packed"
        if on_cpu
        else "varlen"
    )
    model = meta_model(config, TRACED_ATTENTION.get(attention, FUSED))
    checkpoint_activations(transformer_blocks(model), config.trainer.activation_checkpointing)
    return model


def training_memory(model: Any, config: Config) -> Memory:
    """Memory of the fullest device; `model` is that of `memory_model`."""
    trainer, parameters, blocks = (
        config.trainer,
        list(model.parameters()),
        transformer_blocks(model),
    )
    packed = {
        parameter
        for name, parameter in model.named_parameters()
        if config.lora.quantize and "base_layer" in name
    }
    shards, traced = shard_count(trainer), _traced(model, config)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    updated_by = {
        parameter: name
        for parameter, name in _optimizers(model, config.optimizer).items()
        if parameter.requires_grad
    }
    moments = _fsdp_moments if uses_fsdp(trainer) else _single_moments
    return Memory(
        weights=sum(
            _weight_bytes(parameter, shards, config.lora.quantize if parameter in packed else None)
            for parameter in parameters
        ),
        gradients=sum(_gradient_bytes(parameter, shards, trainer) for parameter in trainable),
        optimizer=sum(
            optimizer_bytes(parameter, shards, name) for parameter, name in updated_by.items()
        ),
        moments=[
            *moments(
                [parameter for parameter in parameters if parameter not in packed],
                blocks,
                config,
                traced,
            ),
            MemoryPhase(
                "update", temporary=_update_bytes(updated_by, shards, config.optimizer.name)
            ),
        ],
    )


def sharded(parameter: Tensor, shards: int) -> int:
    """Numbers of a parameter on the first of `shards` devices: FSDP2 cuts along the first dimension
    and pads the last shard.
    """
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(1, rows))


def optimizer_bytes(parameter: Tensor, shards: int, name: str) -> int:
    """State of a tensor's slice: its step, and moments in fp32 or in 8 bits with scales
    (ipt.training.optim.optimizers).
    """
    moments, small = STATES[name]
    numbers = sharded(parameter, shards)
    if small and parameter.numel() >= MIN_8BIT:
        codes = 0 if name.startswith("paged") else numbers
        return 4 + moments * (codes + 4 * -(-numbers // BLOCK))
    return 4 + moments * 4 * numbers


def quantized_bytes(rows: int, columns: int, quantize: str) -> int:
    """A frozen matrix as bitsandbytes holds it: in 4 bits with nested scales, or in 8 bits with a
    scale for each row.
    """
    if quantize == "8bit":
        return rows * columns + 4 * rows
    scales = -(-rows * columns // BLOCK_4BIT)
    return -(-rows * columns // 2) + scales + 4 * -(-scales // NESTED_4BIT)


def uses_fsdp(trainer: TrainerConfig) -> bool:
    """As ipt.training.train decides, for a machine that has the GPUs which the config asks for."""
    if trainer.strategy == "auto":
        return world_size(trainer) > 1 or trainer.accelerator != "cpu"
    return trainer.strategy == "fsdp2"


def world_size(trainer: TrainerConfig) -> int:
    return trainer.devices * trainer.num_nodes


def shard_count(trainer: TrainerConfig) -> int:
    """Devices that share one copy of the weights."""
    return world_size(trainer) // trainer.replicas if uses_fsdp(trainer) else 1


def compute_dtype(trainer: TrainerConfig) -> torch.dtype:
    return torch.bfloat16 if trainer.bf16_arithmetic else torch.float32


def _traced(model: Any, config: Config) -> Traced:
    """With a memory budget, a share of what could be recomputed is kept."""
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


def _weight_bytes(parameter: Tensor, shards: int, quantize: str | None) -> int:
    """Of a weight on one device. Quantised ones, which are matrices, stay whole on each."""
    if quantize and parameter.ndim == 2:
        rows, columns = parameter.shape
        return quantized_bytes(rows, columns, quantize)
    return sharded(parameter, shards) * parameter.element_size()


def _gradient_bytes(parameter: Tensor, shards: int, trainer: TrainerConfig) -> int:
    """Of a shard; with no_sync also the whole one, in fp32, that waits for the last micro-batch of
    a step.
    """
    waiting = (
        4 * parameter.numel()
        if uses_fsdp(trainer) and trainer.no_sync and trainer.accumulate_grad_batches > 1
        else 0
    )
    return sharded(parameter, shards) * parameter.element_size() + waiting


def _optimizers(model: nn.Module, config: OptimizerConfig) -> dict[Tensor, str]:
    """What updates each weight: Muon leaves some to AdamW."""
    if config.name != "muon":
        return dict.fromkeys(model.parameters(), config.name)
    groups = parameter_groups(model, config)
    return {
        parameter: "muon" if group["orthogonal"] else "adamw"
        for group in groups
        for parameter in group["params"]
    }


def _update_bytes(updated_by: Mapping[Tensor, str], shards: int, optimizer: str) -> int:
    """What the update of a weight needs for a moment, of the one that needs most; torch's AdamW, on
    weights in fp32, needs nothing.
    """
    if optimizer == "adamw" and all(parameter.element_size() == 4 for parameter in updated_by):
        return 0
    return max(_piece_bytes(parameter, shards, name) for parameter, name in updated_by.items())


def _piece_bytes(parameter: Tensor, shards: int, name: str) -> int:
    """Of a piece a copy to go back to, and in bf16 its rounding, its gradient in fp32. Muon has
    gradients of a whole matrix.
    """
    numbers, rounded = sharded(parameter, shards), parameter.dtype == torch.bfloat16
    piece = min(numbers, PIECE)
    copied = piece * parameter.element_size() + optimizer_bytes(
        parameter, shards, name
    ) * piece // max(1, numbers)
    worked = piece * (
        ROUNDING if rounded else 4 * (name == "lion")
    )  # Lion mixes gradient and momentum in a tensor of its own
    if name == "muon":
        return max(_orthogonal_bytes(parameter, shards), copied + worked + 4 * numbers)
    return copied + worked + 4 * piece * rounded


def _orthogonal_bytes(parameter: Tensor, shards: int) -> int:
    """What Muon needs to orthogonalise the update of a whole matrix: first momentum and mix in
    fp32, then in bf16 it and its products.
    """
    numbers, gram = sharded(parameter, shards), 2 * min(parameter.shape) ** 2
    mixed = numbers * (4 * (parameter.dtype == torch.bfloat16) + 4 + 4 + 2)
    gathered = 2 * numbers if shards > 1 else 0
    return max(mixed, gathered + 3 * 2 * parameter.numel() + 2 * gram)


def _fsdp_moments(
    parameters: Sequence[Tensor], blocks: list[nn.Module], config: Config, traced: Traced
) -> list[MemoryPhase]:
    """FSDP2: the root group is whole from the first use on; of the blocks one is in use and the
    next on its way.
    """
    size, shards = compute_dtype(config.trainer).itemsize, set(parameters)
    groups = [
        [parameter for parameter in block.parameters() if parameter in shards] for block in blocks
    ]
    in_blocks = {parameter for group in groups for parameter in group}
    root = [parameter for parameter in parameters if parameter not in in_blocks]
    group = max(groups, key=lambda group: _numbers(group), default=[])
    whole_root, whole_blocks = size * _numbers(root), 2 * size * _numbers(group)
    reduced = (
        size + 4
    )  # in the type that is computed in, and in fp32 on their way through the reduction
    return [
        MemoryPhase("loss", whole_root + whole_blocks, 0, traced.activations, traced.loss),
        MemoryPhase(
            "backward",
            whole_root + whole_blocks,
            reduced * _trainable(group),
            traced.activations,
            traced.backward,
        ),
        MemoryPhase("end of backward", whole_root, reduced * _trainable(root)),
    ]


def _single_moments(
    parameters: Sequence[Tensor], blocks: list[nn.Module], config: Config, traced: Traced
) -> list[MemoryPhase]:
    """One plain process: in bf16 autocast keeps a copy of each matrix for the pass."""
    copies = (
        _numbers([parameter for parameter in parameters if parameter.ndim > 1]) * 2
        if config.trainer.bf16_arithmetic
        else 0
    )
    return [
        MemoryPhase("loss", copies, 0, traced.activations, traced.loss),
        MemoryPhase("backward", copies, 0, traced.activations, traced.backward),
    ]


def _numbers(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trainable(parameters: Sequence[Tensor]) -> int:
    return _numbers([parameter for parameter in parameters if parameter.requires_grad])
