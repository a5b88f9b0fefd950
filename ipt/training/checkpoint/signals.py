"""Stopping a run after a signal, so that all processes save and stop after the same step."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h, "try again later": queues can requeue on it
REQUEUE = signal.SIGUSR1  # sent by `sbatch --signal=USR1@300` before the time limit of a job

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run has saved after a signal; the same command resumes it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignals:
    """Records SIGTERM and SIGUSR1 instead of exiting."""

    def __init__(self) -> None:
        self.received = 0  # 1: SIGTERM, 2: SIGUSR1; the larger one after both
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, REQUEUE):
                self._previous[number] = signal.signal(number, self._record)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, 2 if number == REQUEUE else 1)


class RankConsensus:
    """Element-wise maximum of a few numbers over all processes, after each step.

    With a `group` (gloo, so no device is involved) the reduction is asynchronous, and `exchange`
    returns the result of the step before.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._sent: tuple[Any, torch.Tensor] | None = None

    def exchange(self, numbers: Sequence[int]) -> list[int]:
        if self._group is None:
            return list(numbers)
        answer = self.last() or [0] * len(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int32)
        self._sent = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True), tensor
        return answer

    def last(self) -> list[int] | None:
        """Wait for the pending reduction and return its result; None if there is none."""
        if self._sent is None:
            return None
        work, tensor = self._sent
        work.wait()
        self._sent = None
        return tensor.tolist()


def requeue_job() -> None:
    """Requeue the SLURM job of this process; does nothing outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        log.warning("scontrol is not available here: requeue job %s yourself", job)
        return
    result = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, encoding="utf-8", check=False
    )
    if result.returncode == 0:
        log.info("job %s was requeued", job)
    else:
        log.warning("job %s was not requeued: %s", job, result.stderr.strip())
