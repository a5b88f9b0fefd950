"""The training stage: token stores and a mixture in, a trained model and metrics out."""

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
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy

from ipt.config import Config, TrainerConfig
from ipt.console import console
from ipt.distributed import rank
from ipt.files import read_json_lines, write_json
from ipt.mixture.batches import PackedDataModule, PackedLoader, PackedSequences
from ipt.mixture.plan import Plan, make_plan
from ipt.mixture.report import plan_report
from ipt.mixture.schedule import used_sources
from ipt.mixture.stores import open_stores
from ipt.mixture.table import mixture_table
from ipt.models.limits import check_model_limits
from ipt.training.checkpoint.callback import Checkpoints
from ipt.training.checkpoint.remote import fetch
from ipt.training.checkpoint.signals import REQUEUE, Stopped, requeue_job
from ipt.training.checkpoint.storage import METRICS
from ipt.training.logger import run_id
from ipt.training.metrics import Score, StepMetrics, flops_per_token
from ipt.training.module import PretrainingModule
from ipt.training.parallelize import uses_fsdp
from ipt.training.run_key import run_key
from ipt.training.validation import slurm_tasks

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

# Writes a trained model to a folder: model, config, output folder, the mixture's report of sources.
# All processes call it.
Export = Callable[[Any, Config, Path, Mapping[str, Any]], None]

log = logging.getLogger(__name__)


def train(
    config: Config,
    stores: Mapping[str, str | Path],
    output: Path,
    make_loggers: Callable[[], list[Any]] | None = None,
    score: Score | None = None,
    export: Export | None = None,
) -> dict[str, Any]:
    """Train `config.model` on `config.mixture`; write checkpoints, `metrics.jsonl` and
    `summary.json` to `output`, and call `export` at the end. Returns the summary.

    `stores` has a token store for each source of the mixture. An interrupted run resumes from its
    newest complete checkpoint in `output/checkpoints` or else in `checkpoint.url`, with the same
    batches in the same order; if its last step is saved, only the export is written. `make_loggers`
    is called after that checkpoint was fetched, and `score` after each optimizer step. Raises
    Stopped after SIGTERM or SIGUSR1, and KeyboardInterrupt.
    """
    _quiet_libraries()
    L.seed_everything(config.seed, verbose=False)

    sequences = _sequences(config, stores)
    plan = sequences.plan
    report = plan_report(plan)
    if rank() == 0:
        console.print(mixture_table(report))

    output.mkdir(parents=True, exist_ok=True)
    module = PretrainingModule(config, plan.sources)
    checkpoints = _checkpoints(config, report, output)
    data = ResumableData(sequences, config.trainer, checkpoints)
    tokens_per_step = plan.tokens // config.trainer.max_steps
    metrics = StepMetrics(output / METRICS, config.trainer, tokens_per_step, score)
    # In this order, so that a checkpoint has the metrics of its own step.
    callbacks = [metrics, checkpoints]
    trainer = _trainer(config.trainer, output, callbacks, make_loggers() if make_loggers else [])
    _fit(trainer, module, data, checkpoints)

    seconds = checkpoints.seconds()
    if export is not None:
        export(module.model, config, output, report["sources"])
    summary = _summary(config, plan, module, report, seconds, output)
    if trainer.is_global_zero:
        uploads = {"failed_uploads": checkpoints.failed_uploads}
        write_json(output / "summary.json", summary | uploads)
        if not config.checkpoint.keep_after_training:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return summary


def _quiet_libraries() -> None:
    """Hide informational records and warnings of Lightning and torch's checkpoints."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        library = logging.getLogger(name)
        if library.level == logging.INFO:  # set by Lightning when it is imported
            library.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")


def _sequences(config: Config, stores: Mapping[str, str | Path]) -> PackedSequences:
    """The packed sequences of all steps of the run."""
    lengths: dict[str, int | None] = {"mixture.seq_len": config.mixture.seq_len}
    limits = check_model_limits(config.model, config.architecture, lengths)
    used = {name: stores[name] for name in used_sources(config.mixture)}
    opened = open_stores(used, config.tokens.cache_gib)
    count = config.trainer.max_steps * config.trainer.global_batch_size
    plan = make_plan(opened, config.mixture, count, config.seed)
    in_order = [opened[name] for name in plan.sources]
    return PackedSequences(plan, in_order, limits.vocabulary if limits else None)


class ResumableData(PackedDataModule):
    """The packed batches, starting after the sequences that the resumed checkpoint has seen."""

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


def _checkpoints(config: Config, report: dict[str, Any], output: Path) -> Checkpoints:
    """The run's checkpoints; fetches the newest one if there is none on this machine."""
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
    trainer: L.Trainer, module: PretrainingModule, data: ResumableData, checkpoints: Checkpoints
) -> None:
    """Train to the last step. Raises Stopped after a signal, KeyboardInterrupt after Ctrl-C."""
    try:
        trainer.fit(module, data)
    except SystemExit:  # Lightning turns Ctrl-C into SystemExit
        raise KeyboardInterrupt from None
    if checkpoints.stopped_by is None:
        return
    trainer.strategy.barrier()  # no process may exit before the checkpoint is complete
    if trainer.is_global_zero:
        log.info(
            "%s: saved after step %s; run the same command again to resume",
            checkpoints.stopped_by,
            trainer.global_step,
        )
        if checkpoints.stopped_by == REQUEUE.name:
            requeue_job()
    raise Stopped


def _trainer(
    config: TrainerConfig, output: Path, callbacks: list[Callback], loggers: list[Any]
) -> L.Trainer:
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        max_steps=config.max_steps,
        max_epochs=1,
        plugins=cluster_environment(config),
        **_strategy_and_precision(config),
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=loggers,
        profiler=_profiler(config, output),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def _strategy_and_precision(config: TrainerConfig) -> dict[str, Any]:
    """FSDP2 has its own mixed precision (ipt.training.parallelize), so Lightning's is off then."""
    if uses_fsdp(config, torch.cuda.is_available()):
        strategy = ModelParallelStrategy(config.world_size, tensor_parallel_size=1)
        return {"strategy": strategy, "precision": "32-true"}
    precision = "bf16-mixed" if config.bf16_arithmetic else "32-true"
    return {"strategy": "auto", "precision": precision}


def _profiler(config: TrainerConfig, output: Path) -> Profiler | None:
    if config.profiler is None:
        return None
    return PROFILERS[config.profiler](dirpath=output / "profile", filename=config.profiler)


def cluster_environment(config: TrainerConfig) -> ClusterEnvironment | None:
    """The environment that started the processes; None lets Lightning detect it.

    A single process ignores cluster variables, which may describe a larger job. Lightning does not
    detect processes that `srun` started from a shell of `salloc`.
    """
    if config.world_size == 1:
        return LightningEnvironment()
    if "WORLD_SIZE" not in os.environ and slurm_tasks() > 1:
        return SLURMEnvironment()
    return None


def _summary(
    config: Config,
    plan: Plan,
    module: PretrainingModule,
    report: dict[str, Any],
    seconds: float,
    output: Path,
) -> dict[str, Any]:
    steps = read_json_lines(output / METRICS)
    targets = 0
    for step in steps:
        targets += sum(step.get(f"tokens/{name}", 0) for name in plan.sources)
    return {
        "steps": config.trainer.max_steps,
        "tokens": plan.tokens,
        "target_tokens": targets,
        "sources": report["sources"],
        "mixture": {name: value for name, value in report.items() if name != "sources"},
        "final_loss": steps[-1]["loss"],
        "attention": module.attention,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "flops": flops_per_token(module.model, plan.seq_len) * len(plan) * plan.seq_len,
        "seconds": round(seconds, 1),
    }
