"""Shows complete rendered texts in the terminal, coloured by part."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.panel import Panel
from rich.text import Text as Coloured

from ipt.config import RenderingConfig
from ipt.corpus.readers.files import CorpusFile
from ipt.corpus.readers.jsonl import json_lines
from ipt.errors import MissingFileError, UserError
from ipt.files import reading_parquet
from ipt.places import check_pointer
from ipt.rendering.pairs import ChainRow, read_document
from ipt.rendering.pools import MARKS
from ipt.rendering.render import Settings, Text, render_documents
from ipt.rendering.run import PairsRow, read_chains
from ipt.synthesis.formats.tags import Pair

COLOURS = {
    "document": "blue",
    "rewrite": "blue",
    "question": "bold cyan",
    "options": "magenta",
    "reasoning": "yellow",
    "answer": "bold green",
}
TEXTS, PAIRS = ("text", "context"), ("pairs", "QA_list", "qa")
_PART = re.compile(f"({MARKS[0]}.*?{MARKS[1]})", re.DOTALL)


def preview(path: Path, config: RenderingConfig, seed: int, number: int, console: Console) -> None:
    """Print the renderings of the first `number` chains in `path` that have usable pairs, and the
    pairs dropped from them.

    `path` is a Parquet file of pairs, a folder of them (the output of synthesis), or a .jsonl(.gz)
    file with a text or context and its pairs in each line. Raises MissingFileError and UserError
    with file and row.
    """
    settings = replace(Settings.of(config), mark=mark)
    console.print(
        "  ".join(f"[{colour}]{part}[/]" for part, colour in COLOURS.items()),
        "  template",
        highlight=False,
    )
    shown = 0
    for chain in islice(filter(_with_pairs, read_chains(read_rows(path))), number):
        documents = [read_document(row) for row in chain]
        for text in render_documents(documents, settings, seed):
            console.print(_panel(text))
        dropped = [
            f"{reason} in {document.doc_id}"
            for document in documents
            for reason in document.dropped
        ]
        if dropped:
            console.print(
                f"dropped pairs: {', '.join(dropped)}", style="red", markup=False, highlight=False
            )
        shown += 1
    if not shown:
        raise UserError(f"{path}: no document in it has a pair that can be used")


def mark(part: str, text: str) -> str:
    """`text` between marks, preceded by the name of its part, for `Settings.mark`. Marks in the
    text itself are escaped.
    """
    return f"{MARKS[0]}{part} {text.translate(dict.fromkeys(map(ord, MARKS), '�'))}{MARKS[1]}"


def marked_parts(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a text that was rendered with `mark`: the name of each (empty for the template's
    own words) and the text.
    """
    for piece in _PART.split(text):
        if piece.startswith(MARKS[0]):
            part, _, content = piece[1:-1].partition(" ")
            yield part, content
        elif piece:
            yield "", piece


def _panel(text: Text) -> Panel:
    facts = [
        text.id,
        text.layout,
        f"{text.n_shots} shots",
        f"{text.n_pairs} pairs",
        *(["inverted"] if text.inverted else []),
    ]
    coloured = Coloured.assemble(
        *((content, COLOURS.get(part, "")) for part, content in marked_parts(text.text))
    )
    return Panel(coloured, title=", ".join(facts), title_align="left")


# Reading a user's pairs
# ----------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[PairsRow]:
    """The rows of a file or folder in the forms that `preview` accepts."""
    for number, values in enumerate(_values(path)):
        yield _row(values, number, f"{path}, row {number + 1}")


def _with_pairs(chain: list[ChainRow]) -> bool:
    return any(read_document(row).items for row in chain)


def _values(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_dir():
        parts = sorted(path.glob("part-*.parquet")) or sorted(
            (path / "pairs").glob("part-*.parquet")
        )
        if not parts:
            raise MissingFileError(f"{path} holds no part-*.parquet")
    elif path.is_file():
        parts = [path]
    else:
        raise MissingFileError(f"{path}: no such file or folder")
    for part in parts:
        if part.suffix.lower() == ".parquet":
            yield from _parquet_values(part)
        else:
            yield from (values for _, values in json_lines(CorpusFile(str(part), part.name)))


def _parquet_values(path: Path) -> Iterator[Mapping[str, Any]]:
    check_pointer(path)
    with reading_parquet(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _row(values: Mapping[str, Any], number: int, where: str) -> PairsRow:
    """Rows as synthesis writes them. Other files need at least a text or context and pairs, or the
    published QA_list of Q and A.
    """
    try:
        text, pairs = (
            next(values[name] for name in names if name in values) for names in (TEXTS, PAIRS)
        )
        read = [
            Pair(pair.get("question", pair.get("Q")) or "", pair.get("answer", pair.get("A")) or "")
            for pair in pairs
        ]
        content = ChainRow(
            str(values.get("doc_id", number)), text or "", read, values.get("rewrite") or ""
        )
        # texts, and such as can be written
        "".join((content.text, content.rewrite, *("".join(pair) for pair in read))).encode()
    except (RuntimeError, TypeError, AttributeError, UnicodeEncodeError):
        raise UserError(
            f"{where}: expected one of the fields {', '.join(TEXTS)} and one of {', '.join(PAIRS)} "
            "with question and answer (or Q and A)"
        ) from None
    return PairsRow(values.get("chain_id", number), values.get("inherits_previous", False), content)
