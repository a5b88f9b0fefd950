"""Where results come from: the manifest of a run (command, commit, data, versions), and a record of
each arm (tokens and cost).
"""

import csv
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ipt.config import Config
from ipt.files import atomic, hash_file, hash_json, read_json, sealed, write_json
from ipt.stage import (
    MANIFEST,
    Stage,
    StageId,
    git_commit,
    hardware,
    hash_folder,
    installed_versions,
)

ROOT = Path(__file__).parents[2]
# hashes of data that a report lists; of more it shows one hash of all
SHOWN = 8
# record of an arm, and of all arms of a run
RECORD, RECORDS = "record.json", "record.csv"
COSTS = (
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "training_flops",
    "generator_flops",
    "gpu_seconds",
)


# The manifest of a run
# ----------------------------------------------------------------------------------------------


def command_line(command: str, config: Config) -> str:
    """The command line of the running command; without Hydra only the name of the recipe."""
    if not HydraConfig.initialized():
        return f"python -m ipt {command} experiment={config.name}"
    hydra = HydraConfig.get()
    flags = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    # Hydra itself adds hydra.mode
    own = [override for override in hydra.overrides.hydra if not override.startswith("hydra.mode=")]
    return shlex.join(["python", "-m", "ipt", command, *flags, *own, *hydra.overrides.task])


def provenance(
    command: str, config: Config, stages: Sequence[tuple[StageId, Stage]]
) -> dict[str, Any]:
    """The command, the commit and whether the checkout differs from it, and hashes of lock files,
    data and models.
    """
    return {
        "command": command_line(command, config),
        "git_commit": git_commit(),
        "git_dirty": _is_dirty(),
        "lock_files": {
            path.name: hash_file(path) for path in sorted((ROOT / "requirements").glob("?pu.txt"))
        },
        "data": _data(stages),
        "versions": installed_versions(),
        "hardware": hardware(),
    }


def provenance_facts(found: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of `provenance`: enough to tell whether two runs had the same."""
    data = {name: digest[:12] for name, digest in found["data"].items()}
    if len(data) > SHOWN:
        data = {f"all {len(data)} inputs, listed in {MANIFEST}": hash_json(found["data"])[:12]}
    commit = found["git_commit"] or "none: installed as a package"
    return {
        "git commit": f"{commit} and changes that were not committed"
        if found["git_dirty"]
        else commit,
        "lock files": {name: digest[:12] for name, digest in found["lock_files"].items()},
        "data": data,
    }


def write_manifest(
    output: Path, found: dict[str, Any], stages: Sequence[tuple[StageId, Stage]], **more: Any
) -> None:
    """Write manifest.json to the finished folder `output`: `found`, the stages of the run, and the
    hashes of the files in `output`.
    """
    made_from = []
    for identity, stage in stages:
        folder = os.path.relpath(stage.folder.resolve(), output.resolve())
        made_from.append({"name": str(identity), "folder": folder, "digest": stage.digest})
    outputs = hash_folder(output)
    manifest = {**more, **found, "stages": made_from, "outputs": outputs}
    write_json(output / MANIFEST, sealed(manifest, {}))


def _data(stages: Sequence[tuple[StageId, Stage]]) -> dict[str, str]:
    """Inputs of the stages that are not results of other stages: files, models, tasks."""
    manifests = [read_json(stage.folder / MANIFEST) for _, stage in stages]
    made = {manifest["digest"] for manifest in manifests}
    found = {}
    for manifest in manifests:
        if manifest["stage"] == "contamination":  # it reads inputs and results of other stages
            continue
        for name, digest in manifest["inputs"].items():
            if digest not in made:
                found[f"{manifest['stage']}: {name}"] = digest
    return found


def _is_dirty() -> bool:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return bool(result.stdout.strip())


# The record of an arm
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceRecord:
    """Tokens of a source of the mixture: how many it has and how many were trained on."""

    unique_tokens: int
    trained_tokens: int
    repeats: float


@dataclass(frozen=True)
class Record:
    """Tokens and cost of one arm and seed. Each arm has the full cost of its synthesis, also if
    several arms share it.

    Training FLOPs follow the convention of ipt.training.metrics. Generator FLOPs are 2 x parameters
    x (prompt tokens that were not in its cache + generated tokens); None for a model behind a
    server, whose size is not known. GPU-seconds are the sum over the stages of the arm: seconds of
    the last session (training: of all sessions) times the number of its GPUs; 0 on machines without
    GPUs.
    """

    arm: str
    seed: int
    sources: dict[str, SourceRecord]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    training_flops: float
    generator_flops: float | None
    gpu_seconds: float

    @property
    def unique_tokens(self) -> int:
        return sum(source.unique_tokens for source in self.sources.values())

    @property
    def trained_tokens(self) -> int:
        return sum(source.trained_tokens for source in self.sources.values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON, with the sums over the sources."""
        return {
            **asdict(self),
            "unique_tokens": self.unique_tokens,
            "trained_tokens": self.trained_tokens,
        }


def arm_record(
    arm: str, config: Config, stages: Mapping[StageId, Stage], training: Stage
) -> Record:
    """The record of an arm with a finished `training`; `stages` are all stages of the arm."""
    synthesis = stages.get(StageId("synthesis"))
    pairs = synthesis.stats if synthesis else dict.fromkeys(COSTS, 0)
    sources = {}
    for name, source in training.stats["sources"].items():
        sources[name] = SourceRecord(source["unique_tokens"], source["tokens"], source["repeats"])
    distinct = {stage.folder: stage for stage in stages.values()}
    gpu_seconds = sum(_gpu_seconds(stage, config) for stage in distinct.values())
    return Record(
        arm=arm,
        seed=config.seed if config.trainer.seed is None else config.trainer.seed,
        sources=sources,
        prompt_tokens=pairs.get("prompt_tokens") or 0,
        cached_tokens=pairs.get("cached_tokens") or 0,
        generated_tokens=pairs.get("generated_tokens") or 0,
        training_flops=training.stats["flops"],
        generator_flops=pairs.get("generator_flops"),
        gpu_seconds=round(gpu_seconds, 1),
    )


def write_records(output: Path, records: Sequence[Record]) -> None:
    """Write `record.csv`: per arm a row for each source, and a row of sums and costs."""
    names = ["arm", "seed", "source", "unique_tokens", "trained_tokens", "repeats", *COSTS]
    with (
        atomic(output / RECORDS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records:
            arm = {"arm": record.arm, "seed": record.seed}
            for name, source in record.sources.items():
                writer.writerow({**arm, "source": name, **asdict(source)})
            writer.writerow(
                {**record.as_dict(), "repeats": record.trained_tokens / record.unique_tokens}
            )


def write_record(folder: Path, record: Record) -> None:
    write_json(folder / RECORD, record.as_dict())


def read_record(folder: Path) -> Record:
    """The record in `folder`. Raises MissingFileError if there is none."""
    found: Mapping[str, Any] = read_json(folder / RECORD)
    sources = {name: SourceRecord(**source) for name, source in found["sources"].items()}
    known = {name: found[name] for name in Record.__dataclass_fields__}
    return Record(**known | {"sources": sources})


def _gpu_seconds(stage: Stage, config: Config) -> float:
    manifest = read_json(stage.folder / MANIFEST)
    name = manifest["stage"]
    gpus = {
        "synthesis": config.synthesis.tensor_parallel_size * config.synthesis.data_parallel_size,
        "training": config.trainer.devices * config.trainer.num_nodes,
        "evaluation": 1,
    }.get(name, 0)
    on_cpu = name == "training" and config.trainer.accelerator == "cpu"
    if on_cpu or not manifest["hardware"]["gpus"]:
        return 0.0
    sessions = stage.stats.get("seconds", stage.seconds) if name == "training" else stage.seconds
    return gpus * float(sessions)
