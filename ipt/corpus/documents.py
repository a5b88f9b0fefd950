"""Documents as they come: the rows of Parquet, JSON lines and text files and of hub datasets.

Everything is streamed. What is held in memory is one batch of rows and, where the user names an id
field, a digest of each id.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from ipt.config import CorpusConfig
from ipt.corpus.hashing import short_hash
from ipt.corpus.readers.files import CorpusFile, first_line, json_lines, json_rows
from ipt.corpus.readers.find import find_files
from ipt.errors import UserError

SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("meta", pa.string())]
)
# of a column of a Parquet file at a time: a whole one can be as large as the corpus
READ_BYTES = 1 << 16
EMPTY, NO_TEXT = "empty text", "text is null"

# the text of a row that has more than one field for it
RowText = Callable[[Mapping[str, Any]], str]


class LeftOut(Exception):
    """Raised by a `RowText` for a row without a text; it says the reason, which is counted."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus, with where it comes from."""

    doc_id: str
    text: str
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, str]:
        """The row of `SCHEMA`."""
        return {
            "doc_id": self.doc_id,
            "text": self.text,
            "source": self.source,
            "meta": json.dumps(self.meta, ensure_ascii=False),
        }


@dataclass(frozen=True)
class CorpusRow:
    """One row of a file or data set before it is known to be a document."""

    where: str  # for messages: the file and the line in it
    source: str
    number: int  # counted from 1
    values: Mapping[str, Any]
    whole_file: bool = False  # a text file: it has no fields beside its text


def read_documents(
    config: CorpusConfig,
    dropped: Counter[str] | None = None,
    row_text: RowText | None = None,
    section: str = "corpus",
    files: Sequence[CorpusFile] = (),
) -> Iterator[Document]:
    """The documents of `config` (kind files or hub) in a fixed order: files by name, rows as they
    stand.

    A row's text is its `text_field`, or what `row_text` or else `template` makes of all its fields;
    `row_text` may raise UserError for a row it cannot read, or LeftOut. What a row has in the field
    `held_out_by` is kept in the document's `meta`. A .txt file is one document. Texts that are
    empty, white space only or null are left out and counted by reason in `dropped`. With `id_field`
    ids are taken as they are, and one that comes twice is an error: two texts under one id cannot
    be told apart later. Without it (and for .txt) the id is a hash of file name and row, so it is
    unique and stable. `section` is where the config has these settings, for messages. `files` are
    read instead of those that `path` leads to. Raises MissingFileError for a missing file,
    UserError for a row that cannot be read and for a corpus without any text.
    """
    dropped = Counter() if dropped is None else dropped
    if row_text is None and config.template:
        row_text = _template_text(config.template, section)
    seen: set[bytes] = set()
    documents = 0
    rows = (
        _hub_rows(config, section)
        if config.kind == "hub"
        else _file_rows(config, row_text is not None, section, files)
    )
    for row in rows:
        try:
            text = (
                _text(row, config.text_field, section)
                if row_text is None
                else _made_text(row, row_text)
            )
            if not text.strip():
                raise LeftOut(EMPTY)
        except LeftOut as reason:
            dropped[str(reason)] += 1
            continue
        documents += 1
        yield Document(
            _doc_id(row, config.id_field, seen),
            text,
            row.source,
            {"row": row.number, **_group(row, config.held_out_by)},
        )
    if not documents:
        raise UserError(
            f"{_corpus_name(config, section)}: the corpus is empty, it holds no document with text "
            f"({sum(dropped.values())} empty ones)"
        )


# One row
# ----------------------------------------------------------------------------------------------


def _template_text(template: str, section: str) -> RowText:
    try:
        compiled = SandboxedEnvironment(undefined=StrictUndefined).from_string(template)
    except (TemplateSyntaxError, RecursionError, ValueError) as error:
        raise UserError(f"{section}.template is no valid template: {first_line(error)}") from None

    def text(values: Mapping[str, Any]) -> str:
        try:
            return compiled.render(values)
        except Exception as error:  # a template raises whatever its expressions do
            raise UserError(
                f"{section}.template cannot be filled: {first_line(error)}; the row has "
                f"{', '.join(values)}"
            ) from None

    return text


def _group(row: CorpusRow, field_name: str | None) -> dict[str, str]:
    """The row's value of the field that documents are held out by, if it has one."""
    value = row.values.get(field_name) if field_name else None
    if field_name is None or value is None or row.whole_file:
        return {}
    if not isinstance(value, str | int):
        raise UserError(
            f"{row.where}: field {field_name!r} is {str(value)[:40]!r}, expected a name or a "
            "number: see corpus.held_out_by"
        )
    return {field_name: str(value)}


def _made_text(row: CorpusRow, row_text: RowText) -> str:
    try:
        text = row_text(row.values)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    return _encodable(text, row, ", ".join(row.values))


def _text(row: CorpusRow, field_name: str, section: str) -> str:
    if field_name not in row.values:
        raise UserError(
            f"{row.where}: no field {field_name!r}, only "
            f"{', '.join(map(repr, row.values)) or 'none'}: "
            f"set {section}.text_field to the text's"
        )
    text = row.values[field_name]
    if text is None:
        raise LeftOut(NO_TEXT)
    if not isinstance(text, str):
        raise UserError(
            f"{row.where}: field {field_name!r} is {type(text).__name__} {str(text)[:40]!r}, "
            "expected a string"
        )
    return _encodable(text, row, field_name)


def _doc_id(row: CorpusRow, field_name: str | None, seen: set[bytes]) -> str:
    if field_name is None or row.whole_file:
        return short_hash(row.source, row.number)
    value = row.values.get(field_name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(
            f"{row.where}: field {field_name!r} is {value!r}, expected an id (a string or a whole "
            "number): see corpus.id_field"
        )
    doc_id = _encodable(str(value), row, field_name)
    digest = blake2b(doc_id.encode(), digest_size=16).digest()
    if digest in seen:
        raise UserError(
            f"{row.where}: id {doc_id!r} was there before: ids must differ, or set "
            "corpus.id_field=null to number the rows"
        )
    seen.add(digest)
    return doc_id


def _encodable(text: str, row: CorpusRow, field_name: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which JSON can spell but no file can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{row.where}: field {field_name!r} holds half a surrogate pair at character "
            f"{error.start}: repair the row"
        ) from None
    return text


def _corpus_name(config: CorpusConfig, section: str) -> str:
    return (
        f"{section}.dataset={config.dataset}"
        if config.kind == "hub"
        else f"{section}.path={config.path}"
    )


# Files
# ----------------------------------------------------------------------------------------------


def _file_rows(
    config: CorpusConfig, all_fields: bool, section: str, files: Sequence[CorpusFile]
) -> Iterator[CorpusRow]:
    if not config.path and not files:
        raise UserError(
            f"{section}.path is not set: name a .parquet, .jsonl or .txt file, a folder or a glob"
        )
    columns = None if all_fields else [config.text_field, config.id_field, config.held_out_by]
    for file in files or find_files(config.path or "", key=f"{section}.path"):
        if file.kind == "parquet":
            yield from _parquet_rows(file, columns, section)
        elif file.kind == "txt":
            yield CorpusRow(
                file.path, file.name, 1, {config.text_field: _read_text(file)}, whole_file=True
            )
        elif file.kind == "json":
            yield from (
                CorpusRow(f"{file.where}, entry {number}", file.name, number, values)
                for number, values in json_rows(file)
            )
        else:
            yield from (
                CorpusRow(f"{file.where}, line {number}", file.name, number, values)
                for number, values in json_lines(file)
            )


def _parquet_rows(
    file: CorpusFile, columns: list[str | None] | None, section: str
) -> Iterator[CorpusRow]:
    with file.open_anywhere() as data:
        try:
            with pq.ParquetFile(data, pre_buffer=False, buffer_size=READ_BYTES) as table:
                _check_columns(file.where, table.schema_arrow, columns or [], section)
                known = columns and [name for name in columns if name in table.schema_arrow.names]
                number = 0
                for batch in table.iter_batches(batch_size=256, columns=known):
                    for values in batch.to_pylist():
                        number += 1
                        yield CorpusRow(f"{file.where}, row {number}", file.name, number, values)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file.where}: not a readable Parquet file ({first_line(error)})"
            ) from None


def _check_columns(path: str, schema: pa.Schema, columns: list[str | None], section: str) -> None:
    for name, key in zip(columns, ("text_field", "id_field"), strict=False):
        if name and name not in schema.names:
            raise UserError(
                f"{path}: no column {name!r}, only {', '.join(map(repr, schema.names))}: set "
                f"{section}.{key} to the right one"
            )


def _read_text(file: CorpusFile) -> str:
    with file.open_lines() as data:
        try:
            return data.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.where}: not UTF-8 (byte {error.start}): convert the file to UTF-8"
            ) from None


# Hub
# ----------------------------------------------------------------------------------------------


def _hub_rows(config: CorpusConfig, section: str) -> Iterator[CorpusRow]:
    if not config.dataset:
        raise UserError(
            f"{section}.dataset is not set: name a data set, such as {section}.dataset=owner/name"
        )
    from datasets import load_dataset  # takes seconds to import

    name = "/".join(part for part in (config.dataset, config.subset) if part)
    number = 0
    try:
        rows = load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
        for number, values in enumerate(rows, start=1):
            yield CorpusRow(
                f"{name}, split {config.split}, row {number}",
                f"{name}:{config.split}",
                number,
                values,
            )
    except Exception as error:  # network, server, format: a hub raises whatever its clients do
        raise UserError(
            f"{section}.dataset={name}: split {config.split} cannot be read beyond row {number} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
