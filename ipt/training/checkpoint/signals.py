"""Stopping a run in good order: signals, and how all processes act on them after the same step."""

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

from ipt.console import console

# sysexits.h: EX_TEMPFAIL, "try again later"; what a queue that can requeue by exit code is told to
# look for
EXIT_CODE = 75
REQUEUE = signal.SIGUSR1  # what `sbatch --signal=USR1@300` sends before a job's time is up


class Stopped(SystemExit):
    """The run was told to stop, has saved, and goes on when the same command is given again."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignals:
    """Notes SIGTERM and SIGUSR1 instead of dying of them."""

    def __init__(self) -> None:
        self.received = 0  # the greater of the numbers 1 for SIGTERM and 2 for SIGUSR1
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, REQUEUE)
            }

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, 2 if number == REQUEUE else 1)


class RankConsensus:
    """Numbers of which each process tells its own after each step, and all learn the greatest at
    the same step.

    Nobody waits for anybody in the step: with a `group` (gloo, so that no device is involved) the
    answer is of the step before.
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
        """The answer to what was told last, waited for."""
        if self._sent is None:
            return None
        work, tensor = self._sent
        work.wait()
        self._sent = None
        return tensor.tolist()


def requeue_job() -> None:
    """Put the SLURM job that this process belongs to back into the queue; does nothing outside of
    SLURM.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        console.print(
            f"[yellow]there is no scontrol here: put job {job} back into the queue yourself"
        )
        return
    result = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, encoding="utf-8", check=False
    )
    outcome = (
        "is in the queue again"
        if result.returncode == 0
        else f"was not requeued: {result.stderr.strip()}"
    )
    console.print(f"job {job} {outcome}")
