"""Work that is spread over processes, with its results in order."""

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
    """`wish`, or the cores that this process may use."""
    return wish or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def in_order(
    prepare: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """The result of each task, in the order of the tasks; in this process where one worker is
    enough.

    `prepare` is called once in each process and returns what does a task. It is picklable (a
    function of a module, a class, or a partial of one), and so are tasks and results, which should
    be small: large ones go through files. Raises UserError if a worker is killed, and whatever a
    task raises.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(prepare(), tasks)
        return
    # fresh processes: this one may have threads
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (prepare,))
    try:
        yield from pool.map(_run, tasks)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: run again, with fewer "
            "workers if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(prepare: Callable[[], Callable[[Task], Result]]) -> None:
    global _work
    begin_worker()
    _work = prepare()


def begin_worker() -> None:
    """To be called first in a worker process: it ends when its parent does, however that ends, and
    leaves Ctrl-C to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that lives on would still write when the same work is begun again."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    return _work(task)
