"""Wrong options from other rows: makes questions of a glossary, or of any list of facts."""

from collections import defaultdict
from itertools import chain, islice

from ipt.errors import UserError
from ipt.evaluation.draws import draw
from ipt.evaluation.formats import DataRow
from ipt.evaluation.task import Task


def with_distractors(task: Task, rows: list[DataRow]) -> list[DataRow]:
    """The rows with two more fields: `options`, their own value of a field among other rows'
    values, and `gold`, its index.

    `distractors` says: `field`; `number` of wrong options; `near`, a field: rows with the same
    value of it are taken first, since options from the same chapter are harder to tell apart.
    Values that differ in case only are one. The draw depends on the rows alone. Raises UserError if
    a field is missing or there are too few values.
    """
    name, near = task.distractors["field"], task.distractors.get("near", "")
    for key in filter(None, (name, near)):
        if bare := next((row for row in rows if not isinstance(row.fields.get(key), str)), None):
            raise UserError(
                f"{bare.where}: field {key} is {bare.fields.get(key)!r}, expected a text (the "
                "task's distractors name it)"
            )
    everywhere = [row.fields[name] for row in rows]
    neighbours: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        neighbours[row.fields.get(near, "")].append(row.fields[name])
    return [
        _with_options(task, row, [neighbours[row.fields.get(near, "")], everywhere]) for row in rows
    ]


def _with_options(task: Task, row: DataRow, pools: list[list[str]]) -> DataRow:
    name, number = task.distractors["field"], task.distractors["number"]
    right, key = row.fields[name], f"{row.number}/{row.fields[name]}"
    others: dict[str, str] = {}  # without regard to case -> as it stands
    for value in chain.from_iterable(
        (pool[index] for index in draw(len(pool), key)) for pool in pools
    ):
        if value.casefold() != right.casefold():
            others.setdefault(value.casefold(), value)
        if len(others) == number:
            break
    if len(others) < number:
        raise UserError(
            f"{row.where}: {len(others)} other values of {name} than {right!r}, expected {number}: "
            "lower distractors.number"
        )
    options = [right, *others.values()]
    options = [options[index] for index in islice(draw(len(options), f"{key}/order"), len(options))]
    return row._replace(fields={**row.fields, "options": options, "gold": options.index(right)})
