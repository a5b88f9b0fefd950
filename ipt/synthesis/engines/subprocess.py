"""Where an engine's processes write: to a log of their own, so that the terminal shows the run and
not its machinery.
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

MARK = "IPT_ENGINE"
# Standard input ends when the process that holds its other end does. Python's resource tracker is
# spared: it ends by itself and first frees the shared memory that the killed ones leave behind.
# Where there is no /proc, nothing is found and nothing happens.
SCRIPT = """
cat > /dev/null
for process in /proc/[0-9]*; do
    if grep -qzxF -e "$1" "$process/environ" 2> /dev/null && ! grep -q resource_tracker "$process/cmdline" 2> /dev/null; then
        kill -9 "${process#/proc/}" 2> /dev/null
    fi
done
rm -rf -- "$2"
"""
ERROR = re.compile(r"\b((?:[A-Z]\w*)?(?:Error|Exception): .*)")


class EngineLog:
    """A file for what child processes print. It is removed by `close` unless it was pointed to in
    an error.
    """

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="ipt-engine-", suffix=".log")
        os.close(handle)
        self.path = Path(name)
        self._keep = False

    @contextmanager
    def child_output(self) -> Iterator[None]:
        """Processes that are started inside print to the log for as long as they live; this process
        prints where it did.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with ExitStack() as undo, self.path.open("ab") as log:
            sys.stdout = _moved(1, sys.stdout, log.fileno(), undo)
            sys.stderr = _moved(2, sys.stderr, log.fileno(), undo)
            yield

    def cause(self) -> str:
        """The last error in the log that does not merely point to another one, and where to read
        more.
        """
        if not self.path.exists():
            return "its log has been deleted"
        self._keep = True
        errors = ERROR.findall(self.path.read_text(errors="replace", encoding="utf-8"))
        known = [error.strip() for error in errors if "See " not in error and "see " not in error]
        return f"{known[-1] + '; ' if known else ''}its log is {self.path}"

    def close(self) -> None:
        if not self._keep:
            self.path.unlink(missing_ok=True)


def _moved(descriptor: int, stream: TextIO, log: int, undo: ExitStack) -> TextIO:
    """Point `descriptor` to the log until `undo`, and give a stream that writes where it pointed."""
    original = os.dup(descriptor)
    os.dup2(log, descriptor)
    undo.callback(os.close, original)
    undo.callback(os.dup2, original, descriptor)
    undo.callback(setattr, sys, "stdout" if descriptor == 1 else "stderr", stream)
    try:
        if stream.fileno() != descriptor:
            return stream  # a notebook's or a test's own stream
    except OSError:
        return stream
    mine = os.fdopen(
        os.dup(original), "w", encoding=stream.encoding, errors=stream.errors, buffering=1
    )
    undo.callback(mine.close)
    return mine


class ProcessReaper:
    """From its making on, processes that this one starts end with it; `close` ends those that are
    left, and the keeper.

    The folder `scratch` is removed thereafter.
    """

    def __init__(self) -> None:
        mark = uuid4().hex
        self.scratch = tempfile.mkdtemp(prefix="ipt-engine-")
        command = ["sh", "-c", SCRIPT, "sh", f"{MARK}={mark}", self.scratch]
        unmarked = {
            name: value for name, value in os.environ.items() if name != MARK
        }  # another engine's keeper must spare this one
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=unmarked,
            start_new_session=True,
        )
        os.environ[MARK] = mark

    def close(self) -> None:
        os.environ.pop(MARK, None)
        self._process.communicate()
