"""The training stage: token stores and a mixture in, a Hugging Face folder and metrics out."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from ipt.config import Config, TrainerConfig
from ipt.console import console
from ipt.mixture.batches import PackedDataModule, PackedSequences
from ipt.mixture.plan import Plan, make_plan
from ipt.mixture.table import mixture_table
from ipt.stage import write_json
from ipt.tokens.store import TokenStore
from ipt.training.callbacks import StepMetrics
from ipt.training.export import export
from ipt.training.flops import flops_per_token
from ipt.training.module import PretrainingModule


def train(
    config: Config, stores: Mapping[str, Path], ratios: Mapping[str, float], output: Path, loggers: list[Any] | None = None
) -> dict[str, Any]:
    """Train `config.model` on the mixture and write `export/`, `metrics.jsonl` and `summary.json` to `output`.

    `stores` are the token stores of the sources, `ratios` their shares (they sum to 1). A run that was interrupted goes on
    from its last checkpoint in `output/checkpoints`, with the same batches in the same order. Returns the summary.
    """
    _quiet_libraries()
    L.seed_everything(config.seed, verbose=False)
    opened = {name: TokenStore(folder) for name, folder in stores.items() if ratios[name] > 0}
    plan = _plan(config, opened, ratios)
    report = plan.report()
    console.print(mixture_table(report))
    data = PackedDataModule(
        PackedSequences(plan, [opened[name] for name in plan.sources]), config.trainer.micro_batch_size, config.trainer.accumulate
    )
    module = PretrainingModule(config, plan.sources)
    output.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config.trainer, output, plan.seq_len * _global_batch(config.trainer), loggers or [])
    started = time.monotonic()
    trainer.fit(module, data, ckpt_path=_last_checkpoint(output / "checkpoints"), weights_only=True)
    if trainer.global_step < config.trainer.max_steps:
        raise KeyboardInterrupt  # Lightning swallows it; whoever waits for this stage must not take it for finished
    summary = _summary(config, plan, module, report, time.monotonic() - started, output)
    export(module.model, config, output, report)
    if trainer.is_global_zero:
        write_json(output / "summary.json", summary)
        if not config.trainer.keep_checkpoints:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return summary


def _quiet_libraries() -> None:
    """Keep what libraries say about themselves out of the terminal; errors still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a file appears whole; a sharded folder is whole once it has its `meta.pt`, written last."""
    whole = [path for path in folder.glob("*.ckpt") if path.is_file() or (path / "meta.pt").exists()]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _plan(config: Config, stores: Mapping[str, TokenStore], ratios: Mapping[str, float]) -> Plan:
    fingerprints = {name: store.fingerprint for name, store in stores.items()}
    if len(set(fingerprints.values())) > 1:
        raise ValueError(f"the token stores were made with different tokenizers: {fingerprints}")
    lengths = {name: store.lengths for name, store in stores.items()}
    sequences = config.trainer.max_steps * _global_batch(config.trainer)
    plan = make_plan(lengths, ratios, config.mixture.seq_len, sequences, config.seed)
    for name, row in plan.report().items():
        limit = config.mixture.max_repeats.get(name)
        if limit is not None and row["repeats"] > limit:
            raise ValueError(
                f"mixture.max_repeats.{name}={limit}: this run would read source {name} {row['repeats']:.2f} times; "
                "lower its ratio, take fewer steps or allow more repeats"
            )
    return plan


def _global_batch(config: TrainerConfig) -> int:
    """Sequences of one optimizer step over all devices."""
    return config.micro_batch_size * config.accumulate * config.devices * config.num_nodes


def _trainer(config: TrainerConfig, output: Path, tokens_per_step: int, loggers: list[Any]) -> L.Trainer:
    fsdp = _uses_fsdp(config)
    checkpoint = ModelCheckpoint(
        output / "checkpoints",
        filename="{step:08d}",
        enable_version_counter=False,
        every_n_train_steps=config.checkpoint_steps,
        train_time_interval=None if config.checkpoint_steps else timedelta(minutes=config.checkpoint_minutes),
    )
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=ModelParallelStrategy(config.devices * config.num_nodes, 1) if fsdp else "auto",
        precision="bf16-mixed" if config.precision == "bf16" and not fsdp else "32-true",
        max_steps=config.max_steps,
        max_epochs=1,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip,
        use_distributed_sampler=False,
        callbacks=[StepMetrics(output / "metrics.jsonl", config.max_steps, tokens_per_step, config.log_every), checkpoint],
        logger=loggers,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _uses_fsdp(config: TrainerConfig) -> bool:
    """FSDP2 on GPUs, one of them included, so that one and many do the same arithmetic, and wherever there are several processes."""
    if config.strategy == "auto":
        return config.devices * config.num_nodes > 1 or (config.accelerator != "cpu" and torch.cuda.is_available())
    return config.strategy == "fsdp2"


def _summary(config: Config, plan: Plan, module: PretrainingModule, report: dict[str, Any], seconds: float, output: Path) -> dict[str, Any]:
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokens = len(plan) * plan.seq_len
    return {
        "steps": config.trainer.max_steps,
        "tokens": tokens,
        "target_tokens": sum(value for step in steps for name, value in step.items() if name.startswith("tokens/")),
        "sources": report,
        "final_loss": steps[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "flops": flops_per_token(module.model, plan.seq_len) * tokens,
        "seconds": round(seconds, 1),
    }
