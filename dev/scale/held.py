"""What stays in memory of each document, file, shard or step, and how many tokens of text fill a
host with it.

Everything else in the house is read and written in pieces of a bounded size. A token is 4
characters here and a document has 500 tokens; parts and shards have the sizes that the stages give
them.
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

HOST = 64 << 30
DOCUMENT = 500  # tokens
SHARD_TOKENS = 100_000_000  # tokens.shard_tokens


@dataclass(frozen=True)
class Held:
    """Something that grows with the text."""

    what: str
    unit: str
    tokens: int  # of a unit
    size: float  # bytes of a unit, per process that holds it

    @property
    def tokens_of_a_host(self) -> float:
        return HOST / self.size * self.tokens


def measure_held(units: int) -> Table:
    """Each from so many units; those that are files a fiftieth of that."""
    table = Table(
        title=f"Held in memory, and where {HOST >> 30} GiB are full", title_justify="left"
    )
    for column in ("what", "of each", "its tokens", "bytes", "full at tokens"):
        table.add_column(column, justify="left" if column in ("what", "of each") else "right")
    for held in sorted(all_held(units), key=lambda held: held.tokens_of_a_host):
        table.add_row(
            held.what,
            held.unit,
            f"{held.tokens:,}",
            f"{held.size:,.1f}",
            f"{held.tokens_of_a_host:.1e}",
        )
    return table


def all_held(units: int) -> Iterator[Held]:
    from ipt.config import CorpusConfig

    exact, near = (
        CorpusConfig(kind="files", exact_duplicates="remove"),
        CorpusConfig(kind="files", near_duplicates=0.8),
    )
    yield Held("corpus.exact_duplicates", "document", DOCUMENT, _of_filter(exact, units))
    yield Held("corpus.near_duplicates", "document", DOCUMENT, _of_filter(near, units))
    yield Held("order of an epoch (mixture)", "document", DOCUMENT, _of_plan(units))
    files = max(20, units // 50)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from _of_files(folder, files)
        yield Held("index of a token store", "shard", SHARD_TOKENS, _of_store(folder, files))


def _of_filter(config: Any, units: int) -> float:
    from ipt.corpus.filtering import build_filters

    [drops] = build_filters(config)
    choose = random.Random(0)
    assert drops("nothing like the others") is None  # libraries are loaded

    def read() -> list[Any]:
        assert not any(
            drops(" ".join(str(choose.random()) for _ in range(8))) for _ in range(units)
        )
        return [drops]

    return _held_by(read) / units


def _of_plan(units: int) -> float:
    """What a plan keeps once a block is read, less what any plan keeps: the windows of its sources."""
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

        return _held_by(make)

    few, many = 10_000 * units, 100_000 * units
    return (plan(many) - plan(few)) / (many - few)


def _of_files(folder: Path, files: int) -> Iterator[Held]:
    """Lists of files and row groups that stages make before they begin; a part of documents has 32
    M characters, one of pairs 512 rows, one of texts 8,192 rows with pairs that are half as long
    again.
    """
    from ipt.rendering.run import SCHEMA as TEXTS
    from ipt.rendering.run import plan_tasks
    from ipt.stage import hash_folder
    from ipt.synthesis.shards import SCHEMA as PAIRS
    from ipt.synthesis.shards import Documents
    from ipt.tokens.tasks import make_tasks

    _write_parts(folder / "pairs", files, PAIRS, 512)
    _write_parts(folder / "texts", files, TEXTS, 8192)
    yield Held(
        "tasks of rendering",
        "part of pairs",
        512 * DOCUMENT,
        _held_by(lambda: plan_tasks(folder / "pairs")) / files,
    )
    yield Held(
        "row groups of documents",
        "part of documents",
        8_000_000,
        _held_by(lambda: Documents(folder / "pairs", 512)) / files,
    )
    yield Held(
        "tasks of tokens",
        "part of texts",
        8192 * DOCUMENT * 3 // 2,
        _held_by(lambda: make_tasks(folder / "texts", SHARD_TOKENS), True) / files,
    )
    yield Held(
        "manifest of synthesis",
        "part of pairs",
        512 * DOCUMENT,
        _held_by(lambda: hash_folder(folder / "pairs"), True) / files,
    )


def _of_store(folder: Path, shards: int) -> float:
    from ipt.tokens.store import EncodedDocument, TokenStore, write_store

    write_store(
        folder / "store",
        (EncodedDocument(np.zeros(1, np.uint32)) for _ in range(shards)),
        "made up",
        1,
    )
    return _held_by(lambda: TokenStore(folder / "store")) / shards


def _write_parts(folder: Path, files: int, schema: Any, rows: int) -> None:
    """The same part under many names: what is held of it comes from its metadata."""
    import pyarrow as pa

    from ipt.stage import write_parquet

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


def _held_by(make: Callable[[], Any], at_peak: bool = False) -> int:
    """Bytes that are in use once something is made and kept, or at the most while it is made."""
    with _traced():
        kept = make()
        now, peak = tracemalloc.get_traced_memory()
        del kept
    return peak if at_peak else now
