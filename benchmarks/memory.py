"""Peak memory of the corpus and synthesis stages over 10 thousand and over 1 million short
documents.

    python benchmarks/memory.py                                  # the corpus stage
    python benchmarks/memory.py --synthesis                      # then synthesis=rule_based
    python benchmarks/memory.py corpus.exact_duplicates=remove   # with config overrides

Each stage runs in a process of its own, whose largest resident set the operating system reports.
The ratio of the two sizes tells whether memory grows with the corpus. Documents are made up from a
seed: about 300 characters of sentences that define things.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Comparison, add_json_option, report

ROOT = Path(__file__).resolve().parents[1]
KINDS = (
    "vessel",
    "instrument",
    "plant",
    "river",
    "method",
    "mineral",
    "festival",
    "custom",
    "tool",
    "measure",
)
PLACES = (
    "northern",
    "coastal",
    "upper",
    "eastern",
    "rural",
    "central",
    "lower",
    "southern",
    "western",
    "old",
)
SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "ve", "zan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--documents", type=int, nargs=2, default=[10_000, 1_000_000], metavar=("FEW", "MANY")
    )
    parser.add_argument("--synthesis", action="store_true", help="run synthesis=rule_based too")
    parser.add_argument(
        "--stage", action="store_true", help=argparse.SUPPRESS
    )  # a process of this script that is measured
    add_json_option(parser)
    arguments, settings = parser.parse_known_args()
    if arguments.stage:
        run_corpus(settings)
        return
    commands = ["corpus", "synthesis"] if arguments.synthesis else ["corpus"]
    peaks: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in arguments.documents:
            write_documents(folder / f"{count}.jsonl", count)
            for command in commands:
                clock = time.monotonic()
                peaks[command, count] = peak_memory(command_of(command, folder, count, settings))
                print(
                    f"{command:<10} {count:>9} documents  {peaks[command, count] / 2**20:8.1f} MiB "
                    f" {time.monotonic() - clock:7.1f} s"
                )
    few, many = arguments.documents
    report(
        [
            Comparison(
                f"{command} stage, peak memory over {many:,} documents",
                "MiB",
                [peaks[command, many] / 2**20],
                f"ipt over {few:,} documents",
                [peaks[command, few] / 2**20],
                less_is_better=True,
                note="1x means that it does not grow with the corpus",
            )
            for command in commands
        ],
        arguments.json,
    )


def write_documents(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in make_texts(count):
            file.write(json.dumps({"text": text}) + "\n")


def make_texts(count: int) -> Iterator[str]:
    choose = random.Random(0)
    for number in range(count):
        name = "".join(choose.choices(SYLLABLES, k=4)).capitalize()
        kind, place, other = choose.choice(KINDS), choose.choice(PLACES), choose.choice(PLACES)
        yield (
            f"{name} is a {kind} of the {place} country. It was first described in "
            f"{1500 + number % 500} by a traveller from the "
            f"{other} valley. A {name.lower()} is made of {choose.randint(2, 90)} parts, and each "
            "of them has a name. However, the "
            f"{kind} is rarely seen today. Therefore few people know the {name.lower()} under its "
            "own name."
        )


def run_corpus(settings: list[str]) -> None:
    """The corpus stage alone, as `synthesize.py` runs it."""
    from ipt.config import compose_config
    from ipt.pipeline.stages import Stages

    Stages(compose_config("synthesize", settings)).corpus()


def command_of(stage: str, folder: Path, count: int, settings: list[str]) -> list[str]:
    """Synthesis finds the finished corpus, so that its peak is its own."""
    shared = [
        f"corpus.path={folder / f'{count}.jsonl'}",
        f"stages_dir={folder / 'stages'}",
        "synthesis=rule_based",
        *settings,
    ]
    if stage == "corpus":
        return [sys.executable, __file__, "--stage", *shared]
    return [
        sys.executable,
        str(ROOT / "synthesize.py"),
        f"output_dir={folder / f'pairs-{count}'}",
        *shared,
    ]


def peak_memory(command: list[str]) -> int:
    """Bytes of the largest resident set among a command's processes. Raises CalledProcessError if
    it fails.
    """
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
