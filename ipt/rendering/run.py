"""The rendering stage: pairs in Parquet parts become texts in Parquet parts, streamed."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import RenderingConfig
from ipt.console import Bar, progress
from ipt.rendering.pairs import ChainRow, Document, read_document
from ipt.rendering.render import Settings, Text, render_documents
from ipt.stage import read_parts, write_parts
from ipt.synthesis.format import Pair

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
ROWS_PER_PART = 10_000
BAR_STEP = 500  # rows


def check_rendering(config: RenderingConfig) -> None:
    """Raise a one-line ValueError or FileNotFoundError for a config that `render` would refuse; reads only the template file."""
    Settings.of(config)


def render(config: RenderingConfig, pairs: Path, output: Path, seed: int) -> dict[str, Any]:
    """Render `pairs/part-*.parquet` into `output/texts/part-*.parquet` and return the statistics.

    Memory does not grow with the input. Running again writes the same bytes.
    Raises FileNotFoundError if `pairs` holds no parts, ValueError for a bad config or a row that continues no chain.
    """
    settings = Settings.of(config)
    tally = Tally()
    parts = sorted(pairs.glob("part-*.parquet"))
    with progress("rendering", sum(pq.read_metadata(part).num_rows for part in parts)) as bar:
        chains = read_chains(_advance(read_parts(pairs, COLUMNS), bar))
        texts = (text for chain in chains for text in _render_chain(chain, settings, seed, tally))
        write_parts(output / "texts", texts, SCHEMA, ROWS_PER_PART)
    return tally.statistics(settings)


def read_chains(rows: Iterator[dict[str, Any]]) -> Iterator[list[ChainRow]]:
    """Consecutive rows of a chain that are joined: each that inherits from the row before it belongs to that row's text."""
    chain: list[ChainRow] = []
    chain_id: int | None = None
    for row in rows:
        if row["inherits_previous"]:
            if row["chain_id"] != chain_id:
                raise ValueError(
                    f"pairs: document {row['doc_id']} of chain {row['chain_id']} inherits from the row before it, which is of chain "
                    f"{chain_id}: rows must be sorted by chain, then round; run synthesis again"
                )
        elif chain:
            yield chain
            chain = []
        pairs = [Pair(pair["question"], pair["answer"]) for pair in row["pairs"]]
        chain.append(ChainRow(row["doc_id"], row["text"], pairs, row["rewrite"]))
        chain_id = row["chain_id"]
    if chain:
        yield chain


class Tally:
    """What the stage reports. Every row and every pair that came in is in exactly one of its counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.shots: Counter[int] = Counter()

    def add_documents(self, documents: list[Document]) -> None:
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
                self.counts["documents_without_pairs" if document.text.strip() else "documents_blank"] += 1

    def add_texts(self, texts: list[Text]) -> None:
        for text in texts:
            self.counts["texts"] += 1
            self.counts["characters"] += len(text.text)
            self.counts["inverted"] += text.inverted
            self.layouts[text.layout] += 1
            if text.n_shots:
                self.shots[text.n_shots] += 1

    def statistics(self, settings: Settings) -> dict[str, Any]:
        """JSON-able. Documents and pairs are counted once, texts in every version."""
        keys = "documents", "documents_with_pairs", "documents_without_pairs", "documents_blank", "rewrites", "pairs_read", "pairs_rendered"
        return {
            "arrangement": settings.arrangement,
            "versions": settings.versions,
            **{key: self.counts[key] for key in (*keys, "texts", "characters", "inverted")},
            "dropped": dict(sorted(self.dropped.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "layouts": dict(sorted(self.layouts.items())),
            "shots": {str(shots): count for shots, count in sorted(self.shots.items())},
        }


def _render_chain(chain: list[ChainRow], settings: Settings, seed: int, tally: Tally) -> Iterator[dict[str, Any]]:
    documents = [read_document(row) for row in chain]
    texts = render_documents(documents, settings, seed)
    tally.add_documents(documents)
    tally.add_texts(texts)
    for text in texts:
        yield {name: getattr(text, name) for name in SCHEMA.names}


def _advance(rows: Iterator[dict[str, Any]], bar: Bar) -> Iterator[dict[str, Any]]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield row
        if number % BAR_STEP == 0:
            bar.advance(BAR_STEP)
    bar.advance(number % BAR_STEP)
