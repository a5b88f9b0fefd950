"""A job of a sweep: its record, and the messages between its process and the sweep."""

import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ipt.files import read_json, write_json

# Environment variables of a job's processes: the job's folder, the process that started the job.
FOLDER, LAUNCHER = "IPT_JOB_FOLDER", "IPT_LAUNCHER"
# Files in a job's folder.
JOB, RESULT, TRAINING, LOG = "job.json", "result.json", "training", "log.txt"
FINISHED = ("finished", "skipped")
GRACE = 60  # seconds that a job has to save its state after its launcher has ended
SEEDS = ("trainer.seed", "seed")
# Overrides that do not describe a job.
TECHNICAL = ("logger", "output_dir", "hydra")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Its status is `finished`, `failed`, `skipped` (had already finished) or `interrupted` (stopped,
    or not started yet).
    """

    name: str  # overrides of the keys that vary, as "mixture.ratios.instruction=0.5 seed=1"
    overrides: tuple[str, ...]
    status: str = "interrupted"
    training: Path | None = None  # folder of its training stage
    evaluation: Path | None = None  # folder of its evaluation stage
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    number: int = 0
    key: str = ""  # hash of its composed config
    folder: Path | None = None  # of its result
    error: str = ""  # last line of the log of a failed job


def job_folder(sweep: Path, number: int) -> Path:
    return sweep / "jobs" / str(number)


def save_job(sweep: Path, job: Job) -> None:
    write_json(job_folder(sweep, job.number) / JOB, asdict(job))


def load_job(sweep: Path, number: int) -> Job | None:
    """Job `number` of the sweep in this folder, or None if it was not planned yet."""
    try:
        record = read_json(job_folder(sweep, number) / JOB)
    except FileNotFoundError:
        return None
    job = Job(**{**record, "overrides": tuple(record["overrides"])})
    return with_result(job, record, job.status)


def with_result(job: Job, result: Mapping[str, Any], status: str) -> Job:
    """The job with this status, and the folders and figures of `result`."""
    return replace(
        job,
        status=status,
        training=_path(result["training"]),
        evaluation=_path(result["evaluation"]),
        folder=_path(result["folder"]),
        figures=result["figures"],
        error=result.get("error", ""),
    )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


# What varies
# -------------------------------------------------------------------------------------------------


def assignments(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value of the overrides that describe a job."""
    values = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key.startswith(TECHNICAL):
            values[key] = value
    return values


def varying_keys(jobs: Iterable[Job]) -> list[str]:
    """The keys that have several values among the jobs."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in assignments(job.overrides).items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def job_values(job: Job, keys: Sequence[str]) -> dict[str, str]:
    """The job's values of these keys, each under the last part of its key if no other ends alike.

    mixture.ratios.instruction=0.5 -> {"instruction": "0.5"}
    """
    names = Counter(key.rpartition(".")[2] for key in keys)
    given = assignments(job.overrides)
    values = {}
    for key in keys:
        name = key.rpartition(".")[2]
        values[name if names[name] == 1 else key] = given.get(key, "")
    return values


def varying_name(overrides: Sequence[str], varying: Sequence[str]) -> str:
    """The overrides of the keys that vary, as a job's name."""
    keys = {key.lstrip("+") for key in varying}
    found = []
    for override in overrides:
        text = override.lstrip("+")
        if text.partition("=")[0] in keys:
            found.append(text)
    return " ".join(found)


# In the job's process
# -------------------------------------------------------------------------------------------------


def job_result(
    folder: Path,
    figures: Mapping[str, Any],
    training: Path | None = None,
    evaluation: Path | None = None,
) -> dict[str, Any]:
    """The result of a job: its folder, its figures, and the folders of its stages."""
    places = {"folder": folder, "training": training, "evaluation": evaluation}
    shown = {name: str(place) if place else None for name, place in places.items()}
    return {**shown, "figures": dict(figures)}


def report_result(result: Mapping[str, Any]) -> None:
    """Pass a job's result to its sweep; does nothing outside of a sweep."""
    if FOLDER in os.environ:
        write_json(Path(os.environ[FOLDER]) / RESULT, result)


def report_training(folder: Path) -> None:
    """Tell the sweep where a job's training writes its metrics; does nothing outside of a sweep."""
    if FOLDER in os.environ:
        (Path(os.environ[FOLDER]) / TRAINING).write_text(str(folder), encoding="utf-8")


def obey_launcher() -> None:
    """End this process when the process that started the job ends, for whatever reason.

    Every process of a job calls this first. The process gets a SIGTERM, on which it can save its
    state, and is killed a minute later. SIGUSR2, which submitit sends before a job's time is up,
    counts as SIGTERM. Does nothing outside of a sweep.
    """
    if LAUNCHER not in os.environ:
        return
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()


def _end_with(launcher: int) -> None:
    _wait_for_end(launcher)
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)  # a job has a process group of its own


def _wait_for_end(process: int) -> None:
    try:
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(process)], [], [])  # also returns for a zombie
            return
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        return
