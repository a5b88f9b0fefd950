"""Memory and network of a training of Llama-3-8B on many GPUs: derived, not measured.

Memory is what the dry run foresees. Network is counted from what FSDP2 does as
`ipt.training.parallelize` asks it to, for P numbers of which R are outside the blocks, cut over s
devices, with r copies:

    gathered in a micro-batch, bf16    2 (2 (P - R) + R) (s - 1) / s      blocks forward and
    backward, the rest once reduced in a micro-batch, fp32     4 P (s - 1) / s
    once a step with trainer.no_sync between copies in a step, fp32     2 * 4 P / s * (r - 1) / r
    all-reduce of the slices

All are bytes that a device sends, and receives. A rate is that of the slowest link on the way:
NVLINK where the devices are of one node, else INFINIBAND, of which each device has an adapter of
its own.
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ipt.config import Config, compose_config
from ipt.pipeline.dry_run.training import DEVICES_OF_A_NODE, Needs, training_needs
from ipt.training.flops import named_peak
from ipt.training.memory_estimate import shard_count, world_size
from ipt.training.model import transformer_blocks
from ipt.training.shapes import meta_model

GPU, MFU = "H100", 0.4
NVLINK, INFINIBAND, SHARE = (
    450e9,
    50e9,
    0.8,
)  # bytes/s of a device, one way: fourth generation, NDR; share of it that is reached
LAYOUTS = (
    (8, 1),
    (64, 1),
    (64, 8),
    (512, 1),
    (512, 8),
    (512, 64),
)  # devices, and copies of the model


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends, and seconds that it takes where nothing of it is hidden behind
    computing.
    """

    gathered: float
    reduced: float
    between_copies: float
    seconds: float


def network_table(layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> Table:
    table = Table(
        title=f"Llama-3-8B, {GPU}, one sequence of 8,192 tokens a device and step",
        title_justify="left",
    )
    columns = (
        "GPUs",
        "copies",
        "lasting GiB",
        "peak GiB",
        "gathered GB",
        "reduced GB",
        "between copies GB",
        "s on the way",
    )
    for column in (*columns, f"s computing at {MFU:.0%}", "M tokens/s at 100% MFU"):
        table.add_column(column, justify="right")
    for devices, replicas in layouts:
        config = layout(devices, replicas)
        needs, sent = training_needs(config), traffic(config)
        table.add_row(
            f"{devices}",
            f"{replicas}",
            f"{needs.memory.lasting / 2**30:.1f}",
            f"{needs.memory.peak / 2**30:.1f}",
            *(f"{size / 1e9:.1f}" for size in (sent.gathered, sent.reduced, sent.between_copies)),
            f"{sent.seconds:.2f}",
            f"{computing(needs, devices):.2f}",
            f"{devices * peak() / needs.flops_per_token / 1e6:.2f}",
        )
    return table


def layout(devices: int, replicas: int) -> Config:
    """The recipe of the paper's 8B model, on so many devices, a sequence of its whole window on
    each.
    """
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
    """Of one micro-batch, which is a step."""
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
    across = NVLINK if world_size(config.trainer) <= DEVICES_OF_A_NODE else INFINIBAND
    return Traffic(
        gathered, reduced, between, ((gathered + reduced) / within + between / across) / SHARE
    )


def computing(needs: Needs, devices: int) -> float:
    """Seconds of a step."""
    return needs.flops_per_token * needs.tokens_per_step / (devices * peak() * MFU)


def peak() -> float:
    found = named_peak(GPU)
    assert found is not None
    return found
