"""Distribute work over processes and return the results in order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from ipt.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a worker process


def worker_count(wish: int | None) -> int:
    """`wish`, or the number of cores available to this process."""
    return wish or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def in_order(
    prepare: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """The results of the tasks, in their order. With one worker, tasks run in this process.

    `prepare` is called once per process and returns the function that runs a task. It must be
    picklable (a function of a module, a class, or a partial of one). Tasks and results are pickled
    too and should be small; pass large data in files. Raises UserError if a worker is killed, and
    the exception of a failed task.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(prepare(), tasks)
        return
    # spawn, since this process may have threads
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (prepare,))
    try:
        yield from pool.map(_run, tasks)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out: run again, if necessary "
            "with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(prepare: Callable[[], Callable[[Task], Result]]) -> None:
    global _work
    begin_worker()
    _work = prepare()


def begin_worker() -> None:
    """Call this first in a worker process: it then exits with its parent and ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """An orphaned worker could still write while a new run does the same work."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    return _work(task)
