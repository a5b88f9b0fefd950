"""The table of the planned mixture, shown at the start of a run."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table


def mixture_table(report: dict[str, Any]) -> RenderableType:
    """`report` is that of `ipt.mixture.report.plan_report`."""
    parts: list[RenderableType] = [_sources(report)]
    if report["padding"]:
        parts.append(
            f"{report['packing']}: {report['fill']:.2%} of the sequences filled, "
            f"{report['padding']:,} tokens of padding"
        )
    if report["course"]:
        parts.append(_course(report["course"]))
    return Group(*parts, *report["notes"])


def _sources(report: dict[str, Any]) -> Table:
    """A column for each source, so that it fits a narrow terminal."""
    about = "" if report["exact_cuts"] else "≈"
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "documents": lambda row: f"{row['documents']:,}",
        "unique tokens": lambda row: f"{row['unique_tokens']:,}",
        "requested": lambda row: f"{row['requested']:.2%}",
        "realised": lambda row: f"{row['realised']:.2%}",
        "of documents requested": lambda row: f"{row['requested_of_documents']:.2%}",
        "of documents realised": lambda row: f"{row['realised_of_documents']:.2%}",
        "trained tokens": lambda row: f"{row['tokens']:,}",
        "repeats": lambda row: f"{row['repeats']:.2f}",
        "truncated": lambda row: f"{about}{row['truncated']:,}",
        "split documents": lambda row: f"{about}{row['split_documents']:,}",
    }
    sources = report["sources"]
    if not all("requested_of_documents" in row for row in sources.values()):
        shown = {name: show for name, show in shown.items() if not name.startswith("of documents")}
    table = Table(
        title="Mixture, in tokens", title_justify="left", box=SIMPLE_HEAD, show_edge=False
    )
    table.add_column("")
    for source in sources:
        table.add_column(source, justify="right")
    for name, show in shown.items():
        table.add_row(name, *(show(row) for row in sources.values()))
    return table


def _course(course: list[dict[str, Any]]) -> Table:
    """Proportions in each tenth of the run."""
    table = Table(title="Share of the tokens in each tenth of the run", title_justify="left")
    table.add_column("source")
    tenths = [dict.fromkeys(course[0]["tokens"], 0), *(point["tokens"] for point in course[9::10])]
    for number in range(1, 11):
        table.add_column(f"to {number * 10}%", justify="right")
    for name in course[0]["tokens"]:
        shares = [
            (after[name] - before[name]) / max(1, sum(after.values()) - sum(before.values()))
            for before, after in pairwise(tenths)
        ]
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    return table
