"""Processes that an engine starts: their output goes to a log file, and none of them outlives the
run.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO
from uuid import uuid4

ERROR = re.compile(r"\b((?:[A-Z]\w*)?(?:Error|Exception): .*)")
MARK = "IPT_ENGINE"  # environment variable of all processes that a reaper watches
# Standard input ends when the process at its other end does. Python's resource tracker is spared:
# it ends by itself, after it has freed the shared memory of the killed processes. Without /proc the
# script finds no process.
REAPER = """
cat > /dev/null
for process in /proc/[0-9]*; do
    if grep -qzxF -e "$1" "$process/environ" 2> /dev/null &&
        ! grep -q resource_tracker "$process/cmdline" 2> /dev/null
    then
        kill -9 "${process#/proc/}" 2> /dev/null
    fi
done
rm -rf -- "$2"
"""


class ProcessReaper:
    """Kills the processes that were started after its creation, on `close` or when this process
    ends, and removes the folder `scratch`.

    When a process that runs vLLM is killed (kill -9, out of memory), vLLM's own processes keep
    running and hold all of the GPU's memory, so the next run could not start. The reaper is a small
    shell process that waits for the end of this one, and then kills every process with its mark, an
    environment variable that child processes inherit. vLLM also leaves its sockets behind: they
    belong in `scratch`.
    """

    def __init__(self) -> None:
        mark = uuid4().hex
        self.scratch = tempfile.mkdtemp(prefix="ipt-engine-")
        # without the mark of another reaper, which would kill this one
        environment = dict(os.environ)
        environment.pop(MARK, None)
        self._process = subprocess.Popen(
            ["sh", "-c", REAPER, "sh", f"{MARK}={mark}", self.scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        os.environ[MARK] = mark

    def close(self) -> None:
        os.environ.pop(MARK, None)
        self._process.communicate()


class EngineLog:
    """A log of child processes. `close` removes it, unless an error refers to it."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="ipt-engine-", suffix=".log")
        os.close(handle)
        self.path = Path(name)
        self._keep = False

    @contextmanager
    def child_output(self) -> Iterator[None]:
        """Processes started inside write to the log for as long as they run. The output of this
        process is not affected.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with ExitStack() as undo, self.path.open("ab") as log:
            sys.stdout = _redirect(1, sys.stdout, log.fileno(), undo)
            sys.stderr = _redirect(2, sys.stderr, log.fileno(), undo)
            yield

    def cause(self) -> str:
        """The last error in the log that does not refer to another one, and the path of the log."""
        if not self.path.exists():
            return "its log has been deleted"
        self._keep = True
        errors = ERROR.findall(self.path.read_text(errors="replace", encoding="utf-8"))
        known = [error.strip() for error in errors if "see " not in error.lower()]
        return f"{known[-1] + '; ' if known else ''}its log is {self.path}"

    def close(self) -> None:
        if not self._keep:
            self.path.unlink(missing_ok=True)


def _redirect(descriptor: int, stream: TextIO, log: int, undo: ExitStack) -> TextIO:
    """Point `descriptor` to the log until `undo`, and return a stream that writes to the old
    target.
    """
    original = os.dup(descriptor)
    os.dup2(log, descriptor)
    undo.callback(os.close, original)
    undo.callback(os.dup2, original, descriptor)
    undo.callback(setattr, sys, "stdout" if descriptor == 1 else "stderr", stream)
    try:
        if stream.fileno() != descriptor:
            return stream  # the stream of a notebook or a test
    except OSError:
        return stream
    copy = os.fdopen(
        os.dup(original), "w", encoding=stream.encoding, errors=stream.errors, buffering=1
    )
    undo.callback(copy.close)
    return copy
