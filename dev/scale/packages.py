"""Time and memory of each package of ipt, run alone on texts of several sizes.

The measurements give the cost per megabyte, the fixed cost of a start, and whether time grows
faster than the text.
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
TEXT = "text"  # writes the input of the packages
MODEL = "embedded:tiny"
ITEMS = 1_000  # evaluation items that contamination looks for
STEP_TOKENS, STEPS_A_MEGABYTE = 128, 25  # of the tiny training


@dataclass(frozen=True)
class Cost:
    """Cost of a package on one text: CPU seconds of one core, peak memory in bytes."""

    megabytes: float
    seconds: float
    memory: int


def measure_packages(sizes: Sequence[float], packages: Sequence[str]) -> Table:
    """A table with a row per package. Each package and size runs in a subprocess of its own."""
    costs: dict[str, list[Cost]] = {package: [] for package in packages}
    with tempfile.TemporaryDirectory() as name:
        for megabytes in sizes:
            folder = Path(name) / f"{megabytes:g}"
            folder.mkdir()
            run_in_subprocess(TEXT, folder, megabytes)
            for package in PACKAGES:  # each one reads the output of earlier ones
                cost = run_in_subprocess(package, folder, megabytes)
                if package in costs:
                    costs[package].append(cost)
    columns = (
        "s per MB",
        "growth",
        "s to start",
        "MB/s per core",
        *(f"MiB at {size:g} MB" for size in sizes),
        "MiB per MB",
    )
    table = Table(
        title=f"Packages on {', '.join(f'{size:g}' for size in sizes)} MB of text, one core",
        title_justify="left",
    )
    table.add_column("package")
    for column in columns:
        table.add_column(column, justify="right")
    for package, found in costs.items():
        line = fit(found)
        memory = [f"{cost.memory / 2**20:,.0f}" for cost in found]
        table.add_row(
            package,
            f"{line.slope:.3f}",
            f"{line.growth:.2f}",
            f"{line.start:.1f}",
            f"{1 / line.slope:.2f}",
            *memory,
            f"{line.memory:.2f}",
        )
    return table


class Line(NamedTuple):
    """Cost as a linear function of the text size."""

    slope: float  # seconds per megabyte
    start: float  # seconds without any text
    # slope between the two largest sizes divided by the slope between the two smallest; 1 if time
    # is linear
    growth: float
    memory: float  # MiB per megabyte, between the two largest sizes


def fit(costs: Sequence[Cost]) -> Line:
    """The line through the smallest and the largest of at least three sizes."""
    assert len(costs) >= 3, "growth needs at least three sizes"
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


def run_in_subprocess(package: str, folder: Path, megabytes: float) -> Cost:
    """Run one package in a subprocess. Raises RuntimeError if the subprocess fails."""
    command = [sys.executable, "-m", "dev.scale.packages", package, str(folder), str(megabytes)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    if result.returncode:
        raise RuntimeError(f"{package} on {megabytes:g} MB failed: {result.stderr.strip()[-2000:]}")
    return Cost(megabytes, **json.loads(result.stdout.splitlines()[-1]))


def run_package(package: str, folder: Path, megabytes: float) -> None:
    """Run one package in this process. Prints its CPU seconds, without loading and set-up, and the
    peak memory of the process, as JSON.
    """
    clock = Clock()
    work = write_text if package == TEXT else PACKAGES[package]
    work(folder, megabytes, clock)
    seconds = clock.seconds()
    peak = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": seconds, "memory": int(peak.split()[1]) * 1024}))


class Clock:
    """CPU seconds of this process since `begin`; other processes do not add to them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._started = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self._started


# Packages
# ----------------------------------------------------------------------------------------------


def write_text(folder: Path, megabytes: float, clock: Clock) -> None:
    """Write the embedded corpus repeatedly under new ids until the size is reached: once unchanged,
    and once with the words of each document shuffled.
    """
    from ipt.corpus.build import build_corpus
    from ipt.files import read_parts

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
        "filters.thresholds.grounded=[0.5,null]", "filters.thresholds.duplicate_question=[null,0]"
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

    load_tokenizer(MODEL)  # cached, so not part of the measured time
    clock.begin()
    tokenize_texts(
        _config("tokens.workers=1").tokens, folder / "rendering" / "texts", MODEL, folder / "tokens"
    )


def hashing(folder: Path, megabytes: float, clock: Clock) -> None:
    """Hashing for the manifests of rendering and tokens: a finished stage hashes its output."""
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
    """Steps of a tiny model, in proportion to the text: the overhead of a step outside the model,
    and whether it grows with the number of steps.
    """
    from ipt.training.train import train

    steps = round(STEPS_A_MEGABYTE * megabytes)
    settings = (
        "mixture=vanilla",
        f"mixture.seq_len={STEP_TOKENS}",
        "trainer=cpu",
        f"trainer.max_steps={steps}",
        "trainer.accumulate_grad_batches=1",
    )
    config = _config(
        f"model={MODEL}",
        *settings,
        "trainer.micro_batch_size=1",
        "checkpoint.keep_after_training=false",
        command="train",
    )
    clock.begin()
    train(config, {"raw": folder / "tokens"}, folder / "training")


def contamination(folder: Path, megabytes: float, clock: Clock) -> None:
    """The contamination check, the only part of evaluation that reads the training data. The cost
    of scoring depends on the number of items alone.
    """
    from ipt.evaluation.contamination import find_contamination
    from ipt.files import read_parts

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


PACKAGES: dict[str, Callable[[Path, float, Clock], None]] = {
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
        f"corpus.path={source}", "corpus.id_field=id", "corpus.held_out_fraction=0", *settings
    ).corpus
    clock.begin()
    build_corpus(config, 0, output)


def _embedded(folder: Path) -> Path:
    """Folder of the embedded corpus, shared by all sizes."""
    return folder.with_name("embedded")


def _config(*settings: str, command: str = "synthesize") -> Any:
    from ipt.config import compose_config

    return compose_config(command, list(settings))


def _enough(texts: Sequence[str], characters: int) -> Iterator[tuple[int, str]]:
    """Numbered texts, cycling through `texts` until they add up to `characters`."""
    for number in count():
        yield number, texts[number % len(texts)]
        characters -= len(texts[number % len(texts)])
        if characters <= 0:
            return


if __name__ == "__main__":
    run_package(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
