"""Speed of rendering and of the parser, beside the released ones.

    python benchmarks/rendering.py                              # synthetic documents and pairs
    python benchmarks/rendering.py --data fairytaleqa.jsonl.gz  # your own data
    python benchmarks/rendering.py --released LMOps/instruction_pretrain

Each line of the `--data` file has the fields text (or context) and pairs (or qa).

One core, in memory: chains of three documents are rendered as published (`rendering=paper`), and
generations of five pairs are parsed. With workers: the stage, from Parquet to Parquet, with one
worker and with more; the outputs are compared byte by byte. The authors' renderer and parser are no
package: `--released` names the folder of theirs in a checkout of microsoft/LMOps. What they are
given is made while no clock runs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import Comparison, add_json_option, alternate, clocked, report
from ipt.config import compose_config
from ipt.parallel import worker_count
from ipt.rendering.pairs import ChainRow
from ipt.rendering.preview import read_rows
from ipt.rendering.render import Settings, render_chain
from ipt.rendering.run import render
from ipt.stage import hash_folder
from ipt.synthesis.formats.tags import Pair, pairs_text, parse
from ipt.synthesis.shards import SCHEMA

CHAIN = 3
RELEASED = "released code"
WORDS = (
    *("river", "stone", "king", "winter", "answer", "bridge", "garden", "letter"),
    *("old", "bright", "carry", "follow", "under", "between", "morning", "silver", "road"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="documents with pairs; default: made up")
    parser.add_argument(
        "--released", type=Path, metavar="FOLDER", help="the released code; default: without it"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=200_000,
        help="at least so many, repeated under other ids (default: 200000)",
    )
    parser.add_argument("--workers", type=int, default=worker_count(None))
    parser.add_argument("--passes", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = [row.content for row in read_rows(arguments.data)] if arguments.data else make_rows()
    rows = [
        row._replace(doc_id=f"{copy}/{row.doc_id}")
        for copy in range(-(-arguments.documents // len(rows)))
        for row in rows
    ]
    chains = [rows[start : start + CHAIN] for start in range(0, len(rows), CHAIN)]
    pairs = sum(len(row.pairs) for row in rows)
    print(
        f"{len(rows):,} documents, {pairs:,} pairs, "
        f"{sum(len(row.text) for row in rows) / len(rows):,.0f} characters a document"
    )
    released = load_released(arguments.released) if arguments.released else None
    comparisons = [
        in_memory(chains, len(rows), pairs, arguments.passes, released),
        parser_speed(rows, arguments.passes, released),
        stage(chains, len(rows), arguments.workers, arguments.passes),
    ]
    report(comparisons, arguments.json)


def load_released(folder: Path) -> Any:
    """The authors' module that renders and parses. Raises FileNotFoundError if the folder is not
    theirs.
    """
    if not (folder / "utils" / "read_compre.py").exists():
        raise FileNotFoundError(
            f"--released {folder}: holds no utils/read_compre.py; give instruction_pretrain of a "
            "checkout of LMOps"
        )
    sys.path.insert(0, str(folder))
    return import_module("utils.read_compre")


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


def in_memory(
    chains: list[list[ChainRow]], documents: int, pairs: int, passes: int, released: Any
) -> Comparison:
    settings = Settings.of(compose_config("synthesize", ["rendering=paper"]).rendering)

    def work() -> None:
        for chain in chains:
            render_chain(chain, settings, seed=0)

    def theirs() -> float:
        seconds = 0.0
        for number, chain in enumerate(chains):
            entries = [
                as_released(row, place) for place, row in enumerate(chain)
            ]  # which it changes
            clock = time.perf_counter()
            released.cook_pt_entries(entries, number)
            seconds += time.perf_counter() - clock
        return seconds

    what = f"rendering, one core, {pairs / documents:.3g} pairs a document"
    return beside_released(
        what, "documents/s", documents, clocked(work), theirs if released else None, passes
    )


def as_released(row: ChainRow, place: int) -> dict[str, Any]:
    pairs = [{"Q": pair.question, "A": pair.answer} for pair in row.pairs]
    return {"context": row.text, "QA_list": pairs, "inherit_from_prev": place > 0}


def parser_speed(rows: list[ChainRow], passes: int, released: Any) -> Comparison:
    pool = [pair for row in rows for pair in row.pairs]
    outputs = [
        pairs_text(islice(pool, start, start + 5))
        for start in range(0, min(len(pool), 100_000) - 5, 5)
    ]

    def work() -> None:
        for output in outputs:
            parse(output)

    def theirs() -> None:
        for output in outputs:
            released.parse_comprehension(output, deduplicate=True)

    what = "parser, one core, five pairs each"
    return beside_released(
        what,
        "generations/s",
        len(outputs),
        clocked(work),
        clocked(theirs) if released else None,
        passes,
    )


def beside_released(
    what: str,
    unit: str,
    count: int,
    work: Callable[[], float],
    theirs: Callable[[], float] | None,
    passes: int,
) -> Comparison:
    sides = {"ipt": work} | ({RELEASED: theirs} if theirs else {})
    speeds = {
        name: [count / seconds for seconds in taken]
        for name, taken in alternate(sides, passes, warm_up=1).items()
    }
    if theirs:
        return Comparison(what, unit, speeds["ipt"], RELEASED, speeds[RELEASED])
    return Comparison(what, unit, speeds["ipt"], note="without the released code: no --released")


def stage(chains: list[list[ChainRow]], documents: int, workers: int, passes: int) -> Comparison:
    config = compose_config("synthesize", ["rendering=paper"]).rendering
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(chains, folder / "pairs")

        def work(number: int) -> Callable[[], float]:
            def run() -> None:
                config.workers = number
                render(config, folder / "pairs", folder / f"texts-{number}", seed=0)

            return clocked(run)

        counts = sorted({1, workers})
        seconds = alternate({str(number): work(number) for number in counts}, passes, warm_up=1)
        assert len({str(hash_folder(folder / f"texts-{number}")) for number in counts}) == 1, (
            "workers change the output"
        )
    speeds = {name: [documents / one for one in taken] for name, taken in seconds.items()}
    if workers == 1:
        return Comparison(
            "stage, one worker", "documents/s", speeds["1"], note="there is one core only"
        )
    note = "the outputs are equal byte for byte"
    return Comparison(
        f"stage, {workers} workers",
        "documents/s",
        speeds[str(workers)],
        "ipt, one worker",
        speeds["1"],
        note=note,
    )


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
    pq.write_table(
        pa.Table.from_pylist(rows, SCHEMA), folder / "part-00000.parquet", row_group_size=1024
    )


if __name__ == "__main__":
    main()
