"""All benchmarks with one command, each against its peers, and one page of their results.

    python -m benchmarks                                  # hours; writes outputs/benchmarks
    python -m benchmarks --quick                          # small; writes outputs/benchmarks-quick
    python -m benchmarks --only training,loss --again     # rerun these two
    python -m benchmarks --data DATA --released LMOps/instruction_pretrain

Each runs as a process of its own, in which the sides take turns. The folder gets NAME.json and
NAME.log of each, results.json and results.md. Run the same command again to resume an interrupted
run; finished benchmarks are kept. The exit code is 1 if a benchmark failed.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.suite import ROOT, Benchmark, run_all

# Name: script, options, options for --quick.
BENCHMARKS = {
    "synthesis": (
        "synthesis.py",
        "--documents 90 --max-new-tokens 250 --lookup-tokens 4 --passes 3",
        "--documents 16 --shots 4 --max-new-tokens 48 --live 4 --passes 2",
    ),
    "rendering": ("rendering.py", "", "--documents 20000 --passes 3"),
    "loading": ("loading.py", "--passes 5", "--seconds 1"),
    "plans": ("loading.py", "--plan", "--plan"),
    "loss": ("loss.py", "--tokens 1024 --repeats 5", "--tokens 256 --repeats 2"),
    "training": ("training.py", "", "--quick"),
    "evaluation": ("evaluation.py", "", "--items 4 --peer-items 1 --passes 2"),
    "memory": ("memory.py", "--synthesis", "--synthesis --documents 2000 20000"),
}


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.output or ROOT / "outputs" / (
        "benchmarks-quick" if arguments.quick else "benchmarks"
    )
    sys.exit(not run_all(list_benchmarks(arguments), folder, arguments.only, arguments.again))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: whether all runs, and rough ratios"
    )
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help=", ".join(BENCHMARKS),
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: outputs/benchmarks, or outputs/benchmarks-quick",
    )
    parser.add_argument("--again", action="store_true", help="run what has finished before, too")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="real items and pairs, in the layout of data_dir; default: made up",
    )
    parser.add_argument(
        "--released",
        type=Path,
        metavar="FOLDER",
        help="instruction_pretrain of a checkout of microsoft/LMOps",
    )
    arguments = parser.parse_args()
    for name in arguments.only:
        if name not in BENCHMARKS:
            parser.error(
                f"--only {name}: no such benchmark, expected some of {', '.join(BENCHMARKS)}"
            )
    return arguments


def list_benchmarks(arguments: argparse.Namespace) -> list[Benchmark]:
    more: dict[str, list[str]] = {"rendering": [], "evaluation": []}
    if arguments.data:
        data = arguments.data.absolute()
        more["rendering"] += ["--data", str(data / "fairytaleqa" / "train.jsonl.gz")]
        more["evaluation"] += ["--data", str(data)]
    if arguments.released:
        more["rendering"] += ["--released", str(arguments.released.absolute())]
    return [
        Benchmark(
            name,
            ROOT / "benchmarks" / script,
            (*(quick if arguments.quick else full).split(), *more.get(name, [])),
        )
        for name, (script, full, quick) in BENCHMARKS.items()
    ]


if __name__ == "__main__":
    main()
