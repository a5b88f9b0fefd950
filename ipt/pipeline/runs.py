"""`python -m ipt runs [FOLDER]`: lists the runs and stages below a folder."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.cli import exit_on_user_error
from ipt.console import make_console
from ipt.errors import MissingFileError
from ipt.stage import MANIFEST, STARTED

METRICS, RESULTS, SWEEP = "metrics.jsonl", "results.json", "sweep.json"
FINISHED, RUNNING, INTERRUPTED = "finished", "running", "interrupted"
COLOURS = {FINISHED: "green", RUNNING: "cyan", INTERRUPTED: "yellow"}
# bytes at the end of metrics.jsonl that hold its last line
LAST = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A run or stage. `step`: of a training, such as "3 of 12"; `score`: of an evaluation."""

    folder: Path
    kind: str
    state: str
    key: str
    step: str
    score: str
    changed: float  # seconds since the epoch
    size: int  # bytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ipt runs", description="List runs and stages, the newest last."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where to look (default: outputs)",
    )
    folder = parser.parse_args(arguments).folder
    with exit_on_user_error():
        if not folder.is_dir():
            raise MissingFileError(
                f"{folder} is not a folder: give the folder that runs are written to"
            )
        make_console().print(_table(folder, list_runs(folder)))


def list_runs(folder: Path) -> list[Entry]:
    """The runs and stages below `folder`, the newest last. Does not follow links."""
    return sorted(map(_entry, _places(folder)), key=lambda entry: entry.changed)


def _places(folder: Path) -> Iterator[Path]:
    if any((folder / name).exists() for name in (MANIFEST, STARTED, SWEEP)):
        yield folder
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _places(path)


def _entry(folder: Path) -> Entry:
    name = next(name for name in (MANIFEST, STARTED, SWEEP) if (folder / name).exists())
    record = _read(folder / name)
    if name == MANIFEST:
        kind, state = (
            record.get("stage") or "reproduce",
            FINISHED if not record.get("not_done") else "finished in part",
        )
    elif name == STARTED:
        kind, state = record.get("stage", ""), RUNNING if _is_locked(folder) else INTERRUPTED
    else:
        kind, state = "sweep", ""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    step = _step(folder, record) if kind == "training" else ""
    score = _score(folder / RESULTS) if kind == "evaluation" else ""
    stats = [path.stat() for path in files]
    key = str(record.get("key", ""))[:8]
    return Entry(
        folder,
        kind,
        state,
        key,
        step,
        score,
        max(stat.st_mtime for stat in stats),
        sum(stat.st_size for stat in stats),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # a run may be writing it, or was deleted
        return {}
    return record if isinstance(record, dict) else {}


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of the stage, also on another machine."""
    lock = folder.parent / f".{folder.name}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _step(folder: Path, record: dict[str, Any]) -> str:
    total = record.get("config", {}).get("trainer", {}).get("max_steps", "?")
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LAST))
            return f"{json.loads(file.read().splitlines()[-1])['step']} of {total}"
    except (OSError, IndexError, KeyError, json.JSONDecodeError):
        return f"0 of {total}"


def _score(path: Path) -> str:
    from ipt.pipeline.commands import main_scores_of

    if not _read(path):
        return ""
    scores = main_scores_of(path.parent)
    name, value = next(iter(scores.items()))
    return f"{name} {value:.3f}" + (f" (+{len(scores) - 1})" if len(scores) > 1 else "")


# What is printed
# ----------------------------------------------------------------------------------------------


def _table(folder: Path, entries: list[Entry]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("folder", "what", "state", "key", "step", "score", "age", "size"):
        narrow = name not in ("folder", "score")
        table.add_column(
            name,
            justify="right" if name in ("age", "size") else "left",
            overflow="fold",
            no_wrap=narrow,
        )
    for entry in entries:
        state = f"[{COLOURS.get(entry.state, 'yellow')}]{entry.state}[/]" if entry.state else ""
        place = escape(str(entry.folder.relative_to(folder)))
        age, size = _age(time.time() - entry.changed), _size(entry.size)
        table.add_row(
            place, entry.kind, state, entry.key, entry.step, escape(entry.score), age, size
        )
    counts = {state: sum(entry.state == state for entry in entries) for state in COLOURS}
    table.caption = ", ".join(f"{count} {state}" for state, count in counts.items())
    table.caption_justify = "left"
    return table


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _size(count: int) -> str:
    return f"{count / (1 << 30):,.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):,.1f} MiB"
