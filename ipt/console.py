"""What a person sees while a command runs: the console, logging and progress.

Modules log with `logging.getLogger(__name__)`; `setup_logging` shows these records on standard
error. `hydra.verbose=true` shows debug records too, `hydra.verbose=ipt.training` those of one
package.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from ipt.distributed import rank

UTF8_MODE = "PYTHONUTF8"  # environment variable of Python's
WIDE = 160  # columns without a terminal, so that tables in a log file are not folded
EVERY_SECONDS = 30  # without a terminal, between two lines of progress
STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "red"}
NOISY = (  # libraries whose informational records are of no use to users
    "bitsandbytes",
    "httpx",
    "lightning.fabric",
    "lightning.pytorch",
    "ray",
    "transformers",
    "urllib3",
    "vllm",
    "wandb",
)

log = logging.getLogger(__name__)


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


class RankFilter(logging.Filter):
    """Lets processes other than rank 0 log only warnings and errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return rank() == 0 or record.levelno >= logging.WARNING


class ConsoleHandler(logging.Handler):
    """Prints records on `console`, above a progress bar if there is one.

    Long lines are not folded, so that paths can be copied. A record may name a style of rich:
    `log.info("…", extra={"style": "dim"})`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        style = getattr(record, "style", STYLES.get(record.levelno))
        text = self.format(record)
        if not console.is_terminal:
            text = f"{time.strftime('%H:%M:%S')} {text}"
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def setup_logging() -> None:
    """Show log records on the console. Levels that are already set, as by `hydra.verbose`, stay."""
    root = logging.getLogger()
    if any(isinstance(handler, ConsoleHandler) for handler in root.handlers):
        return
    handler = ConsoleHandler()
    handler.addFilter(RankFilter())
    root.addHandler(handler)
    if root.level == logging.DEBUG:
        return
    root.setLevel(logging.INFO)
    for name in NOISY:
        library = logging.getLogger(name)
        if library.level == logging.NOTSET:
            library.setLevel(logging.ERROR)


class Progress:
    """Progress of a long piece of work: `advance()` moves it; `note` is shown after it."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total = description, total
        self.done: float = 0
        self.note = ""
        self._started = time.monotonic()
        self._bar: tuple[rich.progress.Progress, rich.progress.TaskID] | None = None

    def show(self, bars: rich.progress.Progress) -> None:
        """Show it as a bar of `bars`."""
        self._bar = bars, bars.add_task(self.description, total=self.total, note="")

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.done += amount
        self.note = self.note if note is None else note
        if self._bar is not None:
            bars, task = self._bar
            bars.update(task, advance=amount, note=self.note)

    def line(self) -> str:
        """The state as text: `train: 12% (3/24), 0.5/s, 0:42 left`."""
        seconds = time.monotonic() - self._started
        rate = self.done / seconds if seconds else 0.0
        parts = [f"{self.done:,.0f} done"]
        if self.total:
            parts = [f"{self.done / self.total:.0%} ({self.done:,.0f}/{self.total:,.0f})"]
        if rate:
            parts.append(f"{rate:,.2f}/s")
        if rate and self.total:
            left = timedelta(seconds=round(max(0.0, self.total - self.done) / rate))
            parts.append(f"{left} left")
        return f"{self.description}: {', '.join([*parts, self.note] if self.note else parts)}"


@contextmanager
def progress(description: str, total: float | None, hidden: bool = False) -> Iterator[Progress]:
    """Show progress on standard error, unless `hidden`: a bar on a terminal, else a line in the log
    every 30 seconds.
    """
    made = Progress(description, total)
    if hidden:
        yield made
    elif console.is_terminal:
        with rich.progress.Progress(*_columns(), console=console) as bars:
            made.show(bars)
            yield made
    else:
        ended = threading.Event()
        thread = threading.Thread(target=_log_progress, args=(made, ended), daemon=True)
        thread.start()
        try:
            yield made
        finally:
            ended.set()
            thread.join()


def _log_progress(shown: Progress, ended: threading.Event) -> None:
    while not ended.wait(EVERY_SECONDS):
        log.info(shown.line())


def _columns() -> list[rich.progress.ProgressColumn]:
    return [
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(Column(no_wrap=True)),  # on a narrow terminal the bar becomes shorter
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
    ]
