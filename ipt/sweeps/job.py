"""A job of a sweep: what is known of it, and what passes between its process and the sweep that
started it.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ipt.files import read_json, write_json

FOLDER, LAUNCHER = (
    "IPT_JOB_FOLDER",
    "IPT_LAUNCHER",
)  # environment of a job's processes: its folder, the process that started it
JOB, RESULT, TRAINING, LOG = (
    "job.json",
    "result.json",
    "training",
    "log.txt",
)  # files of a job's folder
FINISHED = ("finished", "skipped")
GRACE = 60  # seconds that a job has to save what it has when its launcher is gone


@dataclass(frozen=True)
class Job:
    """One job of a sweep. `skipped`: it was finished before; `interrupted`: it was stopped, or has
    not begun.
    """

    name: str  # what varies, as "mixture.ratios.instruction=0.5 seed=1"
    overrides: tuple[str, ...]
    status: str = "interrupted"  # finished | failed | interrupted | skipped
    training: Path | None = None  # folder of its training stage
    evaluation: Path | None = None  # folder of its evaluation stage
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    number: int = 0
    key: str = ""  # of its composed config
    folder: Path | None = None  # where its result is
    error: str = ""  # last line of a failed job


def job_folder(sweep: Path, number: int) -> Path:
    return sweep / "jobs" / str(number)


def save_job(sweep: Path, job: Job) -> None:
    write_json(job_folder(sweep, job.number) / JOB, asdict(job))


def load_job(sweep: Path, number: int) -> Job | None:
    """Job `number` of the sweep in this folder, or None if there is none yet."""
    try:
        record = read_json(job_folder(sweep, number) / JOB)
    except FileNotFoundError:
        return None
    places = {
        name: Path(record[name]) if record[name] else None
        for name in ("training", "evaluation", "folder")
    }
    return Job(**{**record, "overrides": tuple(record["overrides"]), **places})


def with_result(job: Job, result: Mapping[str, Any], status: str) -> Job:
    training, evaluation, folder = (
        Path(result[name]) if result[name] else None
        for name in ("training", "evaluation", "folder")
    )
    return replace(
        job,
        status=status,
        training=training,
        evaluation=evaluation,
        folder=folder,
        figures=result["figures"],
        error="",
    )


# In the job's process
# -------------------------------------------------------------------------------------------------


def job_result(
    folder: Path,
    figures: Mapping[str, Any],
    training: Path | None = None,
    evaluation: Path | None = None,
) -> dict[str, Any]:
    """What a job has to show: where its result is, its figures, and the folders of its stages."""
    places = {"folder": folder, "training": training, "evaluation": evaluation}
    return {
        **{name: str(place) if place else None for name, place in places.items()},
        "figures": dict(figures),
    }


def report_result(result: Mapping[str, Any]) -> None:
    """Called by a job at its end: tell the sweep it belongs to, if any, what came out."""
    if FOLDER in os.environ:
        write_json(Path(os.environ[FOLDER]) / RESULT, result)


def report_training(folder: Path) -> None:
    """Called by a job when its training begins: tell the sweep it belongs to, if any, where to look
    for its metrics.
    """
    if FOLDER in os.environ:
        (Path(os.environ[FOLDER]) / TRAINING).write_text(str(folder), encoding="utf-8")


def obey_launcher() -> None:
    """To be called first in every process of a job: it ends when the process that started the job
    does, however that ends.

    What can be saved is saved first: the end is a SIGTERM, after which there is a minute. A queue's
    warning before it takes the machine away (SIGUSR2, as submitit has it) counts as one too. Does
    nothing in a process that belongs to no job.
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
            select.select([os.pidfd_open(process)], [], [])  # tells of a zombie's end too
            return
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        return


def varying_name(overrides: Sequence[str], varying: Sequence[str]) -> str:
    """The overrides of the keys that vary, as a job's name."""
    keys = {key.lstrip("+") for key in varying}
    return " ".join(
        override.lstrip("+")
        for override in overrides
        if override.partition("=")[0].lstrip("+") in keys
    )
