"""What the pieces share: a time budget, tables and checks that are on disk as soon as they are
known, and a command line.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import markdown_table
from ipt.stage import hardware, installed_versions

PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "cut off"


@dataclass
class Piece:
    """A running piece. Results are written at once, so a killed piece keeps what it has."""

    name: str
    folder: Path
    smoke: bool  # on a CPU with tiny shapes, to see that everything runs
    seconds: float  # it may take
    status: str = RUNNING
    reason: str = ""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def left(self) -> float:
        """Seconds until it must end."""
        return self.seconds - (time.monotonic() - self.started)

    def reach(self, what: str, seconds: float) -> bool:
        """Whether there is time for work of `seconds`; if not, it is listed as not reached."""
        if self.left >= seconds:
            return True
        self.not_reached.append(what)
        self.save()
        return False

    def row(self, table: str, cells: dict[str, Any]) -> None:
        self.tables.setdefault(table, []).append(cells)
        self._say(
            f"{table}: "
            + ", ".join(
                f"{name} {shown(value)}" for name, value in cells.items() if value is not None
            )
        )

    def check(self, what: str, found: float, limit: float) -> None:
        """Passes if `found` is at most `limit`; NaN does not."""
        self.checks.append(
            {"check": what, "found": found, "at most": limit, "passed": bool(found <= limit)}
        )
        self._say(
            f"{'passed' if found <= limit else 'FAILED'}: {what}: {shown(found)}, at most "
            f"{shown(limit)}"
        )

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)

    def finish(self, status: str, reason: str = "") -> None:
        self.status, self.reason = status, reason
        self._say(f"{status}{': ' if reason else ''}{reason}")

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            **{
                name: getattr(self, name)
                for name in (
                    "name",
                    "smoke",
                    "status",
                    "reason",
                    "tables",
                    "checks",
                    "notes",
                    "not_reached",
                )
            },
            "seconds": round(time.monotonic() - self.started, 1),
            "versions": installed_versions(),
            "hardware": hardware(),
        }
        (self.folder / f"{self.name}.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )
        (self.folder / f"{self.name}.md").write_text(markdown(record), encoding="utf-8")

    def _say(self, text: str) -> None:
        print(f"[{self.name}] {text}", flush=True)
        self.save()


def run(name: str, work: Callable[[Piece], None], packages: Sequence[str] = ()) -> None:
    """The command line of a piece: `work` on what it asks for. Exits with 1 if a check or the work
    itself failed.

    Without one of `packages` it is skipped.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="where NAME.json and NAME.md go")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--seconds", type=float, default=540.0, help="time budget")
    arguments = parser.parse_args()
    piece = Piece(name, arguments.folder.absolute(), arguments.smoke, arguments.seconds)
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        piece.finish(SKIPPED, f"not installed: {', '.join(missing)}")
    elif not piece.smoke and not torch.cuda.is_available():
        piece.finish(FAILED, "there is no NVIDIA GPU here; --smoke runs on a CPU")
    else:
        _work(piece, work)
    sys.exit(piece.status == FAILED)


def _work(piece: Piece, work: Callable[[Piece], None]) -> None:
    piece.save()
    try:
        work(piece)
    except Exception as error:
        traceback.print_exc()
        piece.finish(
            FAILED, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return
    failed = sum(not check["passed"] for check in piece.checks)
    counted = f"{len(piece.checks)} checks" if piece.checks else ""
    piece.finish(FAILED if failed else PASSED, f"{failed} of {counted}" if failed else counted)


def markdown(record: dict[str, Any]) -> str:
    """A piece's record as a page: tables, checks, and what was not reached."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = ", ".join(record["hardware"]["gpus"]) or f"CPU, {record['hardware']['cpus']} cores"
    lines = [
        f"## {record['name']}: {record['status']}"
        + (f" ({record['reason']})" if record["reason"] else ""),
        "",
    ]
    lines += [
        f"{machine}; {versions}; {record['seconds']:.0f} s"
        + ("; smoke test, no figures" if record["smoke"] else ""),
        "",
    ]
    for title, rows in record["tables"].items():
        lines += [f"**{title}**", "", *table(rows), ""]
    if record["checks"]:
        lines += ["**Checks**", "", *table(record["checks"]), ""]
    lines += [f"- {note}" for note in record["notes"]]
    lines += [f"- not reached: {what}" for what in record["not_reached"]]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    return markdown_table(rows, shown)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 10_000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of `repeats` runs after two to warm up; a GPU is waited for."""
    taken = []
    for number in range(repeats + 2):
        _wait(device)
        clock = time.perf_counter()
        work()
        _wait(device)
        if number >= 2:
            taken.append(1000 * (time.perf_counter() - clock))
    return sorted(taken)[len(taken) // 2]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
