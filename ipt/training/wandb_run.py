"""A run on Weights & Biases that never keeps a training waiting, whatever becomes of the server,
its process or the disk.
"""

import atexit
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ipt.config import LoggerConfig
from ipt.console import console
from ipt.training.relay import Relay

FULL = 2**16  # bytes: a disk with no more room than that is full


class WandbRun(Logger):
    """Lightning's logger over a run that has begun. All of its calls are made on a thread of their
    own.
    """

    def __init__(self, run: wandb.Run, timeout: float) -> None:
        super().__init__()
        self.run, self.timeout = run, timeout
        self._relay = Relay()
        self._closed = False
        atexit.register(self.close)  # a signal may end the training before anybody closes the run

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.run.id

    @property
    def experiment(self) -> wandb.Run:
        return self.run

    def send(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call it later, with the run as its first argument. Returns at once."""
        self._relay.send(lambda: call(self.run, *arguments))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.send(wandb.Run.log, {**metrics, "trainer/global_step": step})

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """The run has its config from the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status != "success":  # else there is more to log: what the training has made
            self.close(failed=True)

    def close(self, failed: bool = False) -> None:
        """End the run, and say in one line what it lacks, if anything. Takes not much longer than
        `timeout`.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.send(lambda run: run.finish(exit_code=int(failed)))
        done = self._relay.wait(
            2 * self.timeout
        )  # one for what is left to log, one for `finish`, which has the limit itself
        if reason := self._trouble(done):
            _tell(f"{reason}; metrics.jsonl has all steps")
        if not done or self._relay.error is not None:
            _end_service()

    def _trouble(self, done: bool) -> str:
        if self._relay.error is not None:
            return (
                f"the run ends early, {self._relay.missing} records are not in it "
                f"({_line(self._relay.error)})"
            )
        if not done or self._relay.lost:
            return f"{self._relay.missing} records are not in the run, it did not take them"
        if shutil.disk_usage(self.run.dir).free < FULL:
            return f"the disk of {self.run.dir} is full, the run may lack records"
        return ""


def open_run(logger: LoggerConfig, output: Path, offline: bool, **keywords: Any) -> WandbRun | None:
    """Begin a run in `output`; where the server does not answer in `logger.timeout` seconds,
    offline. None if that cannot be either.

    `keywords` are those of `wandb.init`.
    """
    # Captured output would pass through W&B's process, and a print would wait for it.
    settings: dict[str, Any] = {"finish_timeout": logger.timeout, "console": "off"}
    keywords |= {"project": logger.project, "tags": logger.tags, "dir": output, "resume": "allow"}
    if not offline:
        limited = wandb.Settings(
            **settings, init_timeout=logger.timeout, login_timeout=logger.timeout
        )
        try:
            return WandbRun(wandb.init(**keywords, mode="online", settings=limited), logger.timeout)
        except (wandb.Error, OSError, ValueError) as error:
            _tell(f"offline ({_line(error)}); `wandb sync {output}/wandb/*` uploads the run later")
            wandb.teardown()  # what is left of the attempt holds the run's id
    os.environ["WANDB_MODE"] = (
        "offline"  # for W&B's own telemetry, which does not look at the argument
    )
    try:
        return WandbRun(
            wandb.init(**keywords, mode="offline", settings=wandb.Settings(**settings)),
            logger.timeout,
        )
    except (wandb.Error, OSError, ValueError) as error:
        _tell(f"nothing is logged ({_line(error)}); metrics.jsonl has all steps")
        return None


def _end_service() -> None:
    """Be rid of W&B's own process: one that is stuck or dead would keep ours from ending."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with suppress(
        Exception, SystemExit
    ):  # with which it would end us too; its hook at our exit is gone all the same
        wandb.teardown()


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _tell(line: str) -> None:
    console.print(f"W&B: {line}", highlight=False, markup=False, soft_wrap=True)
