"""What `gold` of a choice task names: the index of the right option or its text. One meaning holds
for all rows of a task.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ipt.errors import UserError
from ipt.evaluation.data import render_value
from ipt.evaluation.formats import DataRow, is_missing
from ipt.evaluation.odd_rows import OddRow
from ipt.evaluation.task import Task

INDEX, TEXT = "index", "text"
# 1.0: what table programs make of whole numbers in a column with gaps
DIGITS = re.compile(r"\s*(\d+)(?:\.0+)?\s*")


class Gold(NamedTuple):
    """What a row gives as its right options, and the options that it may mean."""

    where: str
    found: Any  # as the row has it
    options: list[str]

    @property
    def values(self) -> list[Any]:
        return self.found if isinstance(self.found, list) else [self.found]


def gold_of(task: Task, row: DataRow, options: list[str]) -> Gold:
    """The row's gold. Raises OddRow for a row without one."""
    if "{" in task.gold:
        found = render_value(task, "gold", task.gold, row)
    elif task.gold in row.fields:
        found = row.fields[task.gold]
    else:
        raise OddRow(
            f"{row.where}: there is no field {task.gold}, which the task's key `gold` names; there "
            f"are {', '.join(row.fields)}"
        )
    gold = Gold(row.where, found, options)
    if not gold.values or any(is_missing(value) or value == "" for value in gold.values):
        raise OddRow(f"{row.where}: field {task.gold} is {found!r}: the row has no right option")
    return gold


def meaning(task: Task, golds: Sequence[Gold]) -> str:
    """`index` or `text`: what the key `gold_is` says, else what all rows allow.

    Numbers are indices; a text of digits may be either. Raises UserError if the rows allow both and
    that makes a difference, or neither.
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
    """The indices of the right options, in the order in which the row gives them, by the task's
    `gold_is`.
    """
    values = gold.values
    if task.gold_is == TEXT:  # whether a file has 3 or "3"
        values = [
            str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for value in values
        ]
    found = _read(gold._replace(found=values), task.gold_is)
    if found is None:
        raise _unread(task, gold)
    return found


def _read(gold: Gold, kind: str) -> tuple[int, ...] | None:
    """The options that `gold` names if it is of this kind; None if it cannot be."""
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
    said = f", as gold_is: {task.gold_is} says" if task.gold_is else ""
    return UserError(
        f"{gold.where}: field {task.gold} is {gold.found!r}, expected {expected} (or a list of "
        f"them){said}"
    )


def _mixed(task: Task, index: Gold, text: Gold) -> UserError:
    return UserError(
        f"task {task.name}: gold means the same in all rows of a task, but {index.where} gives an "
        f"index ({index.found!r}) and {text.where} "
        f"the text of an option ({text.found!r}): write the same kind in all rows"
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
