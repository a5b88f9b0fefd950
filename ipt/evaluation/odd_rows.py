"""Rows of a task's data from which no item can be made: they are left out, counted and reported, or
raise an error (the task's key `odd_rows`).
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ipt.errors import UserError
from ipt.evaluation.formats import DataRow
from ipt.evaluation.task import Task

log = logging.getLogger(__name__)
LEAVE_OUT, ERROR = "leave_out", "error"  # values of `odd_rows`
LEFT_OUT = "left_out"  # entry in results.json
SHOWN = 5  # rows that a log line names
Made = TypeVar("Made")


class OddRow(UserError):
    """No item can be made from a row: a field is missing, it has no right answer, two options are
    equal.
    """


class OddRows:
    """The rows of one task that are left out."""

    def __init__(self) -> None:
        self.read = 0  # rows, including those left out
        self.of_shots: OddRows | None = None  # of the demonstrations' data, where it is other data
        self._found: dict[str, None] = {}  # messages, which begin with the row

    def __len__(self) -> int:
        return len(self._found)

    def kept(
        self, task: Task, rows: Iterable[DataRow], make: Callable[[DataRow], Made]
    ) -> list[Made]:
        """What `make` makes of each row, without odd rows. Raises OddRow if the task does not allow
        them, or if all rows are odd.
        """
        if task.odd_rows not in (LEAVE_OUT, ERROR):
            raise UserError(
                f"task {task.name}: odd_rows is {task.odd_rows!r}, expected {LEAVE_OUT} or {ERROR}"
            )
        made, first = [], None
        for row in rows:
            try:
                made.append(make(row))
            except OddRow as odd:
                if task.odd_rows == ERROR:
                    raise
                first = first or odd
                self._found[str(odd)] = None
        if first is not None and not made:
            raise first  # most likely a mistake in the task file
        return made

    def report(self, task: Task) -> None:
        """Log how many rows are left out, with the first ones and the reasons."""
        for odd, kind in ((self, "rows"), (self.of_shots, "rows of its demonstrations")):
            if odd:
                shown = "; ".join([*odd._found][:SHOWN])
                more = f"; and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
                log.warning(
                    f"task {task.name}: {len(odd)} of {odd.read} {kind} are left out (odd_rows: "
                    f"error makes this an error): {shown}{more}"
                )

    def entry(self) -> dict[str, Any]:
        """The entry in results.json."""
        return {"value": len(self), "stderr": None, "ci95": [None, None], "n": self.read}
