"""Time and memory of each room by the size of the text: what a megabyte costs, what a start costs,
and whether either grows.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

SOURCE, SHUFFLED = "source.jsonl", "shuffled.jsonl"
TEXT = "text"  # what is made before the rooms
MODEL = "embedded:tiny"
ITEMS = 1_000  # that contamination looks for
STEP_TOKENS, STEPS_A_MEGABYTE = 128, 25  # of the tiny training


@dataclass(frozen=True)
class Cost:
    """Of a room on one text: seconds of one core, and peak memory in bytes."""

    megabytes: float
    seconds: float
    memory: int


def measure_rooms(sizes: Sequence[float], rooms: Sequence[str]) -> Table:
    """A row for each room; each is measured in processes of their own, one for a size."""
    costs: dict[str, list[Cost]] = {room: [] for room in rooms}
    with tempfile.TemporaryDirectory() as name:
        for megabytes in sizes:
            folder = Path(name) / f"{megabytes:g}"
            folder.mkdir()
            measured(TEXT, folder, megabytes)
            for room in ROOMS:  # each reads what those before it wrote
                cost = measured(room, folder, megabytes)
                if room in costs:
                    costs[room].append(cost)
    columns = (
        "s a MB",
        "growth",
        "s to start",
        "MB/s of a core",
        *(f"MiB at {size:g} MB" for size in sizes),
        "MiB a MB",
    )
    table = Table(
        title=f"Rooms on {', '.join(f'{size:g}' for size in sizes)} MB of text, one core",
        title_justify="left",
    )
    table.add_column("room")
    for column in columns:
        table.add_column(column, justify="right")
    for room, found in costs.items():
        line = fit(found)
        memory = [f"{cost.memory / 2**20:,.0f}" for cost in found]
        table.add_row(
            room,
            f"{line.slope:.3f}",
            f"{line.growth:.2f}",
            f"{line.start:.1f}",
            f"{1 / line.slope:.2f}",
            *memory,
            f"{line.memory:.2f}",
        )
    return table


class Line(NamedTuple):
    """What costs follow from size."""

    slope: float  # seconds a megabyte
    start: float  # seconds at no text at all
    # the slope between the two largest sizes by that between the two smallest: 1 where time is
    # linear
    growth: float
    memory: float  # MiB a megabyte, between the two largest sizes


def fit(costs: Sequence[Cost]) -> Line:
    """The line through the smallest and the largest of three sizes or more."""
    assert len(costs) >= 3, "growth needs three sizes"
    slopes = [
        (after.seconds - before.seconds) / (after.megabytes - before.megabytes)
        for before, after in pairwise(costs)
    ]
    whole = (costs[-1].seconds - costs[0].seconds) / (costs[-1].megabytes - costs[0].megabytes)
    memory = (
        (costs[-1].memory - costs[-2].memory) / 2**20 / (costs[-1].megabytes - costs[-2].megabytes)
    )
    return Line(
        whole, costs[0].seconds - whole * costs[0].megabytes, slopes[-1] / slopes[0], memory
    )


def measured(room: str, folder: Path, megabytes: float) -> Cost:
    """Run a room in a process of its own. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "dev.scale.rooms", room, str(folder), str(megabytes)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    if result.returncode:
        raise RuntimeError(f"{room} on {megabytes:g} MB failed: {result.stderr.strip()[-2000:]}")
    return Cost(megabytes, **json.loads(result.stdout.splitlines()[-1]))


def run_room(room: str, folder: Path, megabytes: float) -> None:
    """In a process of its own: print the CPU seconds from where the room begins its work, and the
    process's peak memory.
    """
    clock = Clock()
    (write_text if room == TEXT else ROOMS[room])(folder, megabytes, clock)
    seconds = clock.seconds()
    peak = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": seconds, "memory": int(peak.split()[1]) * 1024}))


class Clock:
    """CPU seconds of this process, which other work on the machine does not lengthen."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._started = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self._started


# Rooms
# ----------------------------------------------------------------------------------------------


def write_text(folder: Path, megabytes: float, clock: Clock) -> None:
    """The embedded corpus, again and again under other ids, as it is and with the words of each
    document shuffled.
    """
    from ipt.corpus.build import build_corpus
    from ipt.stage import read_parts

    if not (pages := _embedded(folder)).exists():
        build_corpus(_config().corpus, 0, pages)
    texts = [row["text"] for row in read_parts(pages / "documents", ["text"])]
    with (
        (folder / SOURCE).open("w", encoding="utf-8") as source,
        (folder / SHUFFLED).open("w", encoding="utf-8") as shuffled,
    ):
        for number, text in _enough(texts, int(megabytes * 1e6)):
            source.write(json.dumps({"id": str(number), "text": text}) + "\n")
            words = text.split()
            random.Random(number).shuffle(words)
            shuffled.write(json.dumps({"id": str(number), "text": " ".join(words)}) + "\n")


def corpus(folder: Path, megabytes: float, clock: Clock) -> None:
    _read(folder / SOURCE, folder / "corpus", clock)


def duplicates(folder: Path, megabytes: float, clock: Clock) -> None:
    _read(
        folder / SHUFFLED,
        folder / "unique",
        clock,
        "corpus.exact_duplicates=remove",
        "corpus.near_duplicates=0.8",
    )


def synthesis(folder: Path, megabytes: float, clock: Clock) -> None:
    from ipt.synthesis.run import synthesize

    config = _config("synthesis=rule_based").synthesis
    clock.begin()
    synthesize(config, folder / "corpus" / "documents", folder / "synthesis", 0)


def filters(folder: Path, megabytes: float, clock: Clock) -> None:
    from ipt.synthesis.quality.filters import filter_pairs

    config = _config(
        "filters.limits.grounded=[0.5,null]", "filters.limits.asked_before=[null,0]"
    ).filters
    clock.begin()
    filter_pairs(config, folder / "synthesis" / "pairs", folder / "filters", 0, None)


def rendering(folder: Path, megabytes: float, clock: Clock) -> None:
    from ipt.rendering.run import render

    config = _config("rendering.workers=1").rendering
    clock.begin()
    render(config, folder / "filters" / "pairs", folder / "rendering", 0)


def tokens(folder: Path, megabytes: float, clock: Clock) -> None:
    from ipt.models import load_tokenizer
    from ipt.tokens.tokenize import tokenize_texts

    load_tokenizer(MODEL)  # it is kept
    clock.begin()
    tokenize_texts(
        _config("tokens.workers=1").tokens, folder / "rendering" / "texts", MODEL, folder / "tokens"
    )


def hashing(folder: Path, megabytes: float, clock: Clock) -> None:
    """What the manifests of rendering and tokens take: every finished stage hashes what it wrote."""
    from ipt.stage import hash_folder

    clock.begin()
    for stage in ("rendering", "tokens"):
        hash_folder(folder / stage)


def loading(folder: Path, megabytes: float, clock: Clock) -> None:
    """The plan of one epoch, and all of its batches."""
    from ipt.config import MixtureConfig
    from ipt.mixture.batches import PackedLoader, PackedSequences
    from ipt.mixture.plan import make_plan
    from ipt.tokens.store import TokenStore

    store, config = (
        TokenStore.open(folder / "tokens"),
        MixtureConfig(ratios={"all": 1.0}, seq_len=2048),
    )
    clock.begin()
    plan = make_plan({"all": store}, config, store.n_tokens // config.seq_len, 0)
    for _ in PackedLoader(PackedSequences(plan, [store]), 1, 1):
        pass


def training(folder: Path, megabytes: float, clock: Clock) -> None:
    """Steps of a tiny model, as many as the text is long: what a step costs beside the model, and
    what grows with their number.
    """
    from ipt.training.train import train

    steps = round(STEPS_A_MEGABYTE * megabytes)
    settings = (
        "mixture=vanilla",
        f"mixture.seq_len={STEP_TOKENS}",
        "trainer=cpu",
        f"trainer.max_steps={steps}",
        "trainer.accumulate=1",
    )
    config = _config(
        f"model={MODEL}",
        *settings,
        "trainer.micro_batch_size=1",
        "trainer.keep_checkpoints=false",
        command="train",
    )
    clock.begin()
    train(config, {"raw": folder / "tokens"}, folder / "training")


def contamination(folder: Path, megabytes: float, clock: Clock) -> None:
    """The part of the evaluation that reads the training data; what scoring costs goes with the
    tasks' items alone.
    """
    from ipt.evaluation.contamination import find_contamination
    from ipt.stage import read_parts

    class Item(NamedTuple):
        id: str
        text: str
        prompt_hash: str = ""

    texts = (row["text"] for row in read_parts(_embedded(folder) / "held_out", ["text"]))
    items = [Item(str(number), text) for number, text in zip(range(ITEMS), texts, strict=False)]
    clock.begin()
    find_contamination(
        {"pages": items},
        str(folder / "rendering" / "texts"),
        MODEL,
        folder / "contamination",
        workers=1,
    )


ROOMS: dict[str, Callable[[Path, float, Clock], None]] = {
    "corpus": corpus,
    "corpus, duplicates removed": duplicates,
    "synthesis by rules": synthesis,
    "filters": filters,
    "rendering": rendering,
    "tokens": tokens,
    "hashes of a stage": hashing,
    "mixture and loading": loading,
    "training, tiny model": training,
    "contamination": contamination,
}


def _read(source: Path, output: Path, clock: Clock, *settings: str) -> None:
    from ipt.corpus.build import build_corpus

    config = _config(
        f"corpus.path={source}", "corpus.id_field=id", "corpus.held_out=0", *settings
    ).corpus
    clock.begin()
    build_corpus(config, 0, output)


def _embedded(folder: Path) -> Path:
    """The embedded corpus, which all sizes share."""
    return folder.with_name("embedded")


def _config(*settings: str, command: str = "synthesize") -> Any:
    from ipt.config import compose_config

    return compose_config(command, list(settings))


def _enough(texts: Sequence[str], characters: int) -> Iterator[tuple[int, str]]:
    """Numbered texts, from the first again behind the last, until there are so many characters."""
    for number in count():
        yield number, texts[number % len(texts)]
        characters -= len(texts[number % len(texts)])
        if characters <= 0:
            return


if __name__ == "__main__":
    run_room(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
