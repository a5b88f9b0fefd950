"""Runs the jobs of a sweep as subprocesses until all have ended or the sweep is stopped."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    n_jobs: int = 1  # at the same time
    gpus_per_job: float | None = None  # below 1: jobs share a GPU; None: as in the job's config
    retries: int = 0  # of a job that fails


def run_jobs(launch: Launch, numbers: Sequence[int], settings: LaunchSettings) -> list[Job]:
    """Run the planned jobs of these numbers and return them with their results.

    Finished jobs are skipped. A job that fails is retried `settings.retries` times and does not
    stop the others. SIGINT or SIGTERM makes the running jobs save and end; a second signal kills
    them. Raises KeyboardInterrupt after SIGINT, SystemExit(75) after SIGTERM, and UserError if a
    job needs more GPUs than there are.
    """
    runs = [planned_run(launch, number) for number in numbers]
    queue = _Queue(list(runs), _allocator(runs, settings), settings)
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
    """The jobs that wait, and those that run."""

    waiting: list[Run]
    allocator: GpuAllocator
    settings: LaunchSettings
    running: list[Run] = field(default_factory=list)

    def begin(self) -> None:
        """Start jobs for which there are resources; skip those that have finished."""
        for run in list(self.waiting):
            if run.tries == 0 and run.was_finished():
                self.waiting.remove(run)
                continue
            taken = self.allocator.take(run.share)
            if taken is not None:
                run.gpus = taken
                run.start(self.settings.n_jobs)
                self.waiting.remove(run)
                self.running.append(run)

    def collect(self, stopped: bool) -> None:
        """Record the jobs that have ended; failed ones wait for their next try if they have one."""
        for run in list(self.running):
            assert run.process is not None
            if run.process.poll() is None:
                continue
            run.finish(stopped)
            self.allocator.give(run.gpus, run.share)
            self.running.remove(run)
            if run.job.status == "failed" and run.tries <= self.settings.retries:
                self.waiting.append(run)


def _allocator(runs: Sequence[Run], settings: LaunchSettings) -> GpuAllocator:
    """The resources of this machine. Sets the share of GPUs that each run needs."""
    if settings.n_jobs < 1:
        raise UserError(f"hydra.launcher.n_jobs={settings.n_jobs}: must be at least 1")
    gpus: list[str] = []
    if settings.n_jobs > 1 or settings.gpus_per_job is not None:  # else each job may use all GPUs
        gpus = visible_gpus(os.environ)
    for run in runs:
        if gpus:
            run.share = gpu_share(run.launch.command, run.config, settings.gpus_per_job)
        if run.share > len(gpus):
            raise UserError(
                f"job {run.job.name} needs {run.share:g} GPUs, but there are {len(gpus)}: set "
                "trainer.devices or hydra.launcher.gpus_per_job"
            )
    return GpuAllocator(settings.n_jobs, dict.fromkeys(gpus, 1.0))


class _Stop:
    """Counts stop signals. The first one is passed on to the jobs, the second one kills them."""

    def __init__(self) -> None:
        self.received = 0
        self.first = 0  # number of the first signal
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
