"""What a person sees of a sweep while it runs: one live table, or a line for each thing that
happens where there is no terminal.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live as LiveDisplay
from rich.markup import escape
from rich.table import Table

from ipt.console import console
from ipt.sweeps.job import FINISHED, LOG, TRAINING, Job
from ipt.sweeps.process import Run

TAIL = 8192  # bytes at the end of a file that hold its last line
REFRESH = 1.0  # seconds
LABELS = {"skipped": "finished before", "interrupted": "not finished"}


class Live:
    """Shows the jobs of a sweep until it is left."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._display = (
            LiveDisplay(console=console, auto_refresh=False, transient=True)
            if console.is_terminal
            else None
        )
        self._states: dict[int, str] = {}
        self._refreshed = 0.0
        self._stopping = 0

    def __enter__(self) -> "Live":
        if self._display:
            self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display:
            self._display.stop()
        else:
            self._tell_changes()

    def show(self, stopping: int) -> None:
        """To be called often. `stopping`: how many times the sweep was told to stop."""
        if stopping > self._stopping:
            self._stopping = stopping
            running = sum(run.process is not None for run in self.runs)
            console.print(
                f"stopping: {running} running jobs save first; once more kills them"
                if stopping == 1
                else "killing the running jobs"
            )
        if self._display is None:
            self._tell_changes()
        elif time.monotonic() - self._refreshed > REFRESH:
            self._refreshed = time.monotonic()
            self._display.update(self._table(), refresh=True)

    def _tell_changes(self) -> None:
        for run in self.runs:
            state = _state(run)
            if state not in ("waiting", self._states.get(run.job.number)):
                self._states[run.job.number] = state
                console.print(
                    f"job {run.job.number} {_outcome(run, state)}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

    def _table(self) -> Table:
        table = Table(title="Sweep", title_justify="left")
        for name in ("job", "state", "step", "left", "loss"):
            table.add_column(
                name, justify="left" if name in ("job", "state") else "right", no_wrap=name != "job"
            )
        table.add_column("", overflow="ellipsis", no_wrap=True)
        for run in self.runs:
            state = _state(run)
            metrics = last_metrics(run.folder) if state == "running" else {}
            trains = metrics and metrics["step"] < run.config.trainer.max_steps
            note = (
                run.job.error
                if state == "failed"
                else _last_line(run.folder / LOG)
                if state == "running" and not trains
                else ""
            )
            table.add_row(escape(run.job.name), state, *_progress(run, metrics), escape(note))
        return table


def job_label(job: Job) -> str:
    """A job's state in words."""
    return LABELS.get(job.status, job.status)


def last_metrics(folder: Path) -> dict[str, Any]:
    """The newest line of metrics.jsonl of the job in this folder; empty before its training's first
    step.
    """
    try:
        line = _last_line(Path((folder / TRAINING).read_text(encoding="utf-8")) / "metrics.jsonl")
        return json.loads(line) if line else {}
    except (FileNotFoundError, ValueError):  # not there yet, or half written
        return {}


def _state(run: Run) -> str:
    if run.process is not None:
        return "running"
    return job_label(run.job) if run.tries or run.job.status == "skipped" else "waiting"


def _outcome(run: Run, state: str) -> str:
    """What is told of a job whose state has changed."""
    job, log = run.job, run.folder / LOG
    if state == "running":
        return f"{job.name}: running (try {run.tries})" if run.tries > 1 else f"{job.name}: running"
    if job.status in FINISHED:
        loss = job.figures.get("final loss")
        return (
            f"{job.name}: {state}"
            + (f", final loss {loss:.4g}" if loss is not None else "")
            + f" ({job.seconds:.0f} s)"
        )
    return f"{job.name}: {state}" + (f": {job.error}" if job.error else "") + f" (log: {log})"


def _progress(run: Run, metrics: dict[str, Any]) -> tuple[str, str, str]:
    """Step, time left and loss of a running job, as far as they are known."""
    steps = run.config.trainer.max_steps
    if not metrics:
        loss = run.job.figures.get("final loss")
        return "", "", f"{loss:.4g}" if loss is not None else ""
    seconds = (
        (steps - metrics["step"])
        * metrics["tokens"]
        / metrics["step"]
        / metrics["tokens_per_second"]
        / run.config.trainer.devices
    )
    return (
        f"{metrics['step']:,}/{steps:,}",
        f"{seconds // 60:.0f}:{seconds % 60:02.0f}",
        f"{metrics['loss']:.4g}",
    )


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
