"""Rows of data files and hub data sets in all formats."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.errors import UserError
from ipt.evaluation.task import HUB, Task

if TYPE_CHECKING:
    from _csv import Reader

CELL = 1 << 30  # maximum characters of a CSV cell


class DataRow(NamedTuple):
    """One row: its place for messages, its number from 0, its fields."""

    where: str
    number: int
    fields: dict[str, Any]


def read_file(task: Task, file: CorpusFile) -> Iterator[DataRow]:
    """The rows of a .jsonl, .json, .csv, .tsv, .conll (each also .gz or .zst) or .parquet file.

    - json: a list of objects, or an object whose values are rows, with their keys in the field
      `key`; values that are not objects are in the field `value`. An object with the first field of
      `records` is one row.
    - conll: a token in the first and its tag in the last column, empty lines between sentences. A
      row has `tokens`, `tags`, `text` (the tokens joined by spaces) and `entities` (with `text` and
      `type`).

    Raises UserError with file and row.
    """
    kind = _format(task, file)
    for key, kinds in {"columns": ("csv", "tsv"), "sentences": ("conll",)}.items():
        if kind not in kinds and getattr(task, key) != getattr(Task("", ""), key):
            raise UserError(
                f"task {task.name}: {key} is for {' and '.join(kinds)} files, but {file.path} has "
                f"the format {kind}"
            )
    try:
        if kind == "parquet":
            yield from _parquet(file)
            return
        with file.open_lines() as data:
            yield from FORMATS[kind](
                task, file.path, io.TextIOWrapper(data, encoding="utf-8-sig", newline="")
            )
    except (UnicodeDecodeError, pa.ArrowInvalid, csv.Error) as error:
        raise UserError(
            f"{file.path} cannot be read as {kind}: {' '.join(str(error).split())}"
        ) from None


def read_hub(task: Task) -> Iterator[DataRow]:
    """The rows of a data set of the Hugging Face hub, or of its cached copy if the hub cannot be
    reached.
    """
    from datasets import load_dataset  # takes seconds to import

    name, split = task.data.removeprefix(HUB), task.split or "test"
    called = "/".join(part for part in (name, task.subset) if part)
    try:
        rows = load_dataset(name, task.subset or None, split=split)
        for number, fields in enumerate(rows):
            yield DataRow(f"{called} split {split} row {number + 1}", number, fields)
    except Exception as error:  # network, server, format: any exception
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"task {task.name}: data set {called}, split {split}, cannot be read from the hub "
            f"({reason})"
        ) from None


def _format(task: Task, file: CorpusFile) -> str:
    whole = file.name.lower()
    name = whole.removesuffix(".gz").removesuffix(".zst")
    ending = name.rpartition(".")[2]
    found = task.format or ALIASES.get(ending, ending)
    known = [*FORMATS, "parquet"]
    if found in known and (found != "parquet" or name == whole):
        return found
    if task.format:
        raise UserError(f"task {task.name}: format is {task.format!r}, expected {', '.join(known)}")
    endings = ", ".join(f".{kind}" for kind in known)
    raise UserError(
        f"{file.path}: expected a file that ends in {endings} (all but .parquet also "
        "with .gz or .zst), or the task's key `format`"
    )


# One format each
# ----------------------------------------------------------------------------------------------


def _jsonl(task: Task, path: str, lines: Iterable[str]) -> Iterator[DataRow]:
    for number, line in enumerate(lines):
        if line.strip():
            where = f"{path} line {number + 1}"
            fields = _parse(line, where)
            if not isinstance(fields, dict):
                raise UserError(
                    f"{where}: found {type(fields).__name__}, expected an object with fields"
                )
            yield DataRow(where, number, fields)


def _json(task: Task, path: str, lines: io.TextIOWrapper) -> Iterator[DataRow]:
    content = _parse(lines.read(), path)
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield DataRow(f"{path} entry {number + 1}", number, as_fields(entry))
    elif isinstance(content, dict) and task.records and task.records.split(".")[0] in content:
        yield DataRow(path, 0, content)
    elif isinstance(content, dict):
        for number, (key, entry) in enumerate(content.items()):
            yield DataRow(f"{path} key {key}", number, {"key": key, **as_fields(entry)})
    else:
        raise UserError(f"{path}: found {type(content).__name__}, expected a list or an object")


def is_missing(value: Any) -> bool:
    """Null, or NaN, which tables use for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_fields(entry: Any) -> dict[str, Any]:
    """The fields of a row for an entry of a list."""
    return entry if isinstance(entry, dict) else {"value": entry}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise UserError(f"{where}: not valid JSON: {first_line(error)}") from None


def _csv(task: Task, path: str, lines: Iterable[str]) -> Iterator[DataRow]:
    yield from _table(task, path, csv.reader(lines, strict=True))


def _tsv(task: Task, path: str, lines: Iterable[str]) -> Iterator[DataRow]:
    """Quotation marks are ordinary characters."""
    yield from _table(task, path, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _table(task: Task, path: str, cells: "Reader") -> Iterator[DataRow]:
    csv.field_size_limit(CELL)
    columns = task.columns or next(cells, [])
    for number, row in enumerate(filter(None, cells)):
        where = f"{path} line {cells.line_num}"
        if len(row) != len(columns):
            raise UserError(
                f"{where}: {len(row)} cells, expected {len(columns)}: {', '.join(columns)}"
            )
        yield DataRow(where, number, dict(zip(columns, row, strict=True)))


def _parquet(file: CorpusFile) -> Iterator[DataRow]:
    number = 0
    with file.open_anywhere() as data, pq.ParquetFile(data) as table:
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield DataRow(f"{file.path} row {number + 1}", number, fields)
                number += 1


# CoNLL
# ----------------------------------------------------------------------------------------------


def _conll(task: Task, path: str, lines: Iterable[str]) -> Iterator[DataRow]:
    number = 0
    for first, document in _documents(path, lines):
        for begin in range(0, len(document), task.sentences):
            sentences = document[begin : begin + task.sentences]
            tokens, tags = zip(*chain.from_iterable(sentences), strict=True)
            fields = {
                "tokens": list(tokens),
                "tags": list(tags),
                "text": " ".join(tokens),
                "entities": list(chain.from_iterable(map(_entities, sentences))),
            }
            yield DataRow(f"{path} sentence {first + begin + 1}", number, fields)
            number += 1


def _documents(
    path: str, lines: Iterable[str]
) -> Iterator[tuple[int, list[list[tuple[str, str]]]]]:
    """The number of sentences before each document, and its sentences of tokens and tags."""
    before, document, sentence = 0, [], []
    for number, line in enumerate([*lines, "", "-DOCSTART-"]):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) < 2:
                raise UserError(
                    f"{path} line {number + 1}: {line.strip()!r}, expected a token and its tag"
                )
            sentence.append((cells[0], cells[-1]))
            continue
        if sentence:
            document.append(sentence)
            sentence = []
        if cells and document:
            yield before, document
            before, document = before + len(document), []


def _entities(sentence: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Runs of tokens of the same type, in the schemes IO, BIO and BIOES: B- and S- begin an entity,
    E- and S- end it.
    """
    found: list[tuple[list[str], str]] = []
    ended = True
    for token, tag in sentence:
        prefix, _, kind = tag.partition("-")
        if kind and not ended and prefix not in ("B", "S") and kind == found[-1][1]:
            found[-1][0].append(token)
        elif kind:
            found.append(([token], kind))
        ended = not kind or prefix in ("E", "S")
    return [{"text": " ".join(tokens), "type": kind} for tokens, kind in found]


ALIASES = {"ndjson": "jsonl"}
FORMATS: dict[str, Callable[[Task, str, io.TextIOWrapper], Iterator[DataRow]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "conll": _conll,
}
