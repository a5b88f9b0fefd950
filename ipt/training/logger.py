"""Weights & Biases through Lightning's logger."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ipt.config import Config
from ipt.console import console
from ipt.distributed import rank
from ipt.stage import STATS
from ipt.training.checkpoint.storage import read_facts, whole_checkpoints
from ipt.training.wandb_mode import DISABLED, OFFLINE, wandb_mode

if TYPE_CHECKING:
    from ipt.training.wandb_run import WandbRun


def build_loggers(config: Config, name: str, output: Path, pairs: Path | None) -> "list[WandbRun]":
    """The loggers of a training run. With `logger=wandb`: config, curves over tokens, a table of
    pairs, and their figures.

    The run's id is kept in `output`, so a resumed run goes on in W&B too. Without a key the run is
    offline, complete on disk, and `wandb sync` uploads it later; see `wandb_mode` for what else
    decides. Only the first process has a logger.
    """
    if config.logger.name == "none" or rank() > 0:
        return []
    chosen = wandb_mode(config.logger.offline)
    if chosen.reason:
        console.print(f"W&B: {chosen.reason}", highlight=False, markup=False, soft_wrap=True)
    if chosen.mode == DISABLED:
        return []
    if chosen.reason:  # W&B is not to stumble over the same files
        os.environ.update({"WANDB_CONFIG_DIR": str(output), "WANDB_DIR": str(output)})
    from ipt.training.wandb_run import open_run

    identity = {
        "name": f"{config.name} {name}",
        "id": run_id(output),
        "group": config.logger.group or config.name,
    }
    job_type = name.partition(" ")[0]
    run = open_run(
        config.logger,
        output,
        chosen.mode == OFFLINE,
        **identity,
        job_type=job_type,
        config=asdict(config),
    )
    if run is None:
        return []
    run.send(lambda run: run.define_metric("*", step_metric="tokens"))
    if pairs is not None:
        run.send(_log_pairs, pairs, config.seed)
    return [run]


def log_figures(run: Any, values: dict[str, Any], prefix: str) -> None:
    """The numbers among nested `values`, by their path below `prefix`, in the run's summary."""
    run.summary.update(_figures(values, prefix))


def _log_pairs(run: Any, pairs: Path, seed: int) -> None:
    """A table of examples, and the figures of the stage that the pairs come from as `synthesis/...`
    in the run's summary.
    """
    import wandb

    from ipt.synthesis.quality.statistics import examples

    rows: list[list[str]] = []
    for row in examples(pairs, 8, seed):
        rows += [
            [row["doc_id"], row["text"], pair["question"], pair["answer"], ""]
            for pair in row["pairs"]
        ]
        rows += [[row["doc_id"], row["text"], "", "", row["rewrite"]]] if row["rewrite"] else []
    run.log({"pairs": wandb.Table(["doc_id", "document", "question", "answer", "rewrite"], rows)})
    stats = pairs.parent / STATS
    if stats.exists():
        log_figures(run, json.loads(stats.read_text(encoding="utf-8")), "synthesis")


def _figures(stats: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers among statistics, by their path; no histograms, and no counts of texts."""
    figures: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, dict) and name not in ("histograms", "frames", "tasks"):
            figures |= _figures(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            figures[f"{prefix}/{name}"] = value
    return figures


def run_id(output: Path) -> str | None:
    """The run's id, drawn once: a resumed run goes on under it, on another machine too, where its
    checkpoint knows it.

    None in all processes but the first, which is the only one that logs.
    """
    if rank() > 0:
        return None
    path = output / ".wandb_id"
    if not path.exists():
        newest = next(reversed(whole_checkpoints(output / "checkpoints")), None)
        known = read_facts(newest)["about"].get("wandb_id") if newest else None
        path.write_text(known or uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")
