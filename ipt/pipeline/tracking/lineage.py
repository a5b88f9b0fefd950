"""What a training was made of and what it made, as artifacts of its run on Weights & Biases."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.files import read_json
from ipt.stage import MANIFEST, Stage
from ipt.training.logger import log_figures

if TYPE_CHECKING:
    import wandb

    from ipt.pipeline.records import Record
    from ipt.training.wandb_run import WandbRun


def log_training(
    loggers: "Sequence[WandbRun]",
    stages: Sequence[Stage],
    training: Stage,
    record: "Record",
    upload: bool,
) -> None:
    """Log the stages before a finished training, its model, and its record to the training's run,
    and end the run.

    An artifact names those that it was made of in `made_from`. It holds the stage's manifest, with
    the digest of each file, and where the files are; with `upload` the files too.
    """
    folders = [stage.folder for stage in stages if stage.folder != training.folder]
    for logger in loggers:
        logger.send(_log_training, folders, training, record, upload)
        logger.close()


def artifact_name(folder: Path) -> str:
    """The name of a finished stage's artifact: that of its folder where stages are kept."""
    manifest = _manifest(folder)
    return f"{manifest['stage']}-{manifest['key'][:12]}"


def stage_artifact(folder: Path, upload: bool, before: Sequence[Path] = ()) -> "wandb.Artifact":
    """The artifact of the finished stage in `folder`; `before` are the folders of stages that it
    may have been made of.
    """
    import wandb

    manifest = _manifest(folder)
    digests = {_manifest(other)["digest"]: artifact_name(other) for other in before}
    metadata: dict[str, Any] = {
        name: manifest[name] for name in ("digest", "inputs", "seed", "git_commit", "seconds")
    }
    metadata["made_from"] = [
        digests[digest] for digest in manifest["inputs"].values() if digest in digests
    ]
    metadata["bytes"] = sum(file["bytes"] for file in manifest["outputs"].values())
    kind = "model" if manifest["stage"] == "training" else manifest["stage"]
    artifact = wandb.Artifact(artifact_name(folder), type=kind, metadata=metadata)
    artifact.add_file(str(folder / MANIFEST))
    for name in manifest["outputs"]:
        if upload:
            artifact.add_file(str(folder / name), name=name, policy="immutable", skip_cache=True)
        else:
            artifact.add_reference(
                (folder / name).resolve().as_uri(), name=name, checksum=False
            )  # the manifest has the digests
    return artifact


def use(run: "wandb.Run", artifact: "wandb.Artifact") -> None:
    """Log an artifact as an input of the run. Offline W&B knows no inputs: there it is one of the
    run's artifacts like others.
    """
    if run.offline:
        run.log_artifact(artifact)
    else:
        run.use_artifact(artifact)


def _log_training(
    run: "wandb.Run", folders: Sequence[Path], training: Stage, record: "Record", upload: bool
) -> None:
    log_figures(run, record.as_dict(), "record")
    for folder in folders:
        use(run, stage_artifact(folder, upload, folders))
    run.log_artifact(stage_artifact(training.folder, upload, folders))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest
