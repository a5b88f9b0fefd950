"""A finished evaluation on Weights & Biases, as a run of its own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.config import Config
from ipt.evaluation.results import PREDICTIONS, RESULTS, load_results, read_predictions
from ipt.evaluation.tables import MARKDOWN
from ipt.pipeline.tracking.lineage import artifact_name, stage_artifact, use
from ipt.stage import MANIFEST
from ipt.training.logger import build_loggers

if TYPE_CHECKING:
    import wandb

SHOWN = 100  # predictions of a task in the table; all of them are in the artifact


def log_evaluation(config: Config, folder: Path, identity: str, name: str = "evaluation") -> None:
    """With `logger=wandb`: figures, a table of them, one of predictions, and an artifact with
    results.md and all predictions.

    `identity` is what tells the model from others. Where it was trained with W&B, that run is named
    in `trained_by` of this one's config, and the model's artifact is the run's input. The same
    evaluation given again goes on under the same run. Offline all of it is on disk.
    """
    trained = Path(config.model).parent
    trained_by = trained / ".wandb_id"
    lineage: dict[str, Any] = {"model": config.model, "model_identity": identity}
    lineage["trained_by"] = trained_by.read_text(encoding="utf-8") if trained_by.exists() else None
    model = trained if (trained / MANIFEST).exists() else None
    lineage["made_from"] = [artifact_name(model)] if model else []
    for logger in build_loggers(config, name, folder, None):
        logger.send(_log_results, folder, lineage)
        if model:
            logger.send(lambda run: use(run, stage_artifact(model, config.logger.upload)))
        logger.send(_log_artifact, folder, lineage)
        logger.close()


def _log_results(run: "wandb.Run", folder: Path, lineage: dict[str, Any]) -> None:
    import wandb

    results = load_results(folder)
    run.config.update(lineage, allow_val_change=True)
    entries = [
        (task, metric, entry)
        for task, metrics in results.items()
        for metric, entry in metrics.items()
    ]
    run.summary.update({f"{task}/{metric}": entry["value"] for task, metric, entry in entries})
    figures = [
        [task, metric, entry["value"], entry["stderr"], *entry["ci95"], entry["n"]]
        for task, metric, entry in entries
    ]
    shown = [
        [task, row["id"], json.dumps(row, ensure_ascii=False)]
        for task in results
        for row in read_predictions(folder, task)[:SHOWN]
    ]
    run.log(
        {
            "results": wandb.Table(
                ["task", "metric", "value", "stderr", "low", "high", "n"], figures
            ),
            "predictions": wandb.Table(["task", "id", "prediction"], shown),
        }
    )


def _log_artifact(run: "wandb.Run", folder: Path, lineage: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata=lineage)
    for name in (MARKDOWN, RESULTS):
        artifact.add_file(str(folder / name))
    artifact.add_dir(str(folder / PREDICTIONS), name=PREDICTIONS)
    run.log_artifact(artifact)
