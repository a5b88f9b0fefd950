"""What a person sees while a command runs: one console and one style of progress bar."""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

WIDE = 160  # columns where there is no terminal, so that tables in a job's log do not fold


def use_utf8() -> None:
    """Let standard output and standard error take any text, whatever the locale: to be called first in a command.

    A stream in ASCII, the encoding of the locale C, becomes UTF-8. Others keep their encoding, and write what it lacks as \\uXXXX.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors="backslashreplace")


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
    """A progress bar on standard error, unless `hidden`; without a terminal it prints its last state once, at the end."""
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
