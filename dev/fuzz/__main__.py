"""Fuzz every parser and reader: change valid inputs at random, and change those further that reach
new lines of ipt.

    python -m dev.fuzz --minutes 60
    python -m dev.fuzz --minutes 5 --only journal "task csv" --seed 7
    python -m dev.fuzz --replay outputs/fuzz/findings/journal/0123456789ab

A finding is an error other than UserError, more than 10 seconds, more than 1 GiB of memory, a crash
of the process, or data that are lost between writing and reading. FOLDER/findings has the shortest
input and the traceback of each finding. The same seed and an empty folder give the same inputs.
Exit code 1: there are findings.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from dev.fuzz.targets import TARGETS
from dev.fuzz.worker import SECONDS, Progress

ROOT = Path(__file__).resolve().parents[2]

SLICE = 30.0  # seconds per target and turn
# seconds that a process may need beyond its slice, for imports and for inputs of earlier runs
START = 600.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Total:
    """Statistics of one target over all slices."""

    executions: int = 0
    kept: int = 0
    slowest: float = 0.0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dev.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", type=float, default=SLICE, help="seconds per target and turn")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TARGETS,
        metavar="TARGET",
        help=f"some of: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/fuzz"),
        help="folder for findings and for inputs that reach new lines",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FINDING",
        help="run the input of a finding once and show the error",
    )
    arguments = parser.parse_args()
    if arguments.replay:
        return replay(arguments.replay)
    totals, findings = fuzz(
        arguments.only or list(TARGETS),
        arguments.folder,
        arguments.seed,
        60 * arguments.minutes,
        arguments.slice,
    )
    for name, total in totals.items():
        print(
            f"{name:<20} {total.executions:>9,} inputs  {total.kept:>4} reached new lines  slowest "
            f"{total.slowest:5.2f} s"
        )
    minutes = sum(total.seconds for total in totals.values()) / 60
    print(
        f"{sum(total.executions for total in totals.values()):,} inputs in {minutes:.1f} minutes, "
        f"{len(findings)} findings"
    )
    sys.exit(bool(findings))


def fuzz(
    names: list[str], folder: Path, seed: int, seconds: float, slice_seconds: float
) -> tuple[dict[str, Total], set[str]]:
    """Fuzz the targets in turns until the time is up. Returns statistics and findings."""
    totals = {name: Total() for name in names}
    findings: set[str] = set()
    end = monotonic() + seconds
    while monotonic() < end:
        for name, total in totals.items():
            if (left := end - monotonic()) <= 0:
                break
            started = monotonic()
            done = run_slice(name, folder, seed, total.executions, min(slice_seconds, left))
            total.executions += done.executions
            total.kept += done.kept
            total.slowest = max(total.slowest, done.slowest)
            total.seconds += monotonic() - started
            for place, (path, error) in done.findings.items():
                findings.add(f"{name}: {place}")
                print(f"FINDING {name}: {place}: {error}\n        {path}", flush=True)
    return totals, findings


def run_slice(name: str, folder: Path, seed: int, first: int, seconds: float) -> Progress:
    """Fuzz a target for one slice in a subprocess. If the subprocess crashes, or hangs outside
    Python, that is a finding too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".slice-") as home:
        command = [
            sys.executable,
            "-m",
            "dev.fuzz.worker",
            name,
            str(folder),
            home,
            str(seed),
            str(first),
            str(seconds),
        ]
        with (Path(home) / "log").open("w+", errors="replace", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log
            )
            try:
                code = process.wait(START + seconds + SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            log.seek(0)
            output = log.read()
        if code == 0:
            return Progress(
                **json.loads((Path(home) / "progress.json").read_text(encoding="utf-8"))
            )
        return _crashed(name, folder, Path(home), code, output)


def _crashed(name: str, folder: Path, home: Path, code: int, output: str) -> Progress:
    current = home / "current"
    if not current.exists():
        raise RuntimeError(f"{name} did not start: {output[-2000:]}")
    what = f"hang or crash ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    path = folder / "findings" / name / what.replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(current.read_bytes())
    path.with_suffix(".txt").write_text(output, encoding="utf-8")
    number = int((home / "number").read_text(encoding="utf-8"))
    lines = output.strip().splitlines() or [""]
    return Progress(executions=number + 1, findings={what: [str(path), lines[-1]]})


def replay(path: Path) -> None:
    with TemporaryDirectory() as scratch:
        TARGETS[path.parent.name].check(path.read_bytes(), Path(scratch))
    print("no error is raised")


if __name__ == "__main__":
    main()
