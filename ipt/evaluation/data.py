"""Rows of a task's data, templates over them, and reproducible draws from them."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.errors import MissingFileError, UserError
from ipt.evaluation.formats import DataRow, as_fields, is_missing, read_file, read_hub
from ipt.evaluation.odd_rows import OddRow, OddRows
from ipt.evaluation.task import CORPUS, HUB, Task
from ipt.files import read_parts

ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
NUMBER = "\ue0f8"  # private use: marks a number that is the value of an expression


def _marked(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{NUMBER}{value}" if is_number else value


NUMBERS = ENVIRONMENT.overlay(finalize=_marked)


class Item(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def prompt_hash(self) -> str: ...


def read_rows(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[DataRow]:
    """The rows that the task's `where` and `keep` select. `corpus`: folder of a finished corpus
    stage.

    Rows without a field that `keep` or `distractors` use are added to `odd`. Raises
    MissingFileError or UserError.
    """
    odd = OddRows() if odd is None else odd
    found: dict[str, None] = {}
    chosen = []
    for row in _joined(task, _all_rows(task, corpus)):
        values = {key: row.fields.get(key) for key in task.where}
        found[", ".join(f"{key}={value}" for key, value in values.items())] = None
        if values == task.where:
            chosen.append(row)
    kept = dict(odd.kept(task, chosen, lambda row: (row.number, _is_kept(task, row))))
    rows = [row for row in chosen if kept.get(row.number)]
    odd.read += len(chosen) - sum(not is_kept for is_kept in kept.values())
    if not rows:
        raise _no_rows(task, corpus, list(found))
    if not task.distractors:
        return rows
    return with_distractors(task, odd.kept(task, rows, partial(_with_fields, task)))


def _no_rows(task: Task, corpus: Path | None, found: list[str]) -> UserError:
    """`found`: the values of the fields in `where`."""
    place = data_path(task, corpus) or task.data
    wanted = [f"{key}={value}" for key, value in task.where.items()]
    if task.keep:
        wanted.append(f"keep={task.keep!r}")
    if not wanted or not found:
        return UserError(f"task {task.name}: {place} holds no rows")
    others = "; ".join(found[:6]) if task.where else "other rows"
    return UserError(
        f"task {task.name}: {place} holds no row with {', '.join(wanted)}: found {others}"
    )


def data_path(task: Task, corpus: Path | None) -> Path | None:
    """The file or folder that the task reads; None for a hub or a URL."""
    if path := task.path:
        if not path.exists():
            place = "the folder of the task's YAML file"
            if task.data_dir in path.parents:
                place = f"data_dir={task.data_dir}"
            raise MissingFileError(
                f"task {task.name}: data file {path} does not exist (it is relative to {place})"
            )
        return path
    if not task.needs_corpus:
        return None
    name = task.data.removeprefix(CORPUS)
    if corpus is None:
        raise UserError(
            f"task {task.name} reads {name} of a corpus, but no corpus is given: name one, or "
            "leave the task out"
        )
    path = corpus / name
    if not path.exists():
        raise MissingFileError(
            f"task {task.name}: the corpus in {corpus} has no {path.name}: use another corpus, or "
            "leave the task out"
        )
    return path


def subset(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items in order, selected by the hash of their ids: the same ones for every
    model and on every machine.
    """
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(range(len(items)), key=lambda index: text_hash(items[index].id))[:limit]
    return [items[index] for index in sorted(chosen)]


def row_id(task: Task, row: DataRow) -> str:
    value = row.fields.get(task.id)
    return str(row.number) if value is None else str(value)


def check_ids(task: Task, items: Iterable[Item]) -> None:
    """Raise UserError for two items with the same id."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"task {task.name}: two items have the {task.id} {item.id!r}, expected unique ids"
            )
        seen.add(item.id)


def render_prompt(task: Task, row: DataRow, **more: Any) -> str:
    """The prompt for a row."""
    return render(task, "prompt", phrasing(task, row_id(task, row)), row, **more)


def phrasing(task: Task, item: str) -> str:
    """The prompt template of the item with this id: of several, its hash selects one."""
    if isinstance(task.prompt, str):
        return task.prompt
    return task.prompt[int(text_hash(item), 16) % len(task.prompt)]


def render(task: Task, key: str, template: str, row: DataRow, **more: Any) -> str:
    """`template`, which is the value of `key`, with the row's fields.

    Raises OddRow if a field is missing or null.
    """
    if "{" not in template:
        return template
    return _rendered(task, key, template, row, ENVIRONMENT, more)


def render_value(task: Task, key: str, template: str, row: DataRow) -> str | float:
    """As `render`, but a number if the template is an expression with a number as its value."""
    found = _rendered(task, key, template, row, NUMBERS, {})
    if marked := re.fullmatch(rf"\s*{NUMBER}(-?\d+(\.\d+)?)\s*", found):
        return float(marked[1]) if marked[2] else int(marked[1])
    return found.replace(NUMBER, "")


def _rendered(
    task: Task,
    key: str,
    template: str,
    row: DataRow,
    environment: SandboxedEnvironment,
    more: dict[str, Any],
) -> str:
    try:
        compiled = _compile(environment, template)
    except (TemplateSyntaxError, RecursionError, ValueError) as error:
        raise UserError(
            f"task {task.name}: {key} is not a valid template: {first_line(error)}"
        ) from None
    known = {name: value for name, value in row.fields.items() if not is_missing(value)}
    try:
        return compiled.render({**known, **more})
    except Exception as error:  # expressions in a template raise any exception
        kind = OddRow if isinstance(error, UndefinedError) else UserError
        raise kind(
            f"{row.where}: task {task.name} cannot fill its {key}: {first_line(error)}; the row "
            f"has {', '.join(known)}"
        ) from None


@lru_cache
def _compile(environment: SandboxedEnvironment, template: str) -> Template:
    return environment.from_string(template)


# Which rows
# ----------------------------------------------------------------------------------------------


def _all_rows(task: Task, corpus: Path | None) -> Iterator[DataRow]:
    path = data_path(task, corpus)
    if path is not None and path.is_dir():
        rows: Iterator[DataRow] = (
            DataRow(f"{path} row {number + 1}", number, fields)
            for number, fields in enumerate(read_parts(path))
        )
    elif path is not None:
        rows = read_file(task, CorpusFile(str(path), path.name))
    elif task.data.startswith(HUB):
        rows = read_hub(task)
    else:
        file = task.file
        assert file is not None, f"data of {task.name} is not read from files"
        rows = read_file(task, file)
    if not task.records:
        return rows
    records = (record for row in rows for record in _records(task, row, task.records.split(".")))
    return (record._replace(number=number) for number, record in enumerate(records))


def _records(task: Task, row: DataRow, path: list[str]) -> Iterator[DataRow]:
    """The rows inside a row, which inherit its other fields."""
    if not path:
        yield row
        return
    name, *further = path
    outer = {key: value for key, value in row.fields.items() if key != name}
    entries = row.fields.get(name)
    if not isinstance(entries, list | dict):
        raise UserError(
            f"{row.where}: {name} of records={task.records} is {str(entries)[:40]!r}, expected a "
            "list or an object"
        )
    for number, entry in enumerate([entries] if isinstance(entries, dict) else entries):
        inner = DataRow(f"{row.where}, {name} {number + 1}", 0, {**outer, **as_fields(entry)})
        yield from _records(task, inner, further)


def _joined(task: Task, rows: Iterable[DataRow]) -> Iterator[DataRow]:
    """The rows with the fields of the rows of `join` with the same ids."""
    if (source := task.joined) is None:
        yield from rows
        return
    more = {row_id(source, row): row.fields for row in _all_rows(source, None)}
    matched = 0
    for row in rows:
        fields = more.get(row_id(task, row))
        matched += fields is not None
        yield row._replace(fields={**(fields or {}), **row.fields})
    if not matched:
        raise UserError(
            f"task {task.name}: none of the {len(more)} rows of join={task.join} has the {task.id} "
            f"of a row of {task.data}"
        )


def _with_fields(task: Task, row: DataRow) -> DataRow:
    """The row. Raises OddRow if a field of `distractors` is missing, UserError if it is no text."""
    for key in filter(None, (task.distractors["field"], task.distractors.get("near", ""))):
        value = row.fields.get(key)
        if not value or not isinstance(value, str):
            kind = OddRow if value is None or value == "" else UserError
            raise kind(
                f"{row.where}: field {key} is {value!r}, expected a text (distractors uses it)"
            )
    return row


def _is_kept(task: Task, row: DataRow) -> bool:
    if not task.keep:
        return True
    rendered = render(task, "keep", task.keep, row).strip()
    if rendered not in ("True", "False"):
        raise UserError(
            f"{row.where}: keep of task {task.name} renders {rendered!r}, expected True or False"
        )
    return rendered == "True"


# Wrong options from other rows
# ----------------------------------------------------------------------------------------------


def with_distractors(task: Task, rows: list[DataRow]) -> list[DataRow]:
    """The rows with two more fields: `options`, their own value of `distractors.field` among values
    of other rows, and `gold`, its index.

    `distractors.number` is the number of wrong options. Rows with the same value of the field
    `distractors.near` are used first, since options from the same chapter are harder to
    distinguish. Values that differ only in case are equal. The draw depends only on the rows.
    Raises UserError if there are too few values.
    """
    name = task.distractors["field"]
    near = task.distractors.get("near", "")
    everywhere = [row.fields[name] for row in rows]
    neighbours: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        neighbours[row.fields.get(near, "")].append(row.fields[name])
    return [
        _with_options(task, row, [neighbours[row.fields.get(near, "")], everywhere]) for row in rows
    ]


def _with_options(task: Task, row: DataRow, pools: list[list[str]]) -> DataRow:
    name = task.distractors["field"]
    number = task.distractors["number"]
    right = row.fields[name]
    key = f"{row.number}/{right}"
    others: dict[str, str] = {}  # casefolded value -> value
    drawn = ((pool[index] for index in draw(len(pool), key)) for pool in pools)
    for value in chain.from_iterable(drawn):
        if value.casefold() != right.casefold():
            others.setdefault(value.casefold(), value)
        if len(others) == number:
            break
    if len(others) < number:
        raise UserError(
            f"{row.where}: {len(others)} other values of {name} than {right!r}, expected {number}: "
            "lower distractors.number"
        )
    ordered = [right, *others.values()]
    options = [ordered[index] for index in draw(len(ordered), f"{key}/order")]
    return row._replace(fields={**row.fields, "options": options, "gold": options.index(right)})


# Draws that are the same on every machine and in every version of Python
# ----------------------------------------------------------------------------------------------


def draw(size: int, key: str) -> Iterator[int]:
    """The numbers below `size` in an order that `key` determines, computed lazily."""
    seen: set[int] = set()
    for attempt in count():
        if len(seen) == size:
            return
        number = int(text_hash(f"{key}/{attempt}"), 16) % size
        if number not in seen:
            seen.add(number)
            yield number


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
