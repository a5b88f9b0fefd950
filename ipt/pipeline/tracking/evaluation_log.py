"""A finished evaluation as a run of its own in the loggers."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from ipt.config import Config
from ipt.evaluation.results import PREDICTIONS, RESULTS, load_results, read_predictions
from ipt.evaluation.tables import MARKDOWN
from ipt.pipeline.tracking.lineage import (
    artifact_name,
    stage_artifact,
    uploads_model,
    use_artifacts,
)
from ipt.stage import MANIFEST
from ipt.training.logger import RUN_ID, open_loggers, tolerating, wandb_loggers

# predictions per task in the table; the artifact has all of them
SHOWN = 100


def log_evaluation(config: Config, folder: Path, identity: str, name: str = "evaluation") -> None:
    """Log scores, and to W&B also tables, results.md and all predictions.

    `identity` is the model's. If this machine trained the model with W&B, `trained_by` in the
    config of the run is the W&B run of the training, and the model's artifact is an input.
    """
    trained = Path(config.model).parent
    run_id = trained / RUN_ID
    is_stage = (trained / MANIFEST).exists()
    lineage = {
        "model": config.model,
        "model_identity": identity,
        "trained_by": run_id.read_text(encoding="utf-8") if run_id.exists() else None,
        "made_from": [artifact_name(trained)] if is_stage else [],
    }
    with open_loggers(config, name, folder) as loggers:
        _log_scores(loggers, folder, lineage)
        for logger in wandb_loggers(loggers):
            with tolerating(logger):
                _log_tables(logger, folder)
                if is_stage:
                    model = stage_artifact(trained, upload=uploads_model(config))
                    use_artifacts(logger.experiment, [model])
                _log_artifact(logger, folder, lineage)


def _log_scores(loggers: list[Logger], folder: Path, lineage: dict[str, Any]) -> None:
    scores: dict[str, float] = {}
    for task, metrics in load_results(folder).items():
        scores |= {f"{task}/{metric}": entry["value"] for metric, entry in metrics.items()}
    for logger in loggers:
        with tolerating(logger):
            logger.log_hyperparams(lineage)
            logger.log_metrics(scores)


def _log_tables(logger: WandbLogger, folder: Path) -> None:
    results: list[list[Any]] = []
    shown: list[list[str]] = []
    for task, metrics in load_results(folder).items():
        for metric, entry in metrics.items():
            figures = [entry["value"], entry["stderr"], *entry["ci95"], entry["n"]]
            results.append([task, metric, *figures])
        for row in read_predictions(folder, task)[:SHOWN]:
            shown.append([task, row["id"], json.dumps(row, ensure_ascii=False)])
    columns = ["task", "metric", "value", "stderr", "low", "high", "n"]
    logger.log_table("results", columns, results)
    logger.log_table("predictions", ["task", "id", "prediction"], shown)


def _log_artifact(logger: WandbLogger, folder: Path, lineage: dict[str, Any]) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata=lineage)
    for name in (MARKDOWN, RESULTS):
        artifact.add_file(str(folder / name), policy="immutable", skip_cache=True)
    artifact.add_dir(
        str(folder / PREDICTIONS), name=PREDICTIONS, policy="immutable", skip_cache=True
    )
    run.log_artifact(artifact)
