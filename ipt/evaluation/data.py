"""Rows of a task's data, and templates over them."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from ipt.evaluation.task import CORPUS, Task
from ipt.stage import read_parts

ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


class Row(NamedTuple):
    """One row of a file: where it is, for messages, and its fields."""

    where: str
    number: int
    fields: dict[str, Any]


class Item(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def prompt_hash(self) -> str: ...


def read_rows(task: Task, corpus: Path | None) -> list[Row]:
    """The rows that the task's `where` selects; `corpus` is the folder of a finished corpus stage.

    Raises FileNotFoundError or ValueError in one line that names the file and what to do.
    """
    path = data_path(task, corpus)
    found: dict[str, None] = {}
    rows = []
    for row in _read_all(path):
        values = {key: row.fields.get(key) for key in task.where}
        found[", ".join(f"{key}={value}" for key, value in values.items())] = None
        if values == task.where:
            rows.append(row)
    if not rows:
        wanted = ", ".join(f"{key}={value}" for key, value in task.where.items())
        raise ValueError(
            f"task {task.name}: {path} holds no row with {wanted}: found {'; '.join(list(found)[:6]) or 'no rows'}"
            if task.where
            else f"task {task.name}: {path} holds no rows"
        )
    return rows


def data_path(task: Task, corpus: Path | None) -> Path:
    """The file or folder that the task reads."""
    if path := task.path:
        if not path.exists():
            raise FileNotFoundError(f"task {task.name}: data file {path} does not exist (paths are relative to the task's YAML file)")
        return path
    assert task.needs_corpus, f"data of {task.name} is not read from files"
    name = task.data.removeprefix(CORPUS)
    if corpus is None:
        raise ValueError(f"task {task.name} reads {name} of a corpus, but there is none: name a corpus, or leave the task out")
    path = corpus / name
    if not path.exists():
        raise FileNotFoundError(
            f"task {task.name}: the corpus in {corpus} has no {path.name}: leave the task out, or use a corpus that has it"
        )
    return path


def subset(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, chosen by the hash of their ids, so that every model and machine gets the same ones; order is kept."""
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(range(len(items)), key=lambda index: text_hash(items[index].id))[:limit]
    return [items[index] for index in sorted(chosen)]


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_id(task: Task, row: Row) -> str:
    value = row.fields.get(task.id)
    return str(row.number) if value is None else str(value)


def check_ids(task: Task, items: Iterable[Item]) -> None:
    """Two items of one id could not be told apart in the predictions."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"task {task.name}: two items have the {task.id} {item.id!r}: ids must be unique")
        seen.add(item.id)


def render(task: Task, key: str, template: str, row: Row, **more: Any) -> str:
    """The task's template for `key` filled with the row's fields; a field that is null counts as missing."""
    try:
        compiled = _compile(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"task {task.name}: {key} is no valid template: {error.message}") from None
    known = {name: value for name, value in row.fields.items() if value is not None}
    try:
        return compiled.render({**known, **more})
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{row.where}: task {task.name} cannot fill its {key}: {error}; the row has {', '.join(known)}") from None


@lru_cache
def _compile(template: str) -> Template:
    return ENVIRONMENT.from_string(template)


def _read_all(path: Path) -> list[Row]:
    try:
        return list(_read(path))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _read(path: Path) -> Iterator[Row]:
    if path.is_dir():
        for number, fields in enumerate(read_parts(path)):
            yield Row(f"{path} row {number + 1}", number, fields)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield Row(f"{path} row {number + 1}", number, fields)
                number += 1
    else:
        raise ValueError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            where = f"{path} line {number + 1}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: found {type(fields).__name__}, expected an object with fields")
            yield Row(where, number, fields)
