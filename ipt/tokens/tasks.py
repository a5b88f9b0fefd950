"""Texts cut into tasks. One task becomes one shard, whoever works on it, so a store does not depend
on the number of workers.

Where a task ends follows from the metadata of the Parquet files alone: tasks are known before
anything is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.errors import MissingFileError, UserError
from ipt.files import hash_json, reading_parquet

# typical of English text; used only to choose the size of shards
BYTES_PER_TOKEN = 4
COLUMNS = ("text", "examples", "fill_to")
READ_ROWS = 256  # rows of a file in memory at a time


@dataclass(frozen=True)
class RowGroups:
    """Row groups `first:end` of a file; `row` is the number of their first row in it."""

    file: str
    first: int
    end: int
    row: int


@dataclass(frozen=True)
class TokenizeTask:
    """Part number `part` of `parts` of the texts in `folder`: rows `first:end` of all files
    together.
    """

    folder: Path
    texts: str  # hash of all files' names and metadata
    part: int
    parts: int
    first: int
    end: int
    groups: tuple[RowGroups, ...]

    @property
    def rows(self) -> dict[str, Any]:
        """Which rows of which texts these are, as the index of the shard names them."""
        return {
            "texts": self.texts,
            "part": self.part,
            "parts": self.parts,
            "first": self.first,
            "end": self.end,
        }


def make_tasks(folder: Path, shard_tokens: int) -> list[TokenizeTask]:
    """Consecutive row groups of `folder/*.parquet`, about `shard_tokens` tokens in each task, a row
    group at least.

    Raises MissingFileError or UserError for a folder without such files and for one that holds no
    texts.
    """
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise MissingFileError(f"{folder} holds no *.parquet with texts to tokenise")
    texts = hash_json([[path.name, _footer(path)] for path in paths])
    parts: list[list[RowGroups]] = [[]]
    held, ends, row = 0, [0], 0
    for path in paths:
        in_file = 0
        for number, (rows, size) in enumerate(_row_groups(path)):
            if held >= shard_tokens * BYTES_PER_TOKEN:
                parts.append([])
                ends.append(row)
                held = 0
            parts[-1].append(RowGroups(path.name, number, number + 1, in_file))
            held, row, in_file, ends[-1] = held + size, row + rows, in_file + rows, row + rows
    starts = [0, *ends[:-1]]
    return [
        TokenizeTask(
            folder, texts, part, len(parts), starts[part], ends[part], tuple(_joined(groups))
        )
        for part, groups in enumerate(parts)
    ]


def read_rows(task: TokenizeTask) -> Iterator[dict[str, Any]]:
    """The rows of a task in order, in bounded memory. Raises UserError naming file and row where
    there is no text.
    """
    for groups in task.groups:
        path, number = task.folder / groups.file, groups.row
        # The buffer keeps a whole row group out of memory.
        with (
            reading_parquet(path),
            pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file,
        ):
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            wanted = list(range(groups.first, groups.end))
            for batch in file.iter_batches(
                READ_ROWS, row_groups=wanted, columns=columns, use_threads=False
            ):
                for row in batch.to_pylist():
                    if row.get("text") is None and row.get("examples") is None:
                        raise UserError(
                            f"{path} row {number}: has neither text nor examples: leave such rows "
                            "out"
                        )
                    yield row
                    number += 1


def _row_groups(path: Path) -> Iterator[tuple[int, int]]:
    """Rows of each row group, and bytes of its texts when they are not compressed."""
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from None
    if not {"text", "examples"} & set(schema.names):
        raise UserError(
            f"{path}: has the columns {', '.join(schema.names)}, but texts are in a column text "
            "(or examples)"
        )
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(column) for column in range(group.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] in COLUMNS
        )
        yield group.num_rows, size


def _joined(groups: list[RowGroups]) -> Iterator[RowGroups]:
    """Neighbouring row groups of a file as one."""
    held: RowGroups | None = None
    for group in groups:
        if held is not None and held.file == group.file:
            held = RowGroups(held.file, held.first, group.end, held.row)
            continue
        if held is not None:
            yield held
        held = group
    if held is not None:
        yield held


def _footer(path: Path) -> str:
    """The metadata at the end of a Parquet file: sizes, counts and value ranges of all that it
    holds.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return file.read().hex()
