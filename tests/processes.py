"""Functions in real processes of their own, which can be killed and can be several.

A server forks them that has imported what they need (tests/warm.py): imports take most of the time
of a fresh interpreter.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
# seconds to wait for a process, and for those that wait for one that has failed
PATIENCE, AFTER_A_FAILURE = (600, 60)
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.warm"])


@dataclass(frozen=True)
class Ended:
    """Exit codes, of a process that a signal has ended minus its number, and what each process
    wrote to its output and error.
    """

    codes: list[int | None]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


@contextmanager
def started(
    function: Callable[..., None], *arguments: Any, log: Path, **environment: str
) -> Iterator[BaseProcess]:
    """A process that calls a module's function, with what it writes in the file `log`; killed in
    the end if it still runs.
    """
    wanted = (function, arguments, {**os.environ, **environment}, log, torch.get_num_threads())
    process = FORKING.Process(target=_call, args=wanted)
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}):
        # of the server, if this starts it
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def run_ranks(function: Callable[..., None], *arguments: Any, processes: int = 2) -> Ended:
    """The function in processes that torchrun could have started."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environments = [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]
    return run_together(function, *arguments, environments=environments)


def run_together(
    function: Callable[..., None], *arguments: Any, environments: Sequence[dict[str, str]]
) -> Ended:
    """The function in several processes, each with variables of its own. Where one fails, the
    others are killed a little later.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [Path(folder) / str(number) for number in range(len(environments))]
        running = [
            stack.enter_context(started(function, *arguments, log=log, **environment))
            for log, environment in zip(logs, environments, strict=True)
        ]
        _wait(running)
        return Ended(
            [process.exitcode for process in running],
            [log.read_text(encoding="utf-8") for log in logs],
        )


def _wait(processes: Sequence[BaseProcess]) -> None:
    patience = PATIENCE
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        if not connection.wait(running, patience):
            return
        if any(process.exitcode for process in processes):
            patience = AFTER_A_FAILURE


def _call(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    log: Path,
    threads: int,
) -> None:
    """In the new process: what a new interpreter would have found."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    function(*arguments)
