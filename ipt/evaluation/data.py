"""Rows of a task's data, and templates over them."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Protocol

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from ipt.corpus.files import CorpusFile, first_line
from ipt.errors import MissingFileError, UserError
from ipt.evaluation.formats import DataRow, as_fields, is_missing, read_file, read_hub
from ipt.evaluation.odd_rows import OddRow, OddRows
from ipt.evaluation.task import CORPUS, HUB, Task
from ipt.files import read_parts

ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
NUMBER = "\ue0f8"  # of private use: stands before a number that an expression gives


def _marked(value: Any) -> Any:
    return (
        f"{NUMBER}{value}"
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else value
    )


NUMBERS = ENVIRONMENT.overlay(finalize=_marked)


class Item(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def prompt_hash(self) -> str: ...


def read_rows(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[DataRow]:
    """The rows that the task's `where` and `keep` select; `corpus` is the folder of a finished
    corpus stage.

    Rows without a field that the task's `keep` or `distractors` name are put down in `odd`. Raises
    MissingFileError or UserError in one line that names the file and what to do.
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
        place = data_path(task, corpus) or task.data
        wanted = ", ".join(
            [
                *(f"{key}={value}" for key, value in task.where.items()),
                *([f"keep={task.keep!r}"] if task.keep else []),
            ]
        )
        others = "; ".join(list(found)[:6]) if task.where else f"{len(found)} kinds of others"
        raise UserError(
            f"task {task.name}: {place} holds no row with {wanted}: found {others or 'no rows'}"
            if wanted and found
            else f"task {task.name}: {place} holds no rows"
        )
    if not task.distractors:
        return rows
    return with_distractors(task, odd.kept(task, rows, partial(_with_fields, task)))


def data_path(task: Task, corpus: Path | None) -> Path | None:
    """The file or folder that the task reads; None where it reads a hub or a URL."""
    if path := task.path:
        if not path.exists():
            place = (
                f"data_dir={task.data_dir}"
                if task.data_dir in path.parents
                else "the folder of the task's YAML file"
            )
            raise MissingFileError(
                f"task {task.name}: data file {path} does not exist (its path begins at {place})"
            )
        return path
    if not task.needs_corpus:
        return None
    name = task.data.removeprefix(CORPUS)
    if corpus is None:
        raise UserError(
            f"task {task.name} reads {name} of a corpus, but there is none: name a corpus, or "
            "leave the task out"
        )
    path = corpus / name
    if not path.exists():
        raise MissingFileError(
            f"task {task.name}: the corpus in {corpus} has no {path.name}: leave the task out, or "
            "use a corpus that has it"
        )
    return path


def subset(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, chosen by the hash of their ids, so that every model and machine gets
    the same ones; order is kept.
    """
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(range(len(items)), key=lambda index: text_hash(items[index].id))[:limit]
    return [items[index] for index in sorted(chosen)]


def row_id(task: Task, row: DataRow) -> str:
    value = row.fields.get(task.id)
    return str(row.number) if value is None else str(value)


def check_ids(task: Task, items: Iterable[Item]) -> None:
    """Two items of one id could not be told apart in the predictions."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"task {task.name}: two items have the {task.id} {item.id!r}: ids must be unique"
            )
        seen.add(item.id)


def render_prompt(task: Task, row: DataRow, **more: Any) -> str:
    """The task's prompt for a row. Of several phrasings the one that the hash of the row's id
    chooses, so no model gets another.
    """
    return render(task, "prompt", phrasing(task, row_id(task, row)), row, **more)


def phrasing(task: Task, item: str) -> str:
    """The template of the prompt of the item of this id."""
    if isinstance(task.prompt, str):
        return task.prompt
    return task.prompt[int(text_hash(item), 16) % len(task.prompt)]


def render(task: Task, key: str, template: str, row: DataRow, **more: Any) -> str:
    """The task's template for `key` filled with the row's fields.

    Raises OddRow if a field is missing, or null, which counts as missing.
    """
    return (
        template if "{" not in template else _rendered(task, key, template, row, ENVIRONMENT, more)
    )


def render_value(task: Task, key: str, template: str, row: DataRow) -> str | float:
    """As `render`; a number if the template is an expression that gives one."""
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
            f"task {task.name}: {key} is no valid template: {first_line(error)}"
        ) from None
    known = {name: value for name, value in row.fields.items() if not is_missing(value)}
    try:
        return compiled.render({**known, **more})
    except UndefinedError as error:
        raise OddRow(
            f"{row.where}: task {task.name} cannot fill its {key}: {first_line(error)}; the row "
            f"has {', '.join(known)}"
        ) from None
    except Exception as error:  # a template raises whatever its expressions do
        raise UserError(
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
    """The rows inside a row; they have its other fields too."""
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
    """The rows with the fields that `join` has for their ids."""
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
    """The row, if it has the fields that the task's distractors name."""
    for key in filter(None, (task.distractors["field"], task.distractors.get("near", ""))):
        if row.fields.get(key) in (None, ""):
            raise OddRow(
                f"{row.where}: field {key} is {row.fields.get(key)!r}, expected a text (the task's "
                "distractors name it)"
            )
    return row


def _is_kept(task: Task, row: DataRow) -> bool:
    if not task.keep:
        return True
    said = render(task, "keep", task.keep, row).strip()
    if said not in ("True", "False"):
        raise UserError(
            f"{row.where}: keep of task {task.name} reads {said!r}, expected True or False"
        )
    return said == "True"


# Wrong options from other rows
# ----------------------------------------------------------------------------------------------


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


# Draws that are the same on every machine and in every version of Python
# ----------------------------------------------------------------------------------------------


def draw(size: int, key: str) -> Iterator[int]:
    """The numbers below `size` in an order that `key` decides. Taking the first few costs no more
    than these.
    """
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
