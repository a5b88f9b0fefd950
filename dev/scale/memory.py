"""Memory that grows with the text: bytes per document, file or shard, and the number of tokens of
text whose records fill a host.

All other data is read and written in pieces of bounded size. The figures assume 4 characters per
token, 500 tokens per document, and the default sizes of parts and shards.
"""

import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

HOST = 64 << 30  # bytes
DOCUMENT = 500  # tokens
SHARD_TOKENS = 100_000_000  # tokens.shard_tokens


@dataclass(frozen=True)
class Record:
    """A data structure in memory that has an entry per unit of text."""

    what: str
    unit: str
    tokens: int  # of text per unit
    size: float  # bytes per unit, in each process that holds the structure

    @property
    def tokens_of_a_host(self) -> float:
        """Tokens of text whose records fill HOST bytes."""
        return HOST / self.size * self.tokens


def measure_memory(units: int) -> Table:
    """Measure each record with `units` documents; records of files with a fiftieth of it."""
    table = Table(
        title=f"Memory that grows with the text, and when it fills {HOST >> 30} GiB",
        title_justify="left",
    )
    for column in ("what", "unit", "tokens per unit", "bytes per unit", "full at tokens"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for record in sorted(all_records(units), key=lambda record: record.tokens_of_a_host):
        table.add_row(
            record.what,
            record.unit,
            f"{record.tokens:,}",
            f"{record.size:,.1f}",
            f"{record.tokens_of_a_host:.1e}",
        )
    return table


def all_records(units: int) -> Iterator[Record]:
    from ipt.config import CorpusConfig

    exact, near = (
        CorpusConfig(kind="files", exact_duplicates="remove"),
        CorpusConfig(kind="files", near_duplicates=0.8),
    )
    yield Record("corpus.exact_duplicates", "document", DOCUMENT, _of_filter(exact, units))
    yield Record("corpus.near_duplicates", "document", DOCUMENT, _of_filter(near, units))
    yield Record("order of an epoch (mixture)", "document", DOCUMENT, _of_plan(units))
    files = max(20, units // 50)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from _of_files(folder, files)
        yield Record("index of a token store", "shard", SHARD_TOKENS, _of_store(folder, files))


def _of_filter(config: Any, units: int) -> float:
    from ipt.corpus.filters.build import build_filters

    [drops] = build_filters(config)
    choose = random.Random(0)
    assert drops("nothing like the others") is None  # also imports the libraries

    def read() -> list[Any]:
        for _ in range(units):
            words = [str(choose.random()) for _ in range(8)]
            assert not drops(" ".join(words))
        return [drops]

    return _bytes_of(read) / units


def _of_plan(units: int) -> float:
    """Bytes per document that a plan keeps after reading a block, without its fixed part (the
    windows of the sources).
    """
    from benchmarks.loading import FormulaLengths
    from ipt.config import MixtureConfig
    from ipt.mixture.plan import make_plan

    def plan(documents: int) -> int:
        def make() -> Any:
            made = make_plan(
                {"all": FormulaLengths(documents)}, MixtureConfig(ratios={"all": 1.0}), 10_000, 0
            )
            made.block(0)
            return made

        return _bytes_of(make)

    few, many = 10_000 * units, 100_000 * units
    return (plan(many) - plan(few)) / (many - few)


def _of_files(folder: Path, files: int) -> Iterator[Record]:
    """The lists of files and row groups that stages build before they start.

    A part of documents has 32 M characters, a part of pairs 512 rows, and a part of texts 8,192
    rows, where pairs add half the length of the document.
    """
    from ipt.rendering.run import SCHEMA as TEXTS
    from ipt.rendering.run import plan_tasks
    from ipt.stage import hash_folder
    from ipt.synthesis.shards import SCHEMA as PAIRS
    from ipt.synthesis.shards import Documents
    from ipt.tokens.tasks import make_tasks

    _write_parts(folder / "pairs", files, PAIRS, 512)
    _write_parts(folder / "texts", files, TEXTS, 8192)
    yield Record(
        "tasks of rendering",
        "part of pairs",
        512 * DOCUMENT,
        _bytes_of(lambda: plan_tasks(folder / "pairs")) / files,
    )
    yield Record(
        "row groups of documents",
        "part of documents",
        8_000_000,
        _bytes_of(lambda: Documents(folder / "pairs", 512)) / files,
    )
    yield Record(
        "tasks of tokens",
        "part of texts",
        8192 * DOCUMENT * 3 // 2,
        _bytes_of(lambda: make_tasks(folder / "texts", SHARD_TOKENS), True) / files,
    )
    yield Record(
        "manifest of synthesis",
        "part of pairs",
        512 * DOCUMENT,
        _bytes_of(lambda: hash_folder(folder / "pairs"), True) / files,
    )


def _of_store(folder: Path, shards: int) -> float:
    from ipt.tokens.store import EncodedDocument, TokenStore, write_store

    write_store(
        folder / "store",
        (EncodedDocument(np.zeros(1, np.uint32)) for _ in range(shards)),
        "synthetic",
        1,
    )
    return _bytes_of(lambda: TokenStore(folder / "store")) / shards


def _write_parts(folder: Path, files: int, schema: Any, rows: int) -> None:
    """Hard links to one part under many names: only its metadata is kept in memory."""
    import pyarrow as pa

    from ipt.files import write_parquet

    row: dict[str, Any] = {
        name: [] if pa.types.is_list(kind) else "text" if pa.types.is_string(kind) else 0
        for name, kind in zip(schema.names, schema.types, strict=True)
    }
    row |= {"inherits_previous": False} if "inherits_previous" in schema.names else {}
    write_parquet(folder / "part-00000.parquet", [row] * rows, schema)
    for number in range(1, files):
        (folder / f"part-{number:05d}.parquet").hardlink_to(folder / "part-00000.parquet")


@contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _bytes_of(make: Callable[[], Any], at_peak: bool = False) -> int:
    """Bytes in use after `make` has returned, while its result is kept; at_peak: at most before."""
    with _traced():
        kept = make()
        now, peak = tracemalloc.get_traced_memory()
        del kept
    return peak if at_peak else now
