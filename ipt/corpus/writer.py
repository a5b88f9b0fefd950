"""Writes documents as Parquet parts, and questions as JSON lines."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.corpus.documents import SCHEMA, Document
from ipt.corpus.questions import Question, count_questions
from ipt.corpus.readers.files import QUESTIONS
from ipt.files import atomic

# approximate maximum of one part
PART_DOCUMENTS = 50_000
PART_CHARACTERS = 32_000_000
# and of one row group, which is held in memory
GROUP_DOCUMENTS = 1_000
GROUP_CHARACTERS = 4_000_000


class DocumentWriter:
    """Context manager that writes documents to `folder/part-00000.parquet` and so on.

    Holds at most one row group in memory. Writes an empty part if no document was added.
    """

    def __init__(self, folder: Path) -> None:
        self.documents = 0
        self.characters = 0
        self._folder = folder
        self._parts = 0
        self._rows: list[dict[str, str]] = []
        self._row_characters = 0
        self._open_part = ExitStack()
        self._start_part()

    def add(self, document: Document) -> None:
        self._rows.append(document.row())
        self._row_characters += len(document.text)
        self.documents += 1
        self.characters += len(document.text)
        if len(self._rows) >= min(
            GROUP_DOCUMENTS, self._documents_left
        ) or self._row_characters >= min(GROUP_CHARACTERS, self._characters_left):
            self._write_group()

    def _start_part(self) -> None:
        self._writer: pq.ParquetWriter | None = None
        self._documents_left = PART_DOCUMENTS
        self._characters_left = PART_CHARACTERS

    def _write_group(self) -> None:
        if self._writer is None:
            part = self._folder / f"part-{self._parts:05d}.parquet"
            temporary = self._open_part.enter_context(atomic(part))
            self._writer = self._open_part.enter_context(pq.ParquetWriter(temporary, SCHEMA))
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._documents_left -= len(self._rows)
        self._characters_left -= self._row_characters
        self._rows = []
        self._row_characters = 0
        if min(self._documents_left, self._characters_left) <= 0:
            self._open_part.close()
            self._parts += 1
            self._start_part()

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open_part:  # renames the part, or deletes it after an error
            if error is not None:
                raise error
            if self._rows or not self.documents:
                self._write_group()


def sizes(training: DocumentWriter, held_out: DocumentWriter) -> dict[str, int]:
    """The entries of stats.json that count documents and characters."""
    return {
        "documents": training.documents,
        "characters": training.characters,
        "held_out_documents": held_out.documents,
        "held_out_characters": held_out.characters,
    }


def write_questions(output: Path, questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Write `output/questions.jsonl` if there are any questions. Returns their number by task and
    split.
    """
    questions = list(questions)
    if questions:
        lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
        with atomic(output / QUESTIONS) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    return count_questions(questions)
