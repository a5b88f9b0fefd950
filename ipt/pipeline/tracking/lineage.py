"""W&B runs of trainings: the stages that a training was made from, the model, and their figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from ipt.config import Config
from ipt.files import read_json
from ipt.stage import MANIFEST, STATS, Stage
from ipt.synthesis.quality.statistics import examples
from ipt.training.logger import tolerating, wandb_loggers

if TYPE_CHECKING:
    import wandb

    from ipt.pipeline.provenance import Record

EXAMPLES = 8
COLUMNS = ["doc_id", "document", "question", "answer", "rewrite"]


def log_pairs(loggers: Sequence[Logger], pairs: Path, seed: int) -> None:
    """Log a table of examples, and the statistics of the stage that made the pairs."""
    rows: list[list[str]] = []
    for row in examples(pairs, EXAMPLES, seed):
        document = [row["doc_id"], row["text"]]
        rows += [[*document, pair["question"], pair["answer"], ""] for pair in row["pairs"]]
        if row["rewrite"]:
            rows.append([*document, "", "", row["rewrite"]])
    stats = pairs.parent / STATS
    figures = _figures(read_json(stats), "synthesis") if stats.exists() else {}
    for logger in wandb_loggers(loggers):
        with tolerating(logger):
            logger.log_table("pairs", COLUMNS, rows)
            logger.experiment.summary.update(figures)


def log_training(
    config: Config,
    loggers: Sequence[Logger],
    stages: Sequence[Stage],
    training: Stage,
    record: "Record",
) -> None:
    """Log a finished training: its record, the stages before it, and its model as artifacts."""
    folders = [stage.folder for stage in stages if stage.folder != training.folder]
    for logger in wandb_loggers(loggers):
        with tolerating(logger):
            run = logger.experiment
            run.summary.update(_figures(record.as_dict(), "record"))
            use_artifacts(run, [stage_artifact(folder, folders) for folder in folders])
            run.log_artifact(stage_artifact(training.folder, folders, uploads_model(config)))


def uploads_model(config: Config) -> bool:
    """Whether `log_model` of a logger is set."""
    return any(logger.get("log_model") for logger in config.loggers.values())


def artifact_name(folder: Path) -> str:
    """The artifact of a finished stage is named after the stage and its key."""
    manifest = read_json(folder / MANIFEST)
    return f"{manifest['stage']}-{manifest['key'][:12]}"


def stage_artifact(
    folder: Path, before: Sequence[Path] = (), upload: bool = False
) -> "wandb.Artifact":
    """The artifact of the finished stage in `folder`: its manifest, which has the digest of each
    file, and references to the files; with `upload` the files themselves.

    `made_from` in its metadata names the artifacts of the stages it was made from, which are
    searched for in the folders `before`.
    """
    import wandb

    manifest = read_json(folder / MANIFEST)
    names = {read_json(other / MANIFEST)["digest"]: artifact_name(other) for other in before}
    metadata = {key: manifest[key] for key in ("digest", "inputs", "seed", "git_commit", "seconds")}
    metadata["made_from"] = [
        names[digest] for digest in manifest["inputs"].values() if digest in names
    ]
    metadata["bytes"] = sum(file["bytes"] for file in manifest["outputs"].values())
    kind = "model" if manifest["stage"] == "training" else manifest["stage"]
    artifact = wandb.Artifact(artifact_name(folder), type=kind, metadata=metadata)
    # immutable: not copied
    artifact.add_file(str(folder / MANIFEST), policy="immutable", skip_cache=True)
    for name in manifest["outputs"]:
        path = folder / name
        if upload:
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        else:
            artifact.add_reference(path.resolve().as_uri(), name=name, checksum=False)
    return artifact


def use_artifacts(run: "wandb.Run", artifacts: Sequence["wandb.Artifact"]) -> None:
    """Log artifacts as inputs of the run. Offline runs have no inputs; there they are outputs.

    Raises wandb.Error if the server does not answer within `finish_timeout`.
    """
    for artifact in artifacts:
        run.log_artifact(artifact)
    if not (run.offline or run.disabled):
        timeout = math.ceil(run.settings.finish_timeout) or None
        for artifact in artifacts:
            run.use_artifact(artifact.wait(timeout))


def _figures(stats: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers in nested statistics by their path, without histograms and counts of texts."""
    figures: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, dict) and name not in ("histograms", "frames", "tasks"):
            figures |= _figures(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            figures[f"{prefix}/{name}"] = value
    return figures
