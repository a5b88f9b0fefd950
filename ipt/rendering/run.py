"""The rendering stage: reads pairs and writes texts, both as Parquet parts, with any number of
workers.
"""

import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipt.config import RenderingConfig
from ipt.console import progress
from ipt.errors import MissingFileError, UserError
from ipt.files import ROW_GROUP, atomic, reading_parquet
from ipt.parallel import in_order, worker_count
from ipt.rendering.pairs import AugmentedDocument, ChainRow, read_document
from ipt.rendering.render import Settings, Text, render_documents
from ipt.synthesis.formats.tags import Pair

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("n_shots", pa.int8()),
        ("n_pairs", pa.int16()),
        ("layout", pa.string()),
    ]
)
COLUMNS = ["doc_id", "chain_id", "text", "pairs", "inherits_previous", "rewrite"]
# a worker renders about so much at a time, and writes one part
TASK_ROWS, TASK_BYTES = (8_192, 64_000_000)
LONGEST_CHAIN = 127  # rows: n_shots has 8 bits, and synthesis.shots is at most that


class PairsRow(NamedTuple):
    """One row of the pairs: its position and its content."""

    chain_id: int
    inherits_previous: bool
    content: ChainRow


class Group(NamedTuple):
    """A row group of a Parquet file."""

    path: Path
    number: int


class RenderTask(NamedTuple):
    """The chains that begin in the first `own` groups. The last one may continue in the other
    groups, up to the maximum length of a chain.
    """

    number: int
    groups: list[Group]
    own: int
    rows: int
    is_last: bool  # there are no groups behind these


def check_rendering(config: RenderingConfig) -> None:
    """Raises UserError or MissingFileError for a config that `render` would reject. Reads only the
    template file.
    """
    Settings.of(config)


def render(config: RenderingConfig, pairs: Path, output: Path, seed: int) -> dict[str, Any]:
    """Render `pairs/part-*.parquet` to `output/texts/part-*.parquet`. Returns statistics.

    Memory does not grow with the input. Output is identical for any number of workers. Raises
    MissingFileError if `pairs` has no parts, UserError for an invalid config or a row that
    continues no chain.
    """
    settings = Settings.of(config)
    shutil.rmtree(output / "texts", ignore_errors=True)  # of an interrupted run
    tasks = plan_tasks(pairs)
    tally = Tally()
    with progress("rendering", sum(task.rows for task in tasks)) as bar:
        prepare = partial(Renderer, config, output / "texts", seed)
        for task, counted in zip(
            tasks, in_order(prepare, tasks, worker_count(config.workers)), strict=True
        ):
            tally.merge(counted)
            bar.advance(task.rows)
    return tally.statistics(settings)


def plan_tasks(pairs: Path) -> list[RenderTask]:
    """Tasks depend only on the files, so parts are the same for any number of workers."""
    paths = sorted(pairs.glob("part-*.parquet"))
    if not paths:
        raise MissingFileError(f"{pairs} holds no part-*.parquet")
    groups: list[Group] = []
    ends = [0]  # rows before each group, and in all
    borders = [0]  # groups before each task, and in all
    size = 0
    for path in paths:
        with reading_parquet(path):
            metadata = pq.read_metadata(path)
        for number in range(metadata.num_row_groups):
            groups.append(Group(path, number))
            ends.append(ends[-1] + metadata.row_group(number).num_rows)
            size += metadata.row_group(number).total_byte_size
            if ends[-1] - ends[borders[-1]] >= TASK_ROWS or size >= TASK_BYTES:
                borders.append(len(groups))
                size = 0
    if ends[-1] > ends[borders[-1]] or len(borders) == 1:
        borders.append(len(groups))
    return [_task(number, groups, ends, *border) for number, border in enumerate(pairwise(borders))]


def _task(number: int, groups: list[Group], ends: list[int], first: int, end: int) -> RenderTask:
    """It holds no more groups than it may have to read: it is sent to a worker."""
    last = min(bisect_left(ends, ends[end] + LONGEST_CHAIN), len(groups))
    return RenderTask(
        number, groups[first:last], end - first, ends[end] - ends[first], last == len(groups)
    )


class Renderer:
    """Renders tasks, one part per task."""

    def __init__(self, config: RenderingConfig, folder: Path, seed: int) -> None:
        self.settings, self.folder, self.seed = Settings.of(config), folder, seed

    def __call__(self, task: RenderTask) -> "Tally":
        tally = Tally()
        texts: list[Text] = []
        for chain in read_chains(_rows(task)):
            documents = [read_document(row) for row in chain]
            rendered = render_documents(documents, self.settings, self.seed)
            tally.add_documents(documents)
            tally.add_texts(rendered)
            texts += rendered
        columns = {name: [getattr(text, name) for text in texts] for name in SCHEMA.names}
        with atomic(self.folder / f"part-{task.number:05d}.parquet") as temporary:
            pq.write_table(pa.table(columns, SCHEMA), temporary, row_group_size=ROW_GROUP)
        return tally


def _rows(task: RenderTask) -> Iterator[PairsRow]:
    """The rows of the task's chains: from the first that begins a chain in its groups to the last
    before one begins behind them.
    """
    begun = task.number == 0
    for number, group in enumerate(task.groups):
        for row in _read_group(group):
            begun = begun or not row.inherits_previous
            if number >= task.own and (not begun or not row.inherits_previous):
                return
            if begun:
                yield row
    if not task.is_last:
        where = task.groups[-1].path
        raise UserError(
            f"{where}: a chain of more than {LONGEST_CHAIN} rows goes on here: let "
            "inherits_previous be false somewhere in it"
        )


def _read_group(group: Group) -> Iterator[PairsRow]:
    with reading_parquet(group.path), pq.ParquetFile(group.path) as file:
        table = file.read_row_group(group.number, columns=COLUMNS)
    pairs = table["pairs"].combine_chunks()
    flat = pairs.flatten()
    read = iter(
        [
            Pair(*pair)
            for pair in zip(
                flat.field("question").to_pylist(), flat.field("answer").to_pylist(), strict=True
            )
        ]
    )
    counts = pc.list_value_length(pairs).to_pylist()
    columns = (
        table[name].to_pylist()
        for name in ("doc_id", "chain_id", "text", "inherits_previous", "rewrite")
    )
    for doc_id, chain_id, text, inherits, rewrite, count in zip(*columns, counts, strict=True):
        yield PairsRow(
            chain_id, inherits, ChainRow(doc_id, text, [next(read) for _ in range(count)], rewrite)
        )


def read_chains(rows: Iterable[PairsRow]) -> Iterator[list[ChainRow]]:
    """Consecutive rows that form a chain: a row that inherits from the previous one belongs to the
    same text.
    """
    chain: list[ChainRow] = []
    chain_id: int | None = None
    for row in rows:
        if row.inherits_previous:
            if row.chain_id != chain_id:
                raise UserError(
                    f"pairs: document {row.content.doc_id} of chain {row.chain_id} inherits from "
                    "the row before it, which is of chain "
                    f"{chain_id}: rows must be sorted by chain, then round; run synthesis again"
                )
        elif chain:
            yield chain
            chain = []
        chain.append(row.content)
        chain_id = row.chain_id
    if chain:
        yield chain


class Tally:
    """Counts for stats.json. Every input row and pair is in exactly one of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.shots: Counter[int] = Counter()

    def merge(self, other: "Tally") -> None:
        for name, counter in vars(other).items():
            getattr(self, name).update(counter)

    def add_documents(self, documents: list[AugmentedDocument]) -> None:
        for document in documents:
            self.counts["documents"] += 1
            self.counts["pairs_read"] += len(document.items) + len(document.dropped)
            self.counts["pairs_rendered"] += len(document.items)
            self.kinds.update(item.kind for item in document.items)
            self.dropped.update(document.dropped)
            self.counts["rewrites"] += bool(document.rewrite)
            if document.items:
                self.counts["documents_with_pairs"] += 1
            else:
                self.counts[
                    "documents_without_pairs" if document.text.strip() else "documents_blank"
                ] += 1

    def add_texts(self, texts: list[Text]) -> None:
        for text in texts:
            self.counts["texts"] += 1
            self.counts["characters"] += len(text.text)
            self.counts["inverted"] += text.inverted
            self.layouts[text.layout] += 1
            if text.n_shots:
                self.shots[text.n_shots] += 1

    def statistics(self, settings: Settings) -> dict[str, Any]:
        """JSON-serializable. Documents and pairs are counted once, texts in every version."""
        keys = (
            "documents",
            "documents_with_pairs",
            "documents_without_pairs",
            "documents_blank",
            "rewrites",
            "pairs_read",
            "pairs_rendered",
        )
        return {
            "arrangement": settings.arrangement,
            "versions": settings.versions,
            **{key: self.counts[key] for key in (*keys, "texts", "characters", "inverted")},
            "dropped": dict(sorted(self.dropped.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "layouts": dict(sorted(self.layouts.items())),
            "shots": {str(shots): count for shots, count in sorted(self.shots.items())},
        }
