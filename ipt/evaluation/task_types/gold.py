"""The right options of a choice task: `gold` is an index or a text, the same in all rows."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ipt.errors import UserError
from ipt.evaluation.data import render_value
from ipt.evaluation.formats import DataRow, is_missing
from ipt.evaluation.odd_rows import OddRow
from ipt.evaluation.task import Task

INDEX, TEXT = "index", "text"
# 1.0: how pandas writes whole numbers in a column with missing values
DIGITS = re.compile(r"\s*(\d+)(?:\.0+)?\s*")


class Gold(NamedTuple):
    """The value of `gold` in a row, and the options."""

    where: str
    found: Any
    options: list[str]

    @property
    def values(self) -> list[Any]:
        return self.found if isinstance(self.found, list) else [self.found]


def gold_of(task: Task, row: DataRow, options: list[str]) -> Gold:
    """Raises OddRow for a row without a right option."""
    if "{" in task.gold:
        found = render_value(task, "gold", task.gold, row)
    elif task.gold in row.fields:
        found = row.fields[task.gold]
    else:
        raise OddRow(
            f"{row.where}: there is no field {task.gold} (the value of `gold`); there are "
            f"{', '.join(row.fields)}"
        )
    gold = Gold(row.where, found, options)
    if not gold.values or any(is_missing(value) or value == "" for value in gold.values):
        raise OddRow(f"{row.where}: field {task.gold} is {found!r}: the row has no right option")
    return gold


def meaning(task: Task, golds: Sequence[Gold]) -> str:
    """`index` or `text`: the value of `gold_is`, else the reading that all rows allow.

    Numbers are indices; a text of digits may be both. Raises UserError if the rows allow no
    reading, or two that differ.
    """
    if task.gold_is:
        if task.gold_is not in (INDEX, TEXT):
            raise UserError(
                f"task {task.name}: gold_is is {task.gold_is!r}, expected {INDEX} or {TEXT}"
            )
        return task.gold_is
    found = [(gold, _read(gold, INDEX), _read(gold, TEXT)) for gold in golds]
    no_index = next((gold for gold, index, _ in found if index is None), None)
    no_text = next((gold for gold, _, text in found if text is None), None)
    if no_index and no_text:
        neither = next(
            (gold for gold, index, text in found if index is None and text is None), None
        )
        raise _unread(task, neither) if neither else _mixed(task, no_text, no_index)
    if not no_index and not no_text:
        for gold, index, text in found:
            if index != text:
                raise _ambiguous(task, gold, index, text)
    return TEXT if no_index else INDEX


def right_options(task: Task, gold: Gold) -> tuple[int, ...]:
    """The indices of the right options, in the order of the row, read according to `gold_is`."""
    values = gold.values
    if task.gold_is == TEXT:  # 3 means "3"
        values = [
            str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for value in values
        ]
    found = _read(gold._replace(found=values), task.gold_is)
    if found is None:
        raise _unread(task, gold)
    return found


def _read(gold: Gold, kind: str) -> tuple[int, ...] | None:
    """Indices of the options if `gold` is read as `kind`; None if that is impossible."""
    indices = [
        _index(value, gold.options) if kind == INDEX else _place(value, gold.options)
        for value in gold.values
    ]
    known = tuple(dict.fromkeys(index for index in indices if index is not None))
    return None if None in indices else known


def _index(value: Any, options: list[str]) -> int | None:
    if isinstance(value, str) and (digits := DIGITS.fullmatch(value)):
        value = int(digits[1]) if len(digits[1]) < 10 else None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    is_index = isinstance(value, int) and not isinstance(value, bool)
    return value if is_index and 0 <= value < len(options) else None


def _place(value: Any, options: list[str]) -> int | None:
    return options.index(value) if isinstance(value, str) and value in options else None


def _unread(task: Task, gold: Gold) -> UserError:
    index, text = f"an index from 0 to {len(gold.options) - 1}", "the text of an option"
    expected = {INDEX: index, TEXT: text}.get(task.gold_is, f"{index} or {text}")
    given = f" (gold_is: {task.gold_is})" if task.gold_is else ""
    return UserError(
        f"{gold.where}: field {task.gold} is {gold.found!r}, expected {expected} (or a list of "
        f"them){given}"
    )


def _mixed(task: Task, index: Gold, text: Gold) -> UserError:
    return UserError(
        f"task {task.name}: gold must be the same in all rows, an index or a text, but "
        f"{index.where} has an index ({index.found!r}) and {text.where} a text ({text.found!r})"
    )


def _ambiguous(
    task: Task, gold: Gold, index: tuple[int, ...] | None, text: tuple[int, ...] | None
) -> UserError:
    as_index, as_text = (
        ", ".join(f"{number} ({gold.options[number]!r})" for number in numbers or ())
        for numbers in (index, text)
    )
    return UserError(
        f"{gold.where}: field {task.gold} is {gold.found!r}, which means option {as_index} as an "
        f"index from 0, and option {as_text} as a "
        f"text: add gold_is: index or gold_is: text to the file of task {task.name}"
    )
