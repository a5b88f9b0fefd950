"""Takes a training loop through its steps when it is told to, and measures them. Needs nothing but
torch.

A side makes a `Stepping` and then trains as its users do. Behind each optimizer step that ends what
was asked for, the loop is held: an answer goes out, one line of JSON, and the process sleeps until
the next request comes in. So all that a loop does from one step to the next is in its time:
batches, checks, logs.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


class Stepping:
    """Requests: {"steps": how many, "memory": whether to measure that instead of time}. The first
    step is taken without one.

    Answers: {"seconds": of all these steps, "memory": bytes or null, "losses": those that the loop
    has told until now}.
    """

    def __init__(self, losses: Callable[[], list[float]]) -> None:
        self._losses = losses
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes where errors go
        self._left, self._started = 1, time.monotonic()
        self._memory: MicroBatchMemory | None = None
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._left -= 1
        if self._left:
            return
        seconds = time.monotonic() - self._started
        memory = self._memory.taken() if self._memory else None
        self._answers.write(
            json.dumps({"seconds": seconds, "memory": memory, "losses": self._losses()}) + "\n"
        )
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # measured enough: the loop's own end would only write files
        request = json.loads(line)
        self._left, self._memory = (
            request["steps"],
            MicroBatchMemory(optimizer) if request["memory"] else None,
        )
        self._started = time.monotonic()


class MicroBatchMemory:
    """Resident memory that the second micro-batch of a step takes at its peak, beyond weights,
    gradients and the optimizer's state.

    All of these are there once the first micro-batch has left each parameter its gradient: then the
    peak begins to count.
    """

    _before: int | None = None

    def __init__(self, optimizer: Optimizer) -> None:
        return_memory_beyond(1 << 17)
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._without_gradient = len(parameters)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._begin) for parameter in parameters
        ]

    def taken(self) -> int:
        """To be asked for behind the step."""
        assert self._before is not None, "a step must have more than one micro-batch"
        for hook in self._hooks:
            hook.remove()
        return_memory_beyond(1 << 25)
        return status("VmHWM") - self._before

    def _begin(self, _: Tensor) -> None:
        self._without_gradient -= 1
        if self._without_gradient == 0:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is no part of it
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self._before = status("VmRSS")


def return_memory_beyond(size: int) -> None:
    """Have glibc give freed blocks of more bytes back at once, so that resident memory is what
    tensors take; 2**25 is where it ends up.
    """
    for option, value in ((MMAP_THRESHOLD, size), (TRIM_THRESHOLD, 2 * size)):
        ctypes.CDLL(None).mallopt(option, value)


def status(field: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
