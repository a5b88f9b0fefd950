"""Progress of a running sweep: a live table on a terminal, else a log line for each change."""

import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live as LiveDisplay
from rich.markup import escape
from rich.table import Table

from ipt.console import console
from ipt.sweeps.job import FINISHED, LOG, TRAINING, job_values, varying_keys
from ipt.sweeps.process import Run

TAIL = 8192  # bytes at the end of a file in which its last line is searched
REFRESH = 1.0  # seconds

log = logging.getLogger(__name__)


class Live:
    """Shows the jobs of a sweep until the context ends."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._keys = varying_keys(run.job for run in runs)
        self._display: LiveDisplay | None = None
        if console.is_terminal:
            self._display = LiveDisplay(console=console, auto_refresh=False, transient=True)
        self._states: dict[int, str] = {}
        self._refreshed = 0.0
        self._stops = 0

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
            self._log_changes()

    def show(self, stops: int) -> None:
        """Update the display. `stops`: the number of stop signals received so far."""
        if stops > self._stops:
            self._stops = stops
            running = sum(run.process is not None for run in self.runs)
            if stops == 1:
                log.info("stopping: waiting for %d running jobs to save", running)
                log.info("press Ctrl-C again to kill them")
            else:
                log.info("killing the running jobs")
        if self._display is None:
            self._log_changes()
        elif time.monotonic() - self._refreshed > REFRESH:
            self._refreshed = time.monotonic()
            self._display.update(self._table(), refresh=True)

    def _log_changes(self) -> None:
        for run in self.runs:
            state = _state(run)
            if state not in ("waiting", self._states.get(run.job.number)):
                self._states[run.job.number] = state
                values = job_values(run.job, self._keys)
                name = " ".join(f"{key}={value}" for key, value in values.items())
                log.info("job %d %s: %s", run.job.number, name, _outcome(run, state))

    def _table(self) -> Table:
        table = Table(title="Sweep", title_justify="left", expand=True)
        table.add_column("job", justify="right", no_wrap=True)
        for name in job_values(self.runs[0].job, self._keys):
            table.add_column(name, overflow="fold")
        table.add_column("status", no_wrap=True)
        for name in ("step", "left", "loss"):
            table.add_column(name, justify="right", no_wrap=True)
        # The last line of the log, or the error, gets the rest of the width.
        table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
        for run in self.runs:
            state = _state(run)
            metrics = last_metrics(run.folder) if state == "running" else {}
            values = job_values(run.job, self._keys).values()
            cells = [*values, state, *_progress(run, metrics), _note(run, state, metrics)]
            table.add_row(str(run.job.number), *map(escape, cells))
        return table


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl of the job in this folder; empty before its first step."""
    try:
        line = _last_line(Path((folder / TRAINING).read_text(encoding="utf-8")) / "metrics.jsonl")
        return json.loads(line) if line else {}
    except (FileNotFoundError, ValueError):  # not there yet, or half written
        return {}


def _state(run: Run) -> str:
    if run.process is not None:
        return "running"
    return run.job.status if run.tries or run.job.status == "skipped" else "waiting"


def _note(run: Run, state: str, metrics: dict[str, Any]) -> str:
    """The error of a failed job, the last line of the log of a job that is not training."""
    if state == "failed":
        return run.job.error
    trains = metrics and metrics["step"] < run.config.trainer.max_steps
    return _last_line(run.folder / LOG) if state == "running" and not trains else ""


def _outcome(run: Run, state: str) -> str:
    """The state as text: `finished, final loss 7.408 (132 s)`."""
    job = run.job
    if state == "running":
        return f"running (try {run.tries})" if run.tries > 1 else "running"
    if job.status in FINISHED:
        text = "skipped, already finished" if job.status == "skipped" else state
        loss = job.figures.get("final loss")
        if loss is not None:
            text += f", final loss {loss:.4g}"
        return f"{text} ({job.seconds:.0f} s)"
    error = f": {job.error}" if job.error else ""
    return f"{state}{error} (log: {run.folder / LOG})"


def _progress(run: Run, metrics: dict[str, Any]) -> tuple[str, str, str]:
    """Step, time left and loss of a running job, as far as they are known."""
    trainer = run.config.trainer
    if not metrics:
        loss = run.job.figures.get("final loss")
        return "", "", f"{loss:.4g}" if loss is not None else ""
    tokens_per_step = metrics["tokens"] / metrics["step"]
    tokens_left = (trainer.max_steps - metrics["step"]) * tokens_per_step
    left = tokens_left / metrics["tokens_per_second"] / trainer.devices
    steps = f"{metrics['step']:,}/{trainer.max_steps:,}"
    return steps, str(timedelta(seconds=round(left))), f"{metrics['loss']:.4g}"


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
