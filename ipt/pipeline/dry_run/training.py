"""What a training needs: data, memory, time and disk space. Needs no GPU, weights or network."""

import logging
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from ipt.config import Config
from ipt.console import console
from ipt.errors import UserError
from ipt.mixture.schedule import read_schedule
from ipt.pipeline.dry_run.inputs import FETCHED, HERE, Input, training_inputs
from ipt.training.memory_estimate import (
    GPU_MEMORY,
    RESERVE,
    Memory,
    memory_model,
    shard_count,
    training_memory,
)
from ipt.training.metrics import CONVENTION, flops_per_token, named_peak
from ipt.training.validation import check_training

# limits of the suggestions if memory is insufficient
DEVICES_OF_A_NODE, MOST_DEVICES = 8, 64
COLOURS = {HERE: "green", FETCHED: "yellow"}


@dataclass(frozen=True)
class Needs:
    """Figures of a training; bytes, seconds, and FLOPs by the convention of
    ipt.training.metrics.
    """

    parameters: int
    embedding: int  # parameters of the input embedding
    trainable: int
    sequences_per_step: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    memory: Memory  # of one device
    room: int | None  # memory of one device; None: not known
    seconds: float | None  # None: the device's peak rate is not known
    checkpoint: int
    export: int

    @property
    def fits(self) -> bool:
        return self.room is None or self.memory.peak + RESERVE <= self.room


def dry_run(config: Config) -> None:
    """Print what the training of `config` needs, which inputs are missing, and whether it fits.

    Raises UserError for an invalid config and for a model whose shape is not known.
    """
    check_training(config)
    _check_keys(config)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that there is no GPU
    inputs = training_inputs(config)
    needs = training_needs(config)
    console.rule(f"dry run of {config.name}")
    console.print(_inputs_table(inputs))
    console.print(_mixture_table(config, needs, inputs))
    console.print(_facts_table(config, needs))
    console.print(_memory_table(config, needs))
    _print_verdict(config, needs, inputs)
    if config.arms:
        console.print(
            f"arms of `python -m ipt reproduce experiment={config.name}`: {', '.join(config.arms)}",
            soft_wrap=True,
        )


def training_needs(config: Config) -> Needs:
    """Raises UserError if the shape of the model is not known."""
    trainer = config.trainer
    model = memory_model(config)
    memory = training_memory(model, config)
    sequences = trainer.global_batch_size
    tokens = sequences * config.mixture.seq_len * trainer.max_steps
    parameters = list(model.parameters())
    flops, peak = (
        flops_per_token(model, config.mixture.seq_len),
        None if _on_cpu(config) else named_peak(config.dry_run_gpu),
    )
    saved = [
        parameter for parameter in parameters if parameter.requires_grad or config.architecture
    ]
    return Needs(
        parameters=sum(parameter.numel() for parameter in parameters),
        embedding=model.get_input_embeddings().weight.numel(),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sequences_per_step=sequences,
        tokens_per_step=sequences * config.mixture.seq_len,
        tokens=tokens,
        flops_per_token=flops,
        memory=memory,
        room=_memory_of_this_machine() if _on_cpu(config) else GPU_MEMORY.get(config.dry_run_gpu),
        seconds=flops * tokens / (peak * config.dry_run_mfu * trainer.world_size) if peak else None,
        checkpoint=sum(parameter.nbytes for parameter in saved)
        + memory.optimizer * shard_count(trainer),
        export=sum(parameter.numel() for parameter in parameters)
        * (2 if trainer.export_dtype == "bfloat16" else 4),
    )


def remedies(config: Config) -> Iterator[tuple[str, Needs]]:
    """Changes that reduce the memory, each in addition to the ones before, with the needs after it.
    The last one fits, if any does.
    """
    config = deepcopy(config)
    changes = []
    for change in _changes(config):
        changes.append(change)
        needs = training_needs(config)
        yield " ".join(changes), needs
        if needs.fits:
            return


def _changes(config: Config) -> Iterator[str]:
    """Change `config` step by step and yield the changes. The tokens per step stay the same."""
    trainer = config.trainer
    if trainer.activation_checkpointing != "full":
        trainer.activation_checkpointing = "full"
        yield "trainer.activation_checkpointing=full"
    if trainer.micro_batch_size > 1:
        trainer.accumulate_grad_batches *= trainer.micro_batch_size
        trainer.micro_batch_size = 1
        yield f"trainer.micro_batch_size=1 {_accumulation(config)}"
    if config.optimizer.name == "adamw":
        config.optimizer.name = "adamw_8bit"
        yield "optimizer=adamw_8bit"
    if trainer.precision == "bf16-mixed":
        trainer.precision = "bf16-true"
        yield "trainer.precision=bf16-true"
    while (
        trainer.accumulate_grad_batches % 2 == 0
        and trainer.world_size < MOST_DEVICES
        and not _on_cpu(config)
    ):
        trainer.accumulate_grad_batches //= 2
        if trainer.devices < DEVICES_OF_A_NODE:
            trainer.devices *= 2
            yield f"trainer.devices={trainer.devices} {_accumulation(config)}"
        else:
            trainer.num_nodes *= 2
            yield f"trainer.num_nodes={trainer.num_nodes} {_accumulation(config)}"


def _accumulation(config: Config) -> str:
    return f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}"


# What is printed
# ----------------------------------------------------------------------------------------------


def _inputs_table(inputs: list[Input]) -> Table:
    table = Table("what", "where", "state", title="Inputs", title_justify="left")
    for item in inputs:
        table.add_row(item.what, item.where, f"[{COLOURS.get(item.state, 'red')}]{item.state}[/]")
    return table


def _mixture_table(config: Config, needs: Needs, inputs: list[Input]) -> Table:
    schedule, known = read_schedule(config.mixture), {item.what: item.tokens for item in inputs}
    table = Table(title=f"Mixture, in {config.mixture.unit}", title_justify="left")
    for name in ("source", "ratio", "trained tokens", "unique tokens", "repeats"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, share in zip(schedule.sources, schedule.mean().tolist(), strict=True):
        of_tokens = config.mixture.unit == "tokens"
        tokens, unique = share * needs.tokens, known.get(f"source {source}")
        table.add_row(
            source,
            f"{share:.2%}",
            f"{tokens:,.0f}" if of_tokens else "known once tokenised",
            f"{unique:,}" if unique else "known once tokenised",
            f"{tokens / unique:.2f}" if unique and of_tokens else "",
        )
    return table


def _facts_table(config: Config, needs: Needs) -> Table:
    trainer, flops = config.trainer, needs.flops_per_token * needs.tokens
    table = Table(show_header=False, title="Computation", title_justify="left")
    rows = {
        "parameters": f"{needs.parameters:,} ({needs.embedding:,} in the input embedding)",
        "trained": f"{needs.trainable:,} ({needs.trainable / needs.parameters:.2%})",
        "tokens per step": (
            f"{needs.tokens_per_step:,} = {trainer.world_size} x {trainer.micro_batch_size} x "
            f"{trainer.accumulate_grad_batches} x {config.mixture.seq_len:,} "
            "(devices x micro-batch x accumulation x sequence length)"
        ),
        "tokens": f"{needs.tokens:,} in {trainer.max_steps:,} steps",
        "FLOPs": f"{flops:.3g}, {needs.flops_per_token / 1e9:.1f} G per token: {CONVENTION}",
        "time": _time(config, needs),
        "disk": (
            f"{_gib(needs.checkpoint)} per checkpoint (at most {_checkpoints(config)} at a time), "
            f"{_gib(needs.export)} for the export, 4 bytes per unique token"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _checkpoints(config: Config) -> int:
    """The maximum number of checkpoints on disk, while another one is saved."""
    every = config.checkpoint.keep_every_n_steps
    kept = config.trainer.max_steps // every if every else 0
    return config.checkpoint.keep_last + 1 + kept


def _time(config: Config, needs: Needs) -> str:
    if needs.seconds is None:
        device = "a CPU" if _on_cpu(config) else config.dry_run_gpu
        return f"unknown, because the peak FLOP/s of {device} are not known"
    hours, devices = needs.seconds / 3600, config.trainer.world_size
    note = (
        ""
        if config.trainer.bf16_arithmetic
        else "; this is the peak of bf16, and precision=32-true is many times slower"
    )
    where = f"{devices} {config.dry_run_gpu} at an MFU of {config.dry_run_mfu:.0%}"
    return f"{hours:,.1f} hours on {where} ({hours * devices:,.1f} GPU hours){note}"


def _memory_table(config: Config, needs: Needs) -> Table:
    memory = needs.memory
    table = Table(
        title=f"Memory of one device ({_device(config)}), at the moments of a step",
        title_justify="left",
    )
    table.add_column("part")
    for moment in memory.moments:
        table.add_column(moment.name, justify="right")
    for name in ("weights", "gradients", "optimizer"):
        table.add_row(
            {"optimizer": "optimizer state"}.get(name, name),
            *[_gib(getattr(memory, name))] * len(memory.moments),
        )
    for name in ("whole_weights", "whole_gradients", "activations", "temporary"):
        table.add_row(
            name.replace("_", " "), *(_gib(getattr(moment, name)) for moment in memory.moments)
        )
    table.add_section()
    table.add_row(
        "sum", *(_gib(memory.lasting + moment.total) for moment in memory.moments), style="bold"
    )
    return table


def _print_verdict(config: Config, needs: Needs, inputs: list[Input]) -> None:
    for item in inputs:
        if item.problem:
            console.print(
                f"[red]{item.what} is missing:[/] {escape(item.problem)}",
                highlight=False,
                soft_wrap=True,
            )
    if needs.room is None:
        console.print(
            f"[yellow]the memory of {config.dry_run_gpu} is not known[/]; known GPUs are "
            f"{', '.join(GPU_MEMORY)}"
        )
        return
    required = f"{_gib(needs.memory.peak)} and a reserve of {_gib(RESERVE)}"
    if needs.fits:
        console.print(f"[green]fits[/]: {required}, of {_gib(needs.room)}")
        return
    console.print(
        f"[bold red]does not fit[/]: {required}, of {_gib(needs.room)}. Possible changes:",
        soft_wrap=True,
    )
    fits = False
    for change, changed in remedies(config):
        fits = changed.fits
        verdict = "[green]fits[/]" if fits else "does not fit yet"
        console.print(
            f"  {change}: {_gib(changed.memory.peak)}, {verdict}", highlight=False, soft_wrap=True
        )
    if not fits:
        console.print(
            "  a GPU with more memory, LoRA (lora.rank=16), shorter sequences or a smaller model",
            highlight=False,
        )


def _check_keys(config: Config) -> None:
    if not 0 < config.dry_run_mfu <= 1:
        raise UserError(f"dry_run_mfu={config.dry_run_mfu}: must be above 0 and at most 1")


def _device(config: Config) -> str:
    return "this CPU" if _on_cpu(config) else config.dry_run_gpu


def _on_cpu(config: Config) -> bool:
    return config.trainer.accelerator == "cpu"


def _memory_of_this_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(count: int) -> str:
    if not count:
        return "–"
    return f"{count / (1 << 30):,.1f} GiB" if count >= 1 << 27 else f"{count / (1 << 20):,.1f} MiB"
