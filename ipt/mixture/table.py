"""The table that says what a run will train on, shown at its start and kept in its summary."""

from typing import Any

from rich.table import Table


def mixture_table(report: dict[str, dict[str, Any]]) -> Table:
    """`report` is `Plan.report()`."""
    table = Table(title="Mixture, in tokens", title_justify="left")
    table.add_column("source")
    for name in ("documents", "unique tokens", "requested", "realised", "trained tokens", "repeats", "cut pieces"):
        table.add_column(name, justify="right")
    for source, row in report.items():
        table.add_row(
            source,
            f"{row['documents']:,}",
            f"{row['unique_tokens']:,}",
            f"{row['requested']:.2%}",
            f"{row['realised']:.2%}",
            f"{row['tokens']:,}",
            f"{row['repeats']:.2f}",
            f"{row['truncated']:,}",
        )
    return table
