"""Starts, watches and ends the process of one job of a sweep."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra import compose
from hydra.conf import HydraConf
from omegaconf import DictConfig

from ipt.config import Config, to_config
from ipt.errors import UserError
from ipt.files import read_json
from ipt.sweeps.gpu_allocation import job_environment
from ipt.sweeps.job import (
    FINISHED,
    FOLDER,
    LAUNCHER,
    LOG,
    RESULT,
    TRAINING,
    Job,
    job_folder,
    load_job,
    save_job,
    with_result,
)

TRY_AGAIN = 75  # sysexits.h: exit code of a training that was stopped and has saved


@dataclass(frozen=True)
class Launch:
    """What all jobs of a sweep share: the command, its flags (--config-dir), the folder."""

    command: str
    sweep: Path
    flags: Sequence[str] = ()


def launch_of(hydra: DictConfig | HydraConf) -> Launch:
    """The launch of a sweep, from Hydra's part of its config."""
    flags = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    return Launch(str(hydra.job.config_name), Path(hydra.sweep.dir), flags)


@dataclass
class Run:
    """A job, and its process while it runs."""

    launch: Launch
    job: Job
    config: Config
    share: float = 0.0  # GPUs it needs
    gpus: list[str] = field(default_factory=list)  # GPUs it was given
    tries: int = 0
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    log_start: int = 0

    @property
    def folder(self) -> Path:
        return job_folder(self.launch.sweep, self.job.number)

    def was_finished(self) -> bool:
        """Whether an earlier run of the sweep finished the job, and its stages are still valid."""
        if self.job.status not in FINISHED:
            return False
        from ipt.pipeline.commands import finished_result

        result = finished_result(self.launch.command, self.config)
        if result is not None:
            self._keep(with_result(self.job, result, "skipped"))
        return result is not None

    def start(self, n_jobs: int = 1) -> None:
        """Start the process; `n_jobs` run at the same time.

        The process has a group of its own, so that only the launcher gets a Ctrl-C and can make the
        job save.
        """
        for name in (RESULT, TRAINING):
            (self.folder / name).unlink(missing_ok=True)
        command, flags = self.launch.command, self.launch.flags
        start = [
            sys.executable,
            *processes(command, self.config),
            "-m",
            "ipt",
            command,
            *flags,
            *self.job.overrides,
        ]
        environment = job_environment(os.environ, self.gpus, n_jobs)
        environment |= {FOLDER: str(self.folder.absolute()), LAUNCHER: str(os.getpid())}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(start)}\n")
            log.flush()
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                start,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,
                preexec_fn=_ignore_warning,
            )
        self.started = time.monotonic()
        self.tries += 1

    def finish(self, stopped: bool) -> None:
        """Record the result of the ended process. A successful job also reports its result."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # processes it may have left
        code, result = self.process.returncode, self.folder / RESULT
        seconds = round(time.monotonic() - self.started, 1)
        job = Job(
            self.job.name,
            self.job.overrides,
            seconds=seconds,
            number=self.job.number,
            key=self.job.key,
        )
        if code == 0 and result.exists():
            self._keep(with_result(job, read_json(result), "finished"))
        elif stopped or code == TRY_AGAIN:
            self._keep(job)
        else:
            error = _last_error(self.folder / LOG, self.log_start) or f"exit code {code}"
            self._keep(replace(job, status="failed", error=error))
        self.process = None

    def ask_to_end(self) -> None:
        """Send SIGTERM to the main process only: its helpers must live until it has saved."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """Kill the process and its descendants, to which torchrun gives sessions of their own."""
        if self.process is None:
            return
        import psutil

        with suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    descendant.kill()
        self.process.kill()

    def _keep(self, job: Job) -> None:
        self.job = job
        save_job(self.launch.sweep, job)


def planned_run(launch: Launch, number: int) -> Run:
    """The job of this number. Raises UserError if our sweepers have not planned it."""
    job = load_job(launch.sweep, number)
    if job is None:
        raise UserError(
            "hydra/sweeper: ipt supports only its own sweepers, grid (the default) and optuna"
        )
    # The caller has initialized Hydra.
    return Run(launch, job, to_config(compose(launch.command, list(job.overrides))))


def run_here(launch: Launch, number: int) -> Job:
    """Run a planned job and wait for it; used by other launchers (submitit).

    If this process is stopped, for example because its time on a cluster is up, the job saves
    first.
    """
    run = planned_run(launch, number)
    if run.was_finished():
        return run.job
    run.start()
    assert run.process is not None
    try:
        run.process.wait()
    except BaseException:
        run.process.terminate()
        run.process.wait()
        run.finish(stopped=True)
        raise
    run.finish(stopped=False)
    return run.job


def processes(command: str, config: Config) -> list[str]:
    """The arguments of Python that start a job's processes: torchrun if there are several."""
    trainer = config.trainer
    if command != "train" or trainer.devices * trainer.num_nodes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={trainer.devices}"]


def _ignore_warning() -> None:
    """Ignore SIGUSR2, which a queue sends to all processes; `obey_launcher` handles it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _last_error(log: Path, start: int) -> str:
    with log.open(errors="replace", encoding="utf-8") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")
