"""Speed of rendering and of the parser.

    python benchmarks/rendering.py                              # documents and pairs that are made up
    python benchmarks/rendering.py --data fairytaleqa.jsonl.gz  # your own: text (or context) and pairs (or qa) in each line

One core, in memory: chains of three documents are rendered as published (`rendering=paper`), and generations of five pairs are
parsed. With workers: the stage, from Parquet to Parquet, with one worker and with more; the outputs are compared byte by byte.
Passes alternate; the median is shown, and the spread between the fastest and the slowest. For comparison: the released renderer
does about 73,000 pairs (26,000 documents) a second on one core of a machine with two, with FairytaleQA in chains of three.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import compose_config
from ipt.parallel import worker_count
from ipt.rendering.pairs import ChainRow
from ipt.rendering.preview import read_rows
from ipt.rendering.render import Settings, render_chain
from ipt.rendering.run import render
from ipt.stage import hash_folder
from ipt.synthesis.format import Pair, pairs_text, parse
from ipt.synthesis.shards import SCHEMA

CHAIN = 3
WORDS = (
    *("river", "stone", "king", "winter", "answer", "bridge", "garden", "letter"),
    *("old", "bright", "carry", "follow", "under", "between", "morning", "silver", "road"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="documents with pairs; default: made up")
    parser.add_argument("--documents", type=int, default=200_000, help="at least so many, repeated under other ids (default: 200000)")
    parser.add_argument("--workers", type=int, default=worker_count(None))
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    rows = [row.content for row in read_rows(arguments.data)] if arguments.data else make_rows()
    rows = [row._replace(doc_id=f"{copy}/{row.doc_id}") for copy in range(-(-arguments.documents // len(rows))) for row in rows]
    chains = [rows[start : start + CHAIN] for start in range(0, len(rows), CHAIN)]
    pairs = sum(len(row.pairs) for row in rows)
    print(f"{len(rows):,} documents, {pairs:,} pairs, {sum(len(row.text) for row in rows) / len(rows):,.0f} characters a document")
    in_memory(chains, len(rows), pairs, arguments.passes)
    parser_speed(rows, arguments.passes)
    stage(chains, len(rows), arguments.workers, arguments.passes)


def make_rows(number: int = 1_000) -> list[ChainRow]:
    choose = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(choose.choices(WORDS, k=words)).capitalize()

    return [
        ChainRow(
            str(index),
            " ".join(sentence(12) + "." for _ in range(12)),
            [Pair(sentence(10) + "?", sentence(6)) for _ in range(choose.choice((2, 3, 3, 3)))],
        )
        for index in range(number)
    ]


def in_memory(chains: list[list[ChainRow]], documents: int, pairs: int, passes: int) -> None:
    settings = Settings.of(compose_config("synthesize", ["rendering=paper"]).rendering)

    def work() -> None:
        for chain in chains:
            render_chain(chain, settings, seed=0)

    [seconds] = alternate([work], passes)
    show("rendering, one core", [(documents, "documents"), (pairs, "pairs")], seconds)


def parser_speed(rows: list[ChainRow], passes: int) -> None:
    pool = [pair for row in rows for pair in row.pairs]
    outputs = [pairs_text(islice(pool, start, start + 5)) for start in range(0, min(len(pool), 100_000) - 5, 5)]

    def work() -> None:
        for output in outputs:
            parse(output)

    [seconds] = alternate([work], passes)
    show("parser, one core", [(len(outputs), "generations of five pairs")], seconds)


def stage(chains: list[list[ChainRow]], documents: int, workers: int, passes: int) -> None:
    config = compose_config("synthesize", ["rendering=paper"]).rendering
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(chains, folder / "pairs")

        def work(number: int) -> Callable[[], None]:
            def run() -> None:
                config.workers = number
                render(config, folder / "pairs", folder / f"texts-{number}", seed=0)

            return run

        counts = sorted({1, workers})
        for number, seconds in zip(counts, alternate([work(number) for number in counts], passes), strict=True):
            show(f"stage, {number} worker{'s' if number > 1 else ''}", [(documents, "documents")], seconds)
        assert len({str(hash_folder(folder / f"texts-{number}")) for number in counts}) == 1, "workers change the output"
        print("the outputs are equal byte for byte")


def write_pairs(chains: list[list[ChainRow]], folder: Path) -> None:
    folder.mkdir()
    rows = [
        {
            "doc_id": row.doc_id,
            "chain_id": number,
            "round": place,
            "text": row.text,
            "pairs": [pair._asdict() for pair in row.pairs],
            "inherits_previous": place > 0,
            "rewrite": "",
        }
        for number, chain in enumerate(chains)
        for place, row in enumerate(chain)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "part-00000.parquet", row_group_size=1024)


def alternate(works: list[Callable[[], None]], passes: int) -> list[list[float]]:
    """Seconds of each pass of each work, after one pass to warm up."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(passes + 1):
        for work, measured in zip(works, seconds, strict=True):
            clock = time.perf_counter()
            work()
            if number:
                measured.append(time.perf_counter() - clock)
    return seconds


def show(name: str, counts: list[tuple[int, str]], seconds: list[float]) -> None:
    median = statistics.median(seconds)
    rates = ", ".join(f"{count / median:,.0f} {unit} a second" for count, unit in counts)
    print(f"{name:<22} {rates}  ({min(seconds):.2f} to {max(seconds):.2f} s)")


if __name__ == "__main__":
    main()
