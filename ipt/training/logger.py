"""Weights & Biases through Lightning's logger."""

import netrc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import uuid4

from ipt.config import Config, LoggerConfig


def build_loggers(config: Config, name: str, output: Path, pairs: Path | None) -> list[Any]:
    """The loggers of a training run. With `logger=wandb`: config, curves over tokens, and a table of pairs.

    The run's id is kept in `output`, so a resumed run goes on in W&B too. Without a key the run is offline, complete on
    disk, and `wandb sync` uploads it later.
    """
    if config.logger.name == "none":
        return []
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        project=config.logger.project,
        name=f"{config.name} {name}",
        id=_run_id(output),
        resume="allow",
        group=config.logger.group or config.name,
        tags=config.logger.tags,
        save_dir=output,
        mode="offline" if _offline(config.logger) else "online",
        config=asdict(config),
    )
    logger.experiment.define_metric("*", step_metric="tokens")
    if pairs is not None:
        from ipt.synthesis.quality import examples

        rows = [
            [row["doc_id"], row["text"], pair["question"], pair["answer"]]
            for row in examples(pairs, 8, config.seed)
            for pair in row["pairs"]
        ]
        logger.experiment.log({"pairs": wandb.Table(["doc_id", "document", "question", "answer"], rows)})
    return [logger]


def _run_id(output: Path) -> str:
    """The run's id, drawn once: a resumed run goes on under it."""
    path = output / ".wandb_id"
    if not path.exists():
        path.write_text(uuid4().hex[:12])
    return path.read_text()


def _offline(config: LoggerConfig) -> bool:
    return not _has_key() if config.offline is None else config.offline


def _has_key() -> bool:
    """Whether a key is configured, told without asking W&B, which would read its settings too early."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "WANDB_API_KEY" in os.environ or netrc.netrc().authenticators(host) is not None
    except FileNotFoundError:
        return False
