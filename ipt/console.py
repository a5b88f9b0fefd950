"""What a person sees while a command runs: one console and one style of progress bar."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

UTF8_MODE = "PYTHONUTF8"  # environment variable of Python's
WIDE = 160  # columns where there is no terminal, so that tables in a job's log do not fold


def use_utf8() -> None:
    """Have arguments, file names and standard streams in UTF-8, whatever the locale: to be called
    first in a command.

    Where Python has chosen another encoding for file names, it is started again in its UTF-8 mode:
    libraries such as pyarrow take names as UTF-8 and would otherwise look for other files. What a
    stream cannot write, as a part of a name that is not UTF-8, it writes as `\\udcff`.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(UTF8_MODE) != "1":
        os.environ[UTF8_MODE] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def make_console(stderr: bool = False) -> Console:
    """A console as wide as its terminal; without one as wide as COLUMNS says, or WIDE."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


console = make_console(stderr=True)


class Bar:
    """One line of progress: `advance()` moves it, `note` is shown behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=amount, **fields)


@contextmanager
def progress(description: str, total: float | None, hidden: bool = False) -> Iterator[Bar]:
    """A progress bar on standard error, unless `hidden`; without a terminal it prints its last
    state once, at the end.
    """
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(Column(no_wrap=True)),  # where the terminal is narrow, the bar gives way
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=hidden) as bars:
        yield Bar(bars, bars.add_task(description, total=total, note=""))
