"""Turns the rows of files and hub datasets into documents.

Everything is streamed. Memory holds one batch of rows and, with `id_field`, a digest of each id.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import pyarrow as pa
from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from ipt.config import CorpusConfig
from ipt.corpus.hashing import short_hash
from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.corpus.readers.hub import hub_rows
from ipt.corpus.readers.rows import CorpusRow, file_rows
from ipt.errors import UserError

SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("meta", pa.string())]
)
EMPTY, NO_TEXT = "empty text", "text is null"

# builds the text of a row from all its fields
RowText = Callable[[Mapping[str, Any]], str]


class LeftOut(Exception):
    """Raised by a `RowText` for a row without text. The message is the reason, which is counted."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus and its origin."""

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


def read_documents(
    config: CorpusConfig,
    dropped: Counter[str] | None = None,
    row_text: RowText | None = None,
    section: str = "corpus",
    files: Sequence[CorpusFile] = (),
) -> Iterator[Document]:
    """The documents of `config` (kind files or hub): files sorted by name, rows in file order.

    - The text of a row is its `text_field`, or the result of `row_text` or of `template` for all
      its fields. `row_text` may raise UserError for an unreadable row, or LeftOut.
    - A .txt file is one document.
    - Texts that are empty, blank or null are dropped and counted by reason in `dropped`.
    - With `id_field` ids are taken from the rows and must be unique. Without it (and for .txt) the
      id is a hash of file name and row number.
    - The value of the field `held_out_by` is kept in the document's `meta`.

    `section` is the name of the config's section, for messages. `files` are read instead of the
    files of `path`. Raises MissingFileError for a missing file, UserError for an unreadable row and
    for a corpus without text.
    """
    dropped = Counter() if dropped is None else dropped
    if row_text is None and config.template:
        row_text = _template_text(config.template, section)
    seen: set[bytes] = set()
    documents = 0
    if config.kind == "hub":
        rows = hub_rows(config, section)
    else:
        rows = file_rows(config, row_text is not None, section, files)
    for row in rows:
        try:
            if row_text is None:
                text = _text(row, config.text_field, section)
            else:
                text = _made_text(row, row_text)
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
    """The row's value of the field `held_out_by`, if it has one."""
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
            f"{row.where}: id {doc_id!r} occurred before: make ids unique, or set "
            "corpus.id_field=null to number the rows"
        )
    seen.add(digest)
    return doc_id


def _encodable(text: str, row: CorpusRow, field_name: str) -> str:
    """`text`. Raises UserError for an unpaired surrogate, which JSON allows but UTF-8 does not."""
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
