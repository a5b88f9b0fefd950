"""The table that says what a run will train on, shown at its start."""

from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table


def mixture_table(report: dict[str, Any]) -> RenderableType:
    """`report` is that of `ipt.mixture.report.plan_report`."""
    parts: list[RenderableType] = [_sources(report)]
    if report["padding"]:
        parts.append(f"{report['packing']}: {report['fill']:.2%} of the sequences filled, {report['padding']:,} tokens of padding")
    if report["course"]:
        parts.append(_course(report["course"]))
    return Group(*parts, *report["notes"])


def _sources(report: dict[str, Any]) -> Table:
    table = Table(title="Mixture, in tokens", title_justify="left")
    of_documents = any("requested_of_documents" in row for row in report["sources"].values())
    about = "" if report["exact_cuts"] else "≈"
    columns = ["documents", "unique tokens", "requested", "realised", "trained tokens", "repeats", "truncated", "split documents"]
    if of_documents:
        columns[4:4] = ["of documents requested", "realised"]
    table.add_column("source")
    for name in columns:
        table.add_column(name, justify="right")
    for source, row in report["sources"].items():
        shares = [row["requested"], row["realised"]]
        if of_documents:
            shares += [row["requested_of_documents"], row["realised_of_documents"]]
        table.add_row(
            source,
            f"{row['documents']:,}",
            f"{row['unique_tokens']:,}",
            *(f"{share:.2%}" for share in shares),
            f"{row['tokens']:,}",
            f"{row['repeats']:.2f}",
            f"{about}{row['truncated']:,}",
            f"{about}{row['split_documents']:,}",
        )
    return table


def _course(course: list[dict[str, Any]]) -> Table:
    """Shares in each tenth of the run."""
    table = Table(title="Share of the tokens in each tenth of the run", title_justify="left")
    table.add_column("source")
    tenths = [dict.fromkeys(course[0]["tokens"], 0), *(point["tokens"] for point in course[9::10])]
    for number in range(1, 11):
        table.add_column(f"to {number * 10}%", justify="right")
    for name in course[0]["tokens"]:
        shares = [(after[name] - before[name]) / max(1, sum(after.values()) - sum(before.values())) for before, after in pairwise(tenths)]
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    return table
