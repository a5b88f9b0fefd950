"""What the benchmarks share: sides that take turns, the figures of each pass side by side, and
tables and files of them.
"""

import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

Figure = TypeVar("Figure")


@dataclass(frozen=True)
class Comparison:
    """A figure of this project and of a peer in each pass of the same work; without figures, the
    reason why there are none.
    """

    what: str
    unit: str = ""
    ours: list[float] = field(default_factory=list)
    peer: str = ""  # with its version; "": there is none to compare with
    theirs: list[float] = field(default_factory=list)
    less_is_better: bool = False
    note: str = ""
    missing: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times better this project is, of neighbouring passes, so that what else the
        machine does falls on both.
        """
        if not self.theirs:
            return []
        pairs = zip(self.ours, self.theirs, strict=True)
        return [theirs / ours if self.less_is_better else ours / theirs for ours, theirs in pairs]

    @property
    def cells(self) -> dict[str, str]:
        """Its row of a table."""
        names = {"what": self.what, "unit": self.unit, "peer": self.peer}
        if self.missing:
            return {
                **names,
                "ipt": "not measured",
                "of the peer": "",
                "ipt is better by": "",
                "passes": "",
                "note": self.missing,
            }
        return {
            **names,
            "ipt": spread(self.ours),
            "of the peer": spread(self.theirs),
            "ipt is better by": spread(self.ratios, "x"),
            "passes": str(len(self.ours)),
            "note": self.note,
        }


# Measuring
# ----------------------------------------------------------------------------------------------


def alternate(
    sides: Mapping[str, Callable[[], Figure]], passes: int, warm_up: int = 0
) -> dict[str, list[Figure]]:
    """What each side gives in each pass; they take turns, after passes to warm up."""
    given: dict[str, list[Figure]] = {name: [] for name in sides}
    for number in range(warm_up + passes):
        for name, side in sides.items():
            figure = side()
            if number >= warm_up:
                given[name].append(figure)
    return given


def clocked(work: Callable[[], Any]) -> Callable[[], float]:
    """The same work, that gives its seconds."""

    def run() -> float:
        clock = time.perf_counter()
        work()
        return time.perf_counter() - clock

    return run


def named(peer: str, package: str) -> str:
    """A peer's name with the version of its package, which is installed."""
    return f"{peer} ({package} {version(package)})"


# Showing
# ----------------------------------------------------------------------------------------------


def spread(values: Sequence[float], unit: str = "") -> str:
    """The median, and the range if there are several values; an empty string without values."""
    if not values:
        return ""
    median = short(statistics.median(values)) + unit
    return (
        median if len(values) == 1 else f"{median} ({short(min(values))} to {short(max(values))})"
    )


def short(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_table(
    rows: Sequence[Mapping[str, Any]], show: Callable[[Any], str] = str
) -> list[str]:
    """Lines of a Markdown table; columns are all keys, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [show(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in columns]
        for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


# A benchmark's result
# ----------------------------------------------------------------------------------------------


def add_json_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures of all passes there too"
    )


def report(comparisons: Sequence[Comparison], path: Path | None) -> None:
    """Print them as a table; with a path, which is that of --json, leave them there for `python -m
    benchmarks`.
    """
    from rich.console import Console
    from rich.table import Table

    rows = [comparison.cells for comparison in comparisons]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=180).print(table)
    if path:
        path.write_text(
            json.dumps([asdict(comparison) for comparison in comparisons], indent=1) + "\n",
            encoding="utf-8",
        )


def read_report(path: Path) -> list[Comparison]:
    return [Comparison(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
