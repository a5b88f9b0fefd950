"""Packed, mixed and masked batches: this loader against Hugging Face datasets; and what plans of
any size cost.

    python benchmarks/loading.py                            # synthetic stores; a minute
    python benchmarks/loading.py --workers 2 --passes 5
    python benchmarks/loading.py --stores raw=outputs/…/a instruction=outputs/…/b
    python benchmarks/loading.py --plan                     # plans of 1 B and of 1 T tokens

The Hugging Face side has the same documents as tokenised, memory-mapped datasets,
`interleave_datasets` with probabilities that give the same shares of tokens on average, and a
collator that packs with position ids: that of transformers (DataCollatorWithFlattening), which is
the path that its users have, and one written for this comparison in numpy, over a map-style and an
iterable dataset. Its batches hold as many documents as make one of ours on average; they have no
source of each token, no loss masks, no exact shares and no exact resume. Memory is what the
processes have for themselves, without the pages of mapped files, which the system takes back when
it needs them. A step is one of a model that trains 10,000 tokens/s.
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.results import Comparison, add_json_option, alternate, named, report
from ipt.config import MixtureConfig
from ipt.mixture.order import Documents
from ipt.mixture.plan import Plan, make_plan
from ipt.mixture.report import plan_report
from ipt.tokens.store import EncodedDocument, TokenStore, write_store

STEP_TOKENS = 10_000  # tokens/s of training that the loader is compared with
Batches = Callable[[], Iterator[int]]  # an endless loader that gives the tokens of each batch


def main() -> None:
    arguments = parse_arguments()
    if arguments.plan:
        report(measure_plans(), arguments.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: TokenStore.open(path)
            for name, path in (pair.split("=", 1) for pair in arguments.stores)
        }
        report(
            measure_loading(arguments, stores or make_stores(Path(folder)), Path(folder)),
            arguments.json,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="measure plans instead")
    parser.add_argument(
        "--stores",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="two token stores; default: made-up ones",
    )
    parser.add_argument("--packing", default="concat", choices=("concat", "best_fit"))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each pass, after its first batches"
    )
    parser.add_argument("--passes", type=int, default=3)
    add_json_option(parser)
    return parser.parse_args()


# Loading
# ----------------------------------------------------------------------------------------------


def measure_loading(
    arguments: argparse.Namespace, stores: Mapping[str, TokenStore], folder: Path
) -> list[Comparison]:
    sides = {
        "ipt": our_batches(arguments, stores),
        **hugging_face_batches(arguments, stores, folder),
    }
    works = {name: partial(one_pass, batches, arguments.seconds) for name, batches in sides.items()}
    passes = alternate(works, arguments.passes)
    speeds = {name: [speed for speed, _ in taken] for name, taken in passes.items()}
    grown = {
        name: f"{max(growth for _, growth in taken) / 2**20:.1f} MiB"
        for name, taken in passes.items()
    }
    steps = {name: f"{STEP_TOKENS / median(taken):.2%}" for name, taken in speeds.items()}
    what = (
        f"{arguments.packing}, {arguments.micro_batch} x {arguments.seq_len} tokens, "
        f"{arguments.workers} workers"
    )
    return [
        Comparison(
            what,
            "tokens/s",
            speeds["ipt"],
            named(peer, "datasets"),
            speeds[peer],
            note=(
                f"memory grew by {grown['ipt']}, of the peer by {grown[peer]}; share of a step "
                f"{steps['ipt']}, of the peer {steps[peer]}"
            ),
        )
        for peer in list(sides)[1:]
    ]


def one_pass(make_batches: Batches, seconds: float) -> tuple[float, int]:
    """Tokens/s, and the bytes by which memory grew at most while they were measured."""
    batches = make_batches()
    for _ in range(20):  # workers have started, windows are derived
        next(batches)
    started = clock = time.monotonic()
    before = peak = private_memory()
    tokens = 0
    while clock < started + seconds:
        for _ in range(20):
            tokens += next(batches)
        peak, clock = max(peak, private_memory()), time.monotonic()
    return tokens / (clock - started), peak - before


def our_batches(arguments: argparse.Namespace, stores: Mapping[str, TokenStore]) -> Batches:
    from ipt.mixture.batches import PackedLoader, PackedSequences

    config = MixtureConfig(
        ratios=dict.fromkeys(stores, 1.0), seq_len=arguments.seq_len, packing=arguments.packing
    )
    plan = make_plan(stores, config, 2_000_000 * arguments.micro_batch, seed=0)
    loader = PackedLoader(
        PackedSequences(plan, [stores[name] for name in plan.sources]),
        arguments.micro_batch,
        1,
        0,
        1,
        arguments.workers,
    )
    return lambda: (batch["input_ids"].numel() for batch in loader)


def hugging_face_batches(
    arguments: argparse.Namespace, stores: Mapping[str, TokenStore], folder: Path
) -> dict[str, Batches]:
    import datasets
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening

    datasets.disable_progress_bars()
    sources = [as_dataset(store, folder / "datasets" / name) for name, store in stores.items()]
    weights = np.array(
        [len(store) / store.n_tokens for store in stores.values()]
    )  # equal shares of tokens, in documents
    options: dict[str, Any] = {
        "probabilities": (weights / weights.sum()).tolist(),
        "seed": 0,
        "stopping_strategy": "all_exhausted",
    }
    mapped = datasets.interleave_datasets([source.shuffle(seed=0) for source in sources], **options)
    shards = max(1, arguments.workers)
    streams = [
        source.to_iterable_dataset(shards).shuffle(seed=0, buffer_size=1000) for source in sources
    ]
    iterable = datasets.interleave_datasets(streams, **options)
    documents = round(arguments.micro_batch * arguments.seq_len * weights.sum() / len(stores))
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def loader(dataset: Any, collate: Callable[[Any], Any]) -> Batches:
        batches = DataLoader(
            dataset, batch_size=documents, collate_fn=collate, num_workers=arguments.workers
        )
        return lambda: (batch["input_ids"].numel() for _ in itertools.count() for batch in batches)

    return {
        "Hugging Face, map-style, DataCollatorWithFlattening": loader(mapped, flattening),
        "Hugging Face, map-style, numpy collator": loader(mapped.with_format("numpy"), pack),
        "Hugging Face, iterable, numpy collator": loader(iterable.with_format("numpy"), pack),
    }


def pack(documents: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Documents one after another as one row, with the fields that ours have, but for the source of
    each token.
    """
    import torch

    sizes = [len(document["input_ids"]) for document in documents]
    ids = np.concatenate([document["input_ids"] for document in documents])
    bounds = np.cumsum([0, *sizes])
    labels = np.append(ids[1:], -100)
    labels[bounds[1:] - 1] = -100
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], sizes)
    fields = {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "cu_seq_lens": bounds.astype(np.int32),
    }
    return {
        **{name: torch.from_numpy(array) for name, array in fields.items()},
        "max_length": max(sizes),
    }


def as_dataset(store: TokenStore, folder: Path) -> Any:
    """The documents of a store as a memory-mapped dataset of Hugging Face's."""
    import pyarrow as pa
    from datasets import Dataset, load_from_disk

    tokens = pa.array(
        np.concatenate([store.tokens(document) for document in range(len(store))]).astype(np.int64)
    )
    offsets = pa.array(store.positions(np.arange(len(store) + 1)))
    Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)})).save_to_disk(
        folder
    )
    return load_from_disk(folder)


def make_stores(folder: Path) -> dict[str, TokenStore]:
    """Some 20 M random tokens: documents of 500 tokens in the mean, and longer ones as
    instruction-augmented text has them.
    """
    stores = {}
    for seed, (name, count, mean) in enumerate(
        (("raw", 20_000, 500), ("instruction", 10_000, 1000))
    ):
        random = np.random.default_rng(seed)
        documents = (
            EncodedDocument(random.integers(0, 32_000, size, dtype=np.uint32))
            for size in log_normal(count, mean, seed)
        )
        write_store(folder / name, documents, "made up", 10_000_000)
        stores[name] = TokenStore(folder / name)
    return stores


def log_normal(count: int, mean: float, seed: int) -> np.ndarray:
    return np.maximum(
        8, np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    ).astype(np.int64)


# Plans
# ----------------------------------------------------------------------------------------------


def measure_plans() -> list[Comparison]:
    """Plans of two sources in sequences of 2,048 tokens, each in a process of its own, which
    touches nothing else.
    """
    found = []
    with tempfile.TemporaryDirectory() as name:
        for seed, (source, count) in enumerate((("raw", 1_500_000), ("instruction", 500_000))):
            np.save(
                Path(name) / f"{source}.npy",
                np.concatenate([[0], np.cumsum(log_normal(count, 500, seed))]),
            )
        for packing in ("concat", "best_fit"):
            for plan in (plan_of_a_billion, plan_of_a_trillion):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    for label, seconds, memory in pool.apply(plan, (Path(name), packing)):
                        found.append(
                            Comparison(
                                f"{packing}: {label}",
                                "s",
                                [seconds],
                                note=f"peak memory {memory / 2**20:.1f} MiB",
                            )
                        )
    return found


Row = tuple[
    str, float, int
]  # what was done, seconds, and the bytes at its peak beyond those before there was a plan


def plan_of_a_billion(folder: Path, packing: str) -> list[Row]:
    stores = {source: MappedLengths(folder / f"{source}.npy") for source in ("raw", "instruction")}
    empty = status(os.getpid(), "VmRSS")
    return [
        timed(
            empty,
            "1 B tokens of 2 M documents, all blocks packed and reported",
            lambda: report_of(stores, packing, 10**9),
        )
    ]


def plan_of_a_trillion(folder: Path, packing: str) -> list[Row]:
    stores = {"raw": FormulaLengths(1_500_000_000), "instruction": FormulaLengths(500_000_000)}
    plans: list[Plan] = []
    empty = status(os.getpid(), "VmRSS")
    rows = [
        timed(
            empty,
            "1 T tokens of 2 G documents, planned",
            lambda: plans.append(make_plan(stores, config_of(packing), 10**12 // 2048, 0)),
        )
    ]
    last = plans[0].n_blocks - 1
    for label, number in (("first", 0), ("second", 1), ("middle", last // 2), ("last", last)):
        rows.append(
            timed(
                empty,
                f"1 T tokens, its {label} block of {last + 1:,}",
                lambda number=number: plans[0].block(number),
            )
        )
    rows.append(timed(empty, "1 T tokens, reported, cuts estimated", lambda: plan_report(plans[0])))
    return rows


def report_of(stores: Mapping[str, Documents], packing: str, tokens: int) -> None:
    report = plan_report(make_plan(stores, config_of(packing), tokens // 2048, seed=0))
    assert report["exact_cuts"]


def config_of(packing: str) -> MixtureConfig:
    return MixtureConfig(ratios={"raw": 0.7, "instruction": 0.3}, seq_len=2048, packing=packing)


class MappedLengths:
    """Positions in a memory-mapped file, as a token store has them."""

    def __init__(self, path: Path) -> None:
        self._positions = np.load(path, mmap_mode="r")
        self.n_tokens = int(self._positions[-1])

    def __len__(self) -> int:
        return len(self._positions) - 1

    def positions(self, documents: np.ndarray) -> np.ndarray:
        return np.asarray(self._positions[documents])


class FormulaLengths:
    """Documents of 100 to 900 tokens whose positions need no memory."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.n_tokens = int(self.positions(np.array([count]))[0])

    def __len__(self) -> int:
        return self._count

    def positions(self, documents: np.ndarray) -> np.ndarray:
        return documents * 500 + documents * 2_654_435 % 401


def timed(empty: int, label: str, work: Callable[[], Any]) -> Row:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    started = time.monotonic()
    work()
    return label, time.monotonic() - started, status(os.getpid(), "VmHWM") - empty


# Memory
# ----------------------------------------------------------------------------------------------


def private_memory() -> int:
    """Bytes that this process and its children have for themselves."""
    children = (Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8")).split()
    return sum(status(int(process), "RssAnon") for process in (os.getpid(), *children))


def status(process: int, field: str) -> int:
    """A size of a process, in bytes; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


if __name__ == "__main__":
    main()
