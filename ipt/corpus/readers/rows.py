"""Reads the rows of files: Parquet, JSON lines, JSON and text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import CorpusConfig
from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.corpus.readers.find import find_files
from ipt.corpus.readers.jsonl import json_lines, json_rows
from ipt.errors import UserError

# read from a column of a Parquet file at a time; a complete column can be as large as the corpus
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class CorpusRow:
    """One row of a file or dataset."""

    where: str  # for messages: the file and the line in it
    source: str
    number: int  # counted from 1
    values: Mapping[str, Any]
    whole_file: bool = False  # a text file, which has no fields other than its text


def file_rows(
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
