"""Fault drills: inject faults into each stage of a tiny recipe and check that nothing is lost.

    python -m dev.drill                          # all drills
    python -m dev.drill --quick                  # a selection
    python -m dev.drill --stages training --faults kill disk

A stage survives a fault if three things hold. The command continues, or prints one error line. The
same command, run again, completes. All files are then equal to those of a run without the fault.
Exit code 1: a fault was not survived or data were lost.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dev.drill.content import lost
from dev.drill.faults import Differs, Fault, NotSurvived, Trial, can_mount, faults_of
from dev.drill.servers import Server, serve
from dev.drill.stages import SERVER_STAGE, STAGES, Stage, Undisturbed, copy, undisturbed

KINDS = ("kill", "disk", "damage", "clock", "server")
ALL = (*STAGES, SERVER_STAGE)


@dataclass(frozen=True)
class Outcome:
    stage: str
    fault: str
    hits: int
    problem: str  # "" if the fault was survived
    lost: dict[str, int]
    notes: str
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.problem and not any(self.lost.values())

    def cells(self) -> tuple[str, ...]:
        lost = (
            ", ".join(f"{number} {kind}" for kind, number in self.lost.items() if number) or "none"
        )
        return (
            self.stage,
            self.fault,
            str(self.hits),
            "yes" if self.survived else f"no: {self.problem}",
            lost,
        )


def main() -> None:
    options = _options()
    _enter_namespace()
    console = Console(width=200)
    place = Path(tempfile.mkdtemp(prefix="drill-", dir=options.folder))
    console.print(
        "full disk: "
        f"{'a small tmpfs' if can_mount() else 'RLIMIT_FSIZE, because tmpfs cannot be mounted'}; "
        f"folder: {place}"
    )
    outcomes = []
    for outcome in drill(place, options.stages, options.faults, options.quick, options.seed):
        outcomes.append(outcome)
        console.print(
            f"{outcome.seconds:5.0f} s  {' | '.join(outcome.cells())}  {outcome.notes}",
            markup=False,
            highlight=False,
        )
    console.print(_table(outcomes))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(_markdown(outcomes), encoding="utf-8")
    survived = all(outcome.survived for outcome in outcomes)
    if survived:
        shutil.rmtree(place)
    sys.exit(0 if survived and outcomes else 1)


def drill(
    place: Path, stages: list[str], kinds: list[str], quick: bool, seed: int
) -> Iterator[Outcome]:
    """Run the drills of these stages one after the other. Reference runs of the stages and of
    earlier ones, which they need, come first.
    """
    known: dict[str, Undisturbed] = {}
    for stage in ALL:
        faults = [
            fault
            for fault in faults_of(stage.name)
            if fault.kind in kinds and (fault.quick or not quick)
        ]
        if stage.name in _needed(stages):
            known[stage.name] = _undisturbed(stage, place, known)
        for fault in faults if stage.name in stages else ():
            yield _try(
                known[stage.name], fault, place, random.Random(f"{seed} {stage.name} {fault.name}")
            )


def _try(reference: Undisturbed, fault: Fault, place: Path, draw: random.Random) -> Outcome:
    folder = copy(
        reference.before,
        place / f"{reference.stage.name} {fault.name}".replace(":", "").replace("/", " "),
    )
    trial, clock, problem = Trial(reference, folder, draw), time.monotonic(), ""
    missing: dict[str, int] = {}
    try:
        fault.work(trial)
        problem = "" if trial.hits else "the fault never occurred while the stage was running"
        missing = lost(reference.whole, folder)
    except NotSurvived as error:
        problem = str(error)
        missing = lost(reference.whole, folder) if isinstance(error, Differs) else {}
    if not problem:
        shutil.rmtree(folder)
    return Outcome(
        reference.stage.name,
        fault.name,
        trial.hits,
        problem,
        missing,
        "; ".join(trial.notes),
        time.monotonic() - clock,
    )


def _needed(stages: list[str]) -> set[str]:
    """The stages, and the earlier ones that they depend on."""
    needed = set(stages)
    for stage in reversed(ALL):
        if stage.name in needed and stage.after:
            needed.add(stage.after)
    return needed


def _undisturbed(stage: Stage, place: Path, known: dict[str, Undisturbed]) -> Undisturbed:
    before = known[stage.after].whole if stage.after else None
    if stage is not SERVER_STAGE:
        return undisturbed(stage, place, before)
    with serve(Server()) as server:
        return undisturbed(stage, place, before, (f"synthesis.base_url={server.address}/v1",))


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=_total(outcomes),
        caption_justify="left",
    )
    for name in HEADINGS:
        table.add_column(name, overflow="fold")
    for outcome in outcomes:
        table.add_row(*map(escape, outcome.cells()), style=None if outcome.survived else "red")
    return table


HEADINGS = ("stage", "fault", "hits", "survived", "lost")


def _markdown(outcomes: list[Outcome]) -> str:
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(outcome.cells() for outcome in outcomes)]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
        + f"\n\n{_total(outcomes)}\n"
    )


def _total(outcomes: list[Outcome]) -> str:
    survived = sum(outcome.survived for outcome in outcomes)
    missing = sum(sum(outcome.lost.values()) for outcome in outcomes)
    return (
        f"{survived} of {len(outcomes)} faults survived, {missing} documents, pairs and tokens lost"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dev.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in ALL]
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=names,
        default=names,
        metavar="STAGE",
        help=f"some of: {', '.join(names)}",
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"some of: {', '.join(KINDS)}",
    )
    parser.add_argument("--quick", action="store_true", help="run a selection of the drills")
    parser.add_argument(
        "--seed", type=int, default=0, help="for the times of kills and the damaged bytes"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="working folder (default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/drill.md"),
        help="file for the table in Markdown (default: outputs/drill.md)",
    )
    return parser.parse_args()


def _enter_namespace() -> None:
    """Restart this command in a private mount namespace, if possible, where it can mount small
    file systems that other processes do not see.
    """
    unshare = shutil.which("unshare")
    if "DRILL_NAMESPACE" in os.environ:
        return
    mount = "mount -t tmpfs tmpfs /mnt" if Path("/mnt").is_dir() else "true"
    if (
        unshare
        and not subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        os.execve(
            unshare,
            [unshare, "-rm", sys.executable, "-m", "dev.drill", *sys.argv[1:]],
            {**os.environ, "DRILL_NAMESPACE": "1"},
        )


if __name__ == "__main__":
    main()
