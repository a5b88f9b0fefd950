"""The training stage: token stores and a mixture in, a Hugging Face folder and metrics out."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from ipt.config import Config, TrainerConfig
from ipt.console import console
from ipt.distributed import rank
from ipt.export.folder import check_export
from ipt.export.huggingface import export
from ipt.files import read_json_lines, write_json
from ipt.mixture.batches import PackedDataModule, PackedLoader, PackedSequences
from ipt.mixture.plan import Plan, make_plan
from ipt.mixture.report import plan_report
from ipt.mixture.schedule import used_sources
from ipt.mixture.stores import open_stores
from ipt.mixture.table import mixture_table
from ipt.model_limits import check_model_limits
from ipt.training.checkpoint.callback import Checkpoints
from ipt.training.checkpoint.remote import fetch
from ipt.training.checkpoint.signals import REQUEUE, Stopped, requeue_job
from ipt.training.checkpoint.storage import METRICS
from ipt.training.flops import flops_per_token
from ipt.training.logger import run_id
from ipt.training.metrics import Score, StepMetrics
from ipt.training.module import PretrainingModule
from ipt.training.profile import TorchProfile
from ipt.training.run_key import global_batch, run_key
from ipt.training.validation import slurm_tasks


def train(
    config: Config,
    stores: Mapping[str, str | Path],
    output: Path,
    make_loggers: Callable[[], list[Any]] | None = None,
    score: Score | None = None,
) -> dict[str, Any]:
    """Train `config.model` on `config.mixture` and write `export/`, `metrics.jsonl` and
    `summary.json` to `output`.

    `stores` are the token stores of the sources that the mixture uses. A run that was interrupted
    goes on from its newest whole checkpoint in `output/checkpoints`, or else in
    `checkpoint.url`, with the same batches in the same order. A run whose last step is
    saved, as after an export that failed, only writes the export. Loggers are made once that is
    known. `score` is asked after each step for scores of the model, which are kept with the step's
    metrics. Returns the summary. Raises Stopped when a signal has ended the run, and
    KeyboardInterrupt.
    """
    _quiet_libraries()
    L.seed_everything(config.seed, verbose=False)
    check_export(config)
    limits = check_model_limits(
        config.model, config.architecture, {"mixture.seq_len": config.mixture.seq_len}
    )
    opened = open_stores(
        {name: stores[name] for name in used_sources(config.mixture)}, config.tokens.cache_gib
    )
    plan = make_plan(
        opened, config.mixture, config.trainer.max_steps * global_batch(config.trainer), config.seed
    )
    report = plan_report(plan)
    if rank() == 0:
        console.print(mixture_table(report))
    vocabulary = limits.vocabulary if limits else None
    sequences = PackedSequences(plan, [opened[name] for name in plan.sources], vocabulary)
    module = PretrainingModule(config, plan.sources)
    output.mkdir(parents=True, exist_ok=True)
    checkpoints = _checkpoints(config, report, output)
    data = PositionedData(sequences, config.trainer, checkpoints)
    trainer = _trainer(
        config.trainer,
        output,
        plan.tokens // config.trainer.max_steps,
        checkpoints,
        make_loggers,
        score,
    )
    _fit(trainer, module, data, checkpoints)
    seconds = checkpoints.seconds()
    export(module.model, config, output, report["sources"])
    summary = _summary(config, plan, module, report, seconds, output)
    if trainer.is_global_zero:
        write_json(
            output / "summary.json", {**summary, "failed_uploads": checkpoints.failed_uploads}
        )
        if not config.checkpoint.keep_after_training:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return summary


class PositionedData(PackedDataModule):
    """The data of a run, from where its checkpoint left off."""

    def __init__(
        self, sequences: PackedSequences, config: TrainerConfig, checkpoints: Checkpoints
    ) -> None:
        super().__init__(
            sequences, config.micro_batch_size, config.accumulate_grad_batches, config.num_workers
        )
        self.checkpoints = checkpoints

    def train_dataloader(self) -> PackedLoader:
        loader = super().train_dataloader()
        loader.load_state_dict({"taken": self.checkpoints.sequences})
        return loader


def _quiet_libraries() -> None:
    """Keep what libraries say about themselves out of the terminal; errors still come through."""
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")


def _checkpoints(config: Config, report: dict[str, Any], output: Path) -> Checkpoints:
    """The run's checkpoints, with the newest one fetched if there is none on this machine."""
    url, run = config.checkpoint.url, run_key(config, report["sources"])
    remote = f"{url.rstrip('/')}/{config.name}-{run[:12]}" if url else None
    if remote:
        fetch(remote, output / "checkpoints")
    about = {
        "sources": report["sources"],
        "wandb_id": run_id(output) if config.loggers else None,
    }
    return Checkpoints(output, run, about, remote)


def _fit(
    trainer: L.Trainer, module: PretrainingModule, data: PositionedData, checkpoints: Checkpoints
) -> None:
    """Train to the end. Raises Stopped after a signal, KeyboardInterrupt after Ctrl-C."""
    try:
        trainer.fit(module, data)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if checkpoints.stopped_by is None:
        return
    trainer.strategy.barrier()  # the checkpoint is whole: no process may end before that
    if trainer.is_global_zero:
        console.print(
            f"{checkpoints.stopped_by}: saved after step {trainer.global_step}; the same command "
            "goes on from there"
        )
        if checkpoints.stopped_by == REQUEUE.name:
            requeue_job()
    raise Stopped


def _trainer(
    config: TrainerConfig,
    output: Path,
    tokens_per_step: int,
    checkpoints: Checkpoints,
    make_loggers: Callable[[], list[Any]] | None,
    score: Score | None,
) -> L.Trainer:
    fsdp = _uses_fsdp(config)
    metrics = StepMetrics(
        output / METRICS, config.max_steps, tokens_per_step, config.log_every_n_steps, score
    )
    profiles = (
        [TorchProfile(output / "profile", config.max_steps)] if config.profiler == "torch" else []
    )
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        plugins=cluster_environment(config),
        strategy=ModelParallelStrategy(config.devices * config.num_nodes, 1) if fsdp else "auto",
        precision="bf16-mixed" if config.bf16_arithmetic and not fsdp else "32-true",
        max_steps=config.max_steps,
        max_epochs=1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.gradient_clip_val,
        use_distributed_sampler=False,
        callbacks=[
            metrics,
            checkpoints,
            *profiles,
        ],  # in this order: a checkpoint holds the metrics of its own step
        logger=make_loggers() if make_loggers else [],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def cluster_environment(config: TrainerConfig) -> ClusterEnvironment | None:
    """Who started the processes. A single process asks no cluster, whose variables may describe a
    larger job.

    Several are found out by Lightning (None), apart from those of `srun` in a shell that `salloc`
    opened.
    """
    if config.devices * config.num_nodes == 1:
        return LightningEnvironment()
    if "WORLD_SIZE" not in os.environ and slurm_tasks() > 1:
        return SLURMEnvironment()
    return None


def _uses_fsdp(config: TrainerConfig) -> bool:
    """FSDP2 on GPUs, one of them included, so that one and many do the same arithmetic, and
    wherever there are several processes.
    """
    if config.strategy == "auto":
        return config.devices * config.num_nodes > 1 or (
            config.accelerator != "cpu" and torch.cuda.is_available()
        )
    return config.strategy == "fsdp2"


def _summary(
    config: Config,
    plan: Plan,
    module: PretrainingModule,
    report: dict[str, Any],
    seconds: float,
    output: Path,
) -> dict[str, Any]:
    steps = read_json_lines(output / "metrics.jsonl")
    return {
        "steps": config.trainer.max_steps,
        "tokens": plan.tokens,
        "target_tokens": sum(
            value for step in steps for name, value in step.items() if name.startswith("tokens/")
        ),
        "sources": report["sources"],
        "mixture": {name: value for name, value in report.items() if name != "sources"},
        "final_loss": steps[-1]["loss"],
        "attention": module.attention,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "flops": flops_per_token(module.model, plan.seq_len) * len(plan) * plan.seq_len,
        "seconds": round(seconds, 1),
    }
