"""Memory and network traffic of training Llama-3-8B on many GPUs: derived, not measured.

Memory is the dry run's estimate. Network traffic is counted from the collectives of FSDP2 with the
settings of `ipt.training.parallelize`: P parameters, R of them outside the blocks, sharded over s
devices, with r replicas.

    all-gather, bf16, per micro-batch       2 (2 (P - R) + R) (s - 1) / s
        blocks in the forward and in the backward pass, all other parameters once
    reduce-scatter, fp32, per micro-batch   4 P (s - 1) / s
        once per step with trainer.no_sync
    all-reduce of the shards between        2 * 4 P / s * (r - 1) / r
    replicas, fp32, per step

All figures are bytes that one device sends; it receives as many. The bandwidth is the slowest link
involved: NVLINK if all devices are in one node, otherwise INFINIBAND with one adapter per device.
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ipt.config import Config, compose_config
from ipt.pipeline.dry_run.training import DEVICES_OF_A_NODE, Needs, training_needs
from ipt.training.memory_estimate import shard_count
from ipt.training.metrics import named_peak
from ipt.training.model import meta_model, transformer_blocks

GPU, MFU = "H100", 0.4
NVLINK = 450e9  # bytes/s per device in one direction, fourth generation
INFINIBAND = 50e9  # bytes/s per device in one direction, NDR
EFFICIENCY = 0.8  # fraction of the bandwidth that is reached
# devices and replicas
LAYOUTS = ((8, 1), (64, 1), (64, 8), (512, 1), (512, 8), (512, 64))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends, and the seconds this takes without overlap with computation."""

    gathered: float
    reduced: float
    between_replicas: float
    seconds: float


def network_table(layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> Table:
    table = Table(
        title=f"Llama-3-8B, {GPU}, one sequence of 8,192 tokens per device and step",
        title_justify="left",
    )
    columns = (
        "GPUs",
        "replicas",
        "persistent GiB",
        "peak GiB",
        "gathered GB",
        "reduced GB",
        "between replicas GB",
        "network s",
    )
    for column in (*columns, f"compute s at MFU {MFU:.0%}", "M tokens/s at 100% MFU"):
        table.add_column(column, justify="right")
    for devices, replicas in layouts:
        config = layout(devices, replicas)
        needs, sent = training_needs(config), traffic(config)
        table.add_row(
            f"{devices}",
            f"{replicas}",
            f"{needs.memory.lasting / 2**30:.1f}",
            f"{needs.memory.peak / 2**30:.1f}",
            *(f"{size / 1e9:.1f}" for size in (sent.gathered, sent.reduced, sent.between_replicas)),
            f"{sent.seconds:.2f}",
            f"{compute_seconds(needs, devices):.2f}",
            f"{devices * peak() / needs.flops_per_token / 1e6:.2f}",
        )
    return table


def layout(devices: int, replicas: int) -> Config:
    """The recipe of the paper's 8B model with one sequence of 8,192 tokens per device."""
    settings = (
        f"trainer.devices={min(devices, DEVICES_OF_A_NODE)}",
        f"trainer.num_nodes={max(1, devices // DEVICES_OF_A_NODE)}",
    )
    more = (
        f"trainer.replicas={replicas}",
        "trainer.accumulate_grad_batches=1",
        "mixture.seq_len=8192",
        f"dry_run_gpu={GPU}",
    )
    return compose_config("train", ["experiment=medicine_llama3_8b", *settings, *more])


def traffic(config: Config) -> Traffic:
    """Traffic of a step with one micro-batch."""
    model: Any = meta_model(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(
        parameter.numel() for block in transformer_blocks(model) for parameter in block.parameters()
    )
    shards, replicas = shard_count(config.trainer), config.trainer.replicas
    away = (shards - 1) / shards
    gathered, reduced = 2 * (numbers + in_blocks) * away, 4 * numbers * away
    between = 2 * 4 * numbers / shards * (replicas - 1) / replicas
    within = NVLINK if shards <= DEVICES_OF_A_NODE else INFINIBAND
    across = NVLINK if config.trainer.world_size <= DEVICES_OF_A_NODE else INFINIBAND
    return Traffic(
        gathered, reduced, between, ((gathered + reduced) / within + between / across) / EFFICIENCY
    )


def compute_seconds(needs: Needs, devices: int) -> float:
    """Seconds of computation per step."""
    return needs.flops_per_token * needs.tokens_per_step / (devices * peak() * MFU)


def peak() -> float:
    found = named_peak(GPU)
    assert found is not None
    return found
