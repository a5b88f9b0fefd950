"""The run record of an arm: what it was trained on, how often, and what that and the making of its
pairs cost.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipt.config import Config
from ipt.files import atomic, read_json, write_json
from ipt.stage import MANIFEST, Stage

RECORD, RECORDS = "record.json", "record.csv"  # of an arm, and of all arms of a run
COSTS = (
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "training_flops",
    "generator_flops",
    "gpu_seconds",
)


@dataclass(frozen=True)
class SourceRecord:
    """Tokens that a source of the mixture has, and those of it that were trained on."""

    unique_tokens: int
    trained_tokens: int
    repeats: float


@dataclass(frozen=True)
class Record:
    """One arm of one seed. An arm answers for the whole synthesis that it uses, even where arms
    share one.

    FLOPs of training by the convention of ipt.training.metrics; of the generator 2 x its parameters x
    (prompt tokens that its cache did not hold + generated tokens), None where its size is not known
    (a server's model). GPU-seconds are those of all of the arm's stages, each the seconds of its
    last session (of training: of all sessions) times the GPUs it was given; 0 on machines without.
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
        """JSON-able; sums over the sources beside them."""
        return {
            **asdict(self),
            "unique_tokens": self.unique_tokens,
            "trained_tokens": self.trained_tokens,
        }


def arm_record(
    arm: str, config: Config, stages: Iterable[tuple[str, Stage]], training: Stage
) -> Record:
    """The record of an arm whose `training` is finished; `stages` are all that it went through,
    with their labels.
    """
    done = dict(stages)
    pairs = done["synthesis"].stats if "synthesis" in done else dict.fromkeys(COSTS, 0)
    sources = {
        name: SourceRecord(source["unique_tokens"], source["tokens"], source["repeats"])
        for name, source in training.stats["sources"].items()
    }
    return Record(
        arm=arm,
        seed=config.seed if config.trainer.seed is None else config.trainer.seed,
        sources=sources,
        **{
            name: pairs.get(name) or 0
            for name in ("prompt_tokens", "cached_tokens", "generated_tokens")
        },
        training_flops=training.stats["flops"],
        generator_flops=pairs.get("generator_flops"),
        gpu_seconds=round(
            sum(
                _gpu_seconds(stage, config)
                for stage in {stage.folder: stage for stage in done.values()}.values()
            ),
            1,
        ),
    )


def write_records(output: Path, records: Sequence[Record]) -> None:
    """Write `record.csv`: a row for each source of each arm, and one with the sums and costs of the
    arm (source: empty).
    """
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
    """What `write_record` has written. Raises MissingFileError if there is none."""
    found: Mapping[str, Any] = read_json(folder / RECORD)
    sources = {name: SourceRecord(**source) for name, source in found["sources"].items()}
    return Record(
        **{name: value for name, value in found.items() if name in Record.__dataclass_fields__}
        | {"sources": sources}
    )


def _gpu_seconds(stage: Stage, config: Config) -> float:
    manifest = read_json(stage.folder / MANIFEST)
    there = len(manifest["hardware"]["gpus"])
    used = {
        "synthesis": config.synthesis.tensor_parallel_size * config.synthesis.data_parallel_size,
        "training": config.trainer.devices * config.trainer.num_nodes,
        "evaluation": 1,
    }.get(manifest["stage"], 0)
    if not there or (manifest["stage"] == "training" and config.trainer.accelerator == "cpu"):
        return 0.0
    return used * float(
        stage.stats.get("seconds", stage.seconds)
        if manifest["stage"] == "training"
        else stage.seconds
    )
