"""Fault drills: what is done to each stage of a tiny recipe, whether it survives, and what is lost.

    python -m dev.drill                          # all
    python -m dev.drill --quick                  # a selection
    python -m dev.drill --stages training --faults kill disk

Survived: the command goes on, or ends in one line for people; the same command again completes; and
then all files are those of an undisturbed run. Exit code 1 if a fault was not survived or something
was lost.
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
    problem: str  # "" if it was survived
    lost: dict[str, int]
    told: str
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
        f"{'a small tmpfs' if can_mount() else 'RLIMIT_FSIZE, for no file system can be mounted'}; "
        f"folder: {place}"
    )
    outcomes = []
    for outcome in drill(place, options.stages, options.faults, options.quick, options.seed):
        outcomes.append(outcome)
        console.print(
            f"{outcome.seconds:5.0f} s  {' | '.join(outcome.cells())}  {outcome.told}",
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
    """Do what is done to these stages, one after the other; undisturbed runs of the stages before
    them come first.
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
        problem = "" if trial.hits else "the fault never met the stage at work"
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
        "; ".join(trial.told),
        time.monotonic() - clock,
    )


def _needed(stages: list[str]) -> set[str]:
    """The stages, and those before them."""
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
        help=f"of: {', '.join(names)}",
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"of: {', '.join(KINDS)}",
    )
    parser.add_argument("--quick", action="store_true", help="a selection")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments, and of the bytes that are damaged"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work; default: the system's folder for temporary files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/drill.md"),
        help="the table as Markdown (default: outputs/drill.md)",
    )
    return parser.parse_args()


def _enter_namespace() -> None:
    """Go on in a mount namespace of this process's own, where small disks can be mounted that
    nobody else sees.
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
