"""Runs tokenization jobs in parallel, one shard each, in this process or in worker processes."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ipt.errors import UserError
from ipt.parallel import begin_worker
from ipt.tokens.encode import Encoder, Encoding
from ipt.tokens.shards import Origin, ShardWriter
from ipt.tokens.tasks import TokenizeTask, read_rows

COUNT_EVERY = 256  # rows between two steps of the progress bar
# what the tokenizer's library reads
PARALLELISM, THREADS = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class TokenizeJob:
    """A task and the folder of its shard."""

    task: TokenizeTask
    shard: Path


def run_jobs(
    jobs: Sequence[TokenizeJob], encoding: Encoding, workers: int, advance: Callable[[float], None]
) -> None:
    """Write the shards of all jobs with `workers` cores. Calls `advance` with the number of
    finished rows.

    One worker or one job runs in this process. Extra cores become threads of the tokenizer. Raises
    the errors of a worker, and RuntimeError if one was killed; finished shards are kept.
    """
    if not jobs:
        return
    processes = min(workers, len(jobs))
    if processes > 1:
        _run_processes(jobs, encoding, processes, workers // processes, advance)
        return
    with _tokenizer_threads(workers > 1):
        encoder = Encoder(encoding)
        for job in jobs:
            _write_shard(job, encoder, encoding, advance)


def origin_of(task: TokenizeTask, encoding: Encoding) -> Origin:
    """What the index of the task's shard says that it was made with and from."""
    return Origin(encoding.fingerprint, encoding.begin, encoding.end, task.rows)


def _write_shard(
    job: TokenizeJob, encoder: Encoder, encoding: Encoding, advance: Callable[[float], None]
) -> None:
    uncounted = 0
    with ShardWriter(job.shard, origin_of(job.task, encoding)) as shard:
        for document in encoder.encode(read_rows(job.task)):
            shard.write(document)
            uncounted += 1
            if uncounted == COUNT_EVERY:
                advance(uncounted)
                uncounted = 0
    advance(uncounted)


@contextmanager
def _tokenizer_threads(several: bool) -> Iterator[None]:
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = str(several).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


# Processes
# ----------------------------------------------------------------------------------------------


def _run_processes(
    jobs: Sequence[TokenizeJob],
    encoding: Encoding,
    processes: int,
    threads: int,
    advance: Callable[[float], None],
) -> None:
    """Each process takes the next job that is left until there is none. A killed one can hold no
    lock that this one waits for.
    """
    # this process may have threads, which a fork would not survive
    context: Any = multiprocessing.get_context("spawn")
    following = context.Value("q", 0)
    rows = context.RawArray("q", processes)
    errors = context.SimpleQueue()
    workers = [
        context.Process(
            target=_work,
            args=(jobs, encoding, threads, following, rows, number, errors),
            daemon=True,
        )
        for number in range(processes)
    ]
    counted = 0
    try:
        for worker in workers:
            worker.start()
        while working := [worker.sentinel for worker in workers if worker.is_alive()]:
            connection.wait(working, timeout=0.2)
            if sum(rows) > counted:
                advance(sum(rows) - counted)
                counted = sum(rows)
            _check(workers, errors)
        _check(workers, errors)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    advance(sum(rows) - counted)


def _check(workers: Sequence[Any], errors: Any) -> None:
    """Raises the error of a failed worker."""
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed and not errors.empty():
        raise errors.get()
    if failed:
        if failed[0] > 0:  # it has printed the traceback of an error that is not the user's
            raise RuntimeError(f"a process that tokenises ended with exit code {failed[0]}")
        advice = (
            "if memory ran out, lower tokens.workers; finished shards are kept, so run the same "
            "command again to continue"
        )
        raise UserError(f"a process that tokenises was killed by signal {-failed[0]}: {advice}")


def _work(
    jobs: Sequence[TokenizeJob],
    encoding: Encoding,
    threads: int,
    following: Any,
    rows: Any,
    number: int,
    errors: Any,
) -> None:
    begin_worker()
    os.environ |= {PARALLELISM: str(threads > 1).lower(), THREADS: str(threads)}

    def advance(amount: float) -> None:
        rows[number] += int(amount)

    try:
        encoder = Encoder(encoding)
        while True:
            with following.get_lock():
                job, following.value = following.value, following.value + 1
            if job >= len(jobs):
                return
            _write_shard(jobs[job], encoder, encoding, advance)
    except (UserError, OSError) as error:
        errors.put(error)
        sys.exit(1)
