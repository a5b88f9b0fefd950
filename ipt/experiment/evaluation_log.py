"""A finished evaluation on Weights & Biases, as a run of its own."""

import json
from pathlib import Path

from ipt.config import Config
from ipt.evaluation.results import PREDICTIONS, RESULTS, load_results, read_predictions
from ipt.evaluation.tables import MARKDOWN
from ipt.training.logger import build_loggers

SHOWN = 100  # predictions of a task in the table; all of them are in the artifact


def log_evaluation(config: Config, folder: Path, identity: str) -> None:
    """With `logger=wandb`: figures, a table of them, one of predictions, and an artifact with results.md and all predictions.

    `identity` is what tells the model from others. Where it was trained with W&B, that run is named in `trained_by` of this
    one's config. The same evaluation given again goes on under the same run. Offline all of it is on disk.
    """
    loggers = build_loggers(config, "evaluation", folder, None)
    if not loggers:
        return
    import wandb

    run, results = loggers[0].experiment, load_results(folder)
    trained_by = Path(config.model).parent / ".wandb_id"
    lineage = {"model_identity": identity, "trained_by": trained_by.read_text() if trained_by.exists() else None}
    run.config.update(lineage, allow_val_change=True)
    entries = [(task, metric, entry) for task, metrics in results.items() for metric, entry in metrics.items()]
    run.summary.update({f"{task}/{metric}": entry["value"] for task, metric, entry in entries})
    figures = [[task, metric, entry["value"], entry["stderr"], *entry["ci95"], entry["n"]] for task, metric, entry in entries]
    shown = [[task, row["id"], json.dumps(row, ensure_ascii=False)] for task in results for row in read_predictions(folder, task)[:SHOWN]]
    run.log(
        {
            "results": wandb.Table(["task", "metric", "value", "stderr", "low", "high", "n"], figures),
            "predictions": wandb.Table(["task", "id", "prediction"], shown),
        }
    )
    artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata={"model": config.model, **lineage})
    for name in (MARKDOWN, RESULTS):
        artifact.add_file(str(folder / name))
    artifact.add_dir(str(folder / PREDICTIONS), name=PREDICTIONS)
    run.log_artifact(artifact)
    run.finish()
