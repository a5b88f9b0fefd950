"""The jobs of a sweep, each a process of its own, side by side, until all have ended or the sweep
is told to stop.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ipt.errors import UserError
from ipt.sweeps.gpu_allocation import GpuAllocator, gpu_share, visible_gpus
from ipt.sweeps.job import Job
from ipt.sweeps.process import TRY_AGAIN, Launch, Run, planned_run
from ipt.sweeps.progress import Live

POLL = 0.2  # seconds


@dataclass(frozen=True)
class LaunchSettings:
    """How jobs are run on this machine."""

    n_jobs: int = 1  # side by side
    gpus_per_job: float | None = (
        None  # below 1: so many jobs share a GPU; null: as many as the config asks for
    )
    retries: int = 0  # further tries of a job that fails


def run_jobs(launch: Launch, numbers: Sequence[int], settings: LaunchSettings) -> list[Job]:
    """Run the planned jobs of these numbers and return what came of each.

    Finished ones are recognised and not started. One that fails is tried again `settings.retries`
    times and does not stop the others. At SIGINT or SIGTERM the running jobs are told to save and
    to end; at a second one they are killed. Raises KeyboardInterrupt after SIGINT, SystemExit(75)
    after SIGTERM, and UserError for settings that cannot be met.
    """
    runs = [planned_run(launch, number) for number in numbers]
    queue = _Queue(runs, _slots(runs, settings), settings)
    with _stop_signals() as stop, Live(runs) as live:
        try:
            while queue.running or (queue.waiting and not stop.received):
                queue.collect(stopped=stop.received > 0)
                if not stop.received:
                    queue.begin()
                stop.pass_on(queue.running)
                live.show(stop.received)
                time.sleep(POLL)
        finally:
            for run in queue.running:
                run.kill()
    if stop.received:
        raise KeyboardInterrupt if stop.first == signal.SIGINT else SystemExit(TRY_AGAIN)
    return [run.job for run in runs]


@dataclass
class _Queue:
    """Which jobs wait, and which run."""

    waiting: list[Run]
    slots: GpuAllocator
    settings: LaunchSettings

    def __post_init__(self) -> None:
        self.waiting, self.running = list(self.waiting), list[Run]()

    def begin(self) -> None:
        """Start what there is room for; what turns out to be finished needs none."""
        for run in list(self.waiting):
            if run.tries == 0 and run.was_finished():
                self.waiting.remove(run)
                continue
            taken = self.slots.take(run.share)
            if taken is not None:
                run.gpus = taken
                run.start(self.settings.n_jobs)
                self.waiting.remove(run)
                self.running.append(run)

    def collect(self, stopped: bool) -> None:
        """Keep what came of the jobs that have ended; those that failed wait for their next try if
        they have one.
        """
        for run in list(self.running):
            assert run.process is not None
            if run.process.poll() is None:
                continue
            run.finish(stopped)
            self.slots.give(run.gpus, run.share)
            self.running.remove(run)
            if run.job.status == "failed" and run.tries <= self.settings.retries:
                self.waiting.append(run)


def _slots(runs: Sequence[Run], settings: LaunchSettings) -> GpuAllocator:
    """The room there is; says of each run how much of it it needs."""
    if settings.n_jobs < 1:
        raise UserError(f"hydra.launcher.n_jobs={settings.n_jobs}: must be at least 1")
    shares_out = (
        settings.n_jobs > 1 or settings.gpus_per_job is not None
    )  # else each job may use all there is
    gpus = visible_gpus(os.environ) if shares_out else []
    for run in runs:
        run.share = (
            gpu_share(run.launch.command, run.config, settings.gpus_per_job) if gpus else 0.0
        )
        if run.share > len(gpus):
            wish = f"job {run.job.name} wants {run.share:g} GPUs"
            raise UserError(
                f"{wish} and there are {len(gpus)}: set trainer.devices or "
                "hydra.launcher.gpus_per_job"
            )
    return GpuAllocator(settings.n_jobs, dict.fromkeys(gpus, 1.0))


class _Stop:
    """Signals that tell the sweep to stop: at the first the jobs are told too, at the second they
    are killed.
    """

    def __init__(self) -> None:
        self.received, self.first = 0, 0
        self._passed_on = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.received += 1

    def pass_on(self, running: Sequence[Run]) -> None:
        if self._passed_on < self.received:
            self._passed_on = self.received
            for run in running:
                run.ask_to_end() if self.received == 1 else run.kill()


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    previous = {
        number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
