"""The faults, each a function that does something to a stage at work and says what came of it."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ipt.stage import STARTED
from scripts.drill.content import content_of, finished_stages
from scripts.drill.servers import MODES, Server, serve
from scripts.drill.stages import LIMIT, Ended, Running, Stage, Undisturbed, copy, run, whole_recipe

HITS = 3  # times that one run is killed
MARGIN = 0.3  # seconds: a stage of a few milliseconds is hit around its time
ROOM = (0.2, 0.7)  # of what a stage writes
LARGEST = 8192  # bytes of a file where no small disk can be mounted
HOURS = (5, -5)
# seconds that a command may take longer than undisturbed before something must have waited in vain
SLACK = 60
NO_ROOM = "no room to write"


class NotSurvived(Exception):
    """Says what went wrong."""


class Differs(NotSurvived):
    """The command has come to its end, but not to that of the undisturbed run."""


@dataclass
class Trial:
    """One drill on its way: a copy of what the stage begins with, and what is known of it
    undisturbed.
    """

    reference: Undisturbed
    folder: Path
    random: random.Random
    hits: int = 0  # times that the fault met the stage at work
    told: list[str] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.reference.stage

    def check_orderly(self, ended: Ended) -> None:
        if not ended.is_orderly:
            raise NotSurvived(
                f"ended with code {ended.code} and no error in one line: {_last(ended.said)}"
            )

    def complete(self, more: tuple[str, ...] = (), command: list[str] | None = None) -> None:
        """Run the same command again; it must end well and with what the undisturbed run has."""
        ended = run(command or self.stage.arguments(*more), self.folder)
        if ended.code:
            raise NotSurvived(f"run again it fails: {ended.error or _last(ended.said)}")
        self.compare()

    def compare(self) -> None:
        """What was there undisturbed is there, and nothing with other content.

        More often is no harm: a training that was made again tells other seconds, so what comes
        after it gets a folder of its own.
        """
        found, expected = content_of(self.folder), self.reference.content
        if different := sorted(
            {entry[:2] for entry in [*(expected - found), *(found.keys() - expected.keys())]}
        ):
            raise Differs(
                "differs from the undisturbed run in "
                f"{', '.join(' '.join(entry) for entry in different[:4])}"
            )


@dataclass(frozen=True)
class Fault:
    """What is done to a stage. `quick`: it is among those of a short drill."""

    name: str
    kind: str
    work: Callable[[Trial], None]
    quick: bool = True


# Kills
# ----------------------------------------------------------------------------------------------


def kills(trial: Trial) -> None:
    """SIGKILL several times, every other time of the command's process group alone, and then the
    command undisturbed.
    """
    for number in range(HITS):
        running = _run_until_a_moment(trial)
        if running is not None:
            trial.hits += 1
            running.kill(only_group=number % 2 == 1)
    trial.complete()


def stop(trial: Trial, number: signal.Signals) -> None:
    """A signal to the process itself, as a queue or Ctrl-C sends it."""
    running = _run_until_a_moment(trial)
    if running is None:
        return trial.complete()
    trial.hits += 1
    os.kill(running.process.pid, number)
    ended = running.finish(limit=90)
    if ended.code == -signal.SIGKILL:
        raise NotSurvived(f"goes on for 90 s after {number.name}")
    if ended.code != -number and "Traceback" in ended.said:
        raise NotSurvived(f"a traceback after {number.name}: {_last(ended.said)}")
    trial.told.append(ended.error or f"code {ended.code}")
    trial.complete()


def _run_until_a_moment(trial: Trial) -> Running | None:
    """The command at a random moment of its stage's work; None if it has ended before."""
    known = _begun(trial)
    running = Running(trial.stage.arguments(), trial.folder)
    moment = trial.random.uniform(0, _work_seconds(trial) + MARGIN)
    if not running.wait_for(lambda: bool(_begun(trial) - known)):
        running.finish()
        return None
    end = time.monotonic() + moment
    return running if running.wait_for(lambda: time.monotonic() >= end) else None


def _begun(trial: Trial) -> set[tuple[Path, int]]:
    """What the stage writes when it begins, and when that was."""
    found = set()
    for path in trial.folder.glob(trial.stage.begins):
        with suppress(FileNotFoundError):
            found.add((path, (path / STARTED if path.is_dir() else path).stat().st_mtime_ns))
    return found


def _work_seconds(trial: Trial) -> float:
    """Of the stage alone, where its manifest tells; else until the end of the command."""
    own = [
        manifest["seconds"]
        for _, manifest in finished_stages(trial.reference.whole)
        if manifest["stage"] == trial.stage.name
    ]
    return (
        min(sum(own), trial.reference.work)
        if own and trial.stage.name != "sweep"
        else trial.reference.work
    )


# A full disk
# ----------------------------------------------------------------------------------------------


def full_disk(trial: Trial, room: float) -> None:
    """Room for a part of what the stage writes; then for all of it."""
    used, needed = _disk_bytes(trial.folder), _disk_bytes(trial.reference.whole)
    with _small_disk(trial.folder, used + int(room * (needed - used))) as (limit, more_room):
        ended = run(trial.stage.arguments(), trial.folder, before=limit)
        trial.check_orderly(ended)
        if ended.code == 0:
            raise NotSurvived("the disk was not full: the drill is wrong")
        if NO_ROOM not in ended.said:
            raise NotSurvived(f"does not say that the disk is full: {ended.error}")
        trial.hits += 1
        trial.told.append(ended.error)
        more_room()
        trial.complete()


def can_mount() -> bool:
    return os.environ.get("DRILL_NAMESPACE") == "1"


@contextmanager
def _small_disk(
    folder: Path, size: int
) -> Iterator[tuple[Callable[[], None] | None, Callable[[], None]]]:
    """The folder on a file system of its own of so many bytes, and back; where none can be mounted,
    no file can grow beyond LARGEST.

    Gives what a process is to call before it starts, and what makes room.
    """
    if not can_mount():
        yield partial(resource.setrlimit, resource.RLIMIT_FSIZE, (LARGEST, LARGEST)), lambda: None
        return
    saved = copy(folder, folder.with_name("as it was"))
    _mount(folder, f"size={size}")
    try:
        shutil.copytree(saved, folder, symlinks=True, dirs_exist_ok=True)
        yield None, partial(_mount, folder, "remount,size=1g")
    finally:
        left = copy(folder, folder.with_name("off the small disk"))
        subprocess.run(["umount", str(folder)], check=True)
        copy(left, folder)


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _disk_bytes(folder: Path) -> int:
    """What the files take in pages of 4 KiB."""
    return sum(
        -(-path.stat().st_size // 4096) * 4096
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


# Damaged files
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A file that is damaged before the stage reads it. `unfinished`: one of the stage's own, after
    a kill in its midst.
    """

    name: str
    stage: str  # that reads it
    pattern: str  # glob below outputs/stages, or below documents for the corpus
    unfinished: bool = False
    ways: tuple[str, ...] = ("flip", "cut")
    quick: bool = False

    @property
    def place(self) -> str:
        return "documents" if self.stage == "corpus" else "outputs/stages"


DAMAGES = (
    Damage(
        "documents (JSON lines)", "corpus", "a.jsonl", ways=("cut",)
    ),  # another letter in a text is another text
    Damage("documents (gzip)", "corpus", "b.jsonl.gz"),
    Damage("documents (Zstandard)", "corpus", "c.jsonl.zst"),
    Damage("documents (Parquet of others)", "corpus", "d.parquet", ways=("cut",)),
    Damage("manifest", "synthesis", "corpus-*/manifest.json", quick=True),
    Damage("statistics", "synthesis", "corpus-*/stats.json"),
    Damage("documents (Parquet)", "synthesis", "corpus-*/documents/part-*.parquet", quick=True),
    Damage("pairs (Parquet)", "filters", "synthesis-*/pairs/part-*.parquet"),
    Damage("filtered pairs (Parquet)", "rendering", "filters-*/pairs/part-*.parquet"),
    Damage("texts (Parquet)", "tokens", "rendering-*/texts/part-*.parquet"),
    Damage("tokens.bin", "training", "tokens-*/shard-*/tokens.bin", quick=True),
    Damage("offsets.npy", "training", "tokens-*/shard-*/offsets.npy"),
    Damage("index.json", "training", "tokens-*/shard-*/index.json"),
    Damage("manifest of tokens", "training", "tokens-*/manifest.json"),
    Damage("held-out documents (Parquet)", "evaluation", "corpus-*/held_out/part-*.parquet"),
    Damage(
        "weights (safetensors)", "evaluation", "training-*/export/model.safetensors", quick=True
    ),
    Damage("metrics", "report", "training-*/metrics.jsonl"),
    Damage("scores", "report", "evaluation-*/results.json"),
    Damage("predictions (Parquet)", "report", "evaluation-*/predictions/*.parquet"),
    Damage(
        "journal",
        "synthesis",
        "synthesis-*/pairs/.part-*.journal.jsonl",
        unfinished=True,
        quick=True,
    ),
    Damage(
        "finished shard of pairs", "synthesis", "synthesis-*/pairs/part-*.parquet", unfinished=True
    ),
    Damage(
        "finished shard of tokens", "tokens", "tokens-*/shard-00000/tokens.bin", unfinished=True
    ),
    Damage(
        "checkpoint: tensors",
        "training",
        "training-*/checkpoints/step-*/*.safetensors",
        unfinished=True,
        quick=True,
    ),
    Damage(
        "checkpoint: facts",
        "training",
        "training-*/checkpoints/step-*/checkpoint.json",
        unfinished=True,
    ),
    Damage(
        "checkpoint: random states",
        "training",
        "training-*/checkpoints/step-*/rng-*.json",
        unfinished=True,
    ),
    Damage(
        "checkpoint: metrics",
        "training",
        "training-*/checkpoints/step-*/metrics.jsonl",
        unfinished=True,
    ),
    Damage(
        "finished predictions", "evaluation", "evaluation-*/predictions/*.parquet", unfinished=True
    ),
)


def damaged(trial: Trial, damage: Damage, how: str) -> None:
    """A byte that flips, or a file that is cut: the stage must refuse it by name, or make it again."""
    path = _file_to_damage(trial, damage)
    _spoil(path, how, trial.random)
    trial.hits += 1
    name = str(path.relative_to(trial.folder))
    if not damage.unfinished and damage.stage != "corpus":
        _check_verify(trial, path)
    ended = run(trial.stage.arguments(), trial.folder)
    trial.check_orderly(ended)
    if ended.code == 0:
        trial.told.append("made again")
        return trial.compare()
    if path.name not in ended.said and path.parent.name not in ended.said:
        raise NotSurvived(f"refuses without the name of {name}: {ended.error}")
    trial.told.append("refused")
    if damage.stage == "corpus":
        shutil.copy(trial.reference.before / name, path)
    else:
        shutil.rmtree(
            path.parent
            if damage.unfinished
            else trial.folder / Path(*path.relative_to(trial.folder).parts[:3])
        )
    trial.complete(command=whole_recipe(trial.stage.name))


def _file_to_damage(trial: Trial, damage: Damage) -> Path:
    pattern = f"{damage.place}/{damage.pattern}"
    if damage.unfinished:
        running = Running(trial.stage.arguments(), trial.folder)
        if not running.wait_for(
            lambda: any(path.stat().st_size for path in trial.folder.glob(pattern))
        ):
            raise NotSurvived(f"{damage.pattern} was never there: the drill is wrong")
        running.kill()
    paths = sorted(path for path in trial.folder.glob(pattern) if path.stat().st_size)
    if not paths:
        raise NotSurvived(f"{damage.pattern} is gone: the drill is wrong")
    return paths[-1]


def _spoil(path: Path, how: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if how == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(7)
    path.write_bytes(content)


def _check_verify(trial: Trial, path: Path) -> None:
    """`python -m ipt verify` must name the file."""
    ended = run([*whole_recipe("corpus")[:3], "verify", "outputs/stages"], trial.folder)
    if ended.code == 0 or path.name not in ended.said:
        raise NotSurvived(f"verify does not find {path.name}")


# Clocks
# ----------------------------------------------------------------------------------------------


def clock_jump(trial: Trial, hours: int) -> None:
    """The machine's clock is set anew in the middle of the stage's work."""
    after = trial.reference.until + _work_seconds(trial) / 2
    shim = str(Path(__file__).parent / "clock")
    environment = {
        "PYTHONPATH": shim,
        "DRILL_CLOCK_JUMP": str(hours),
        "DRILL_CLOCK_AFTER": str(after),
    }
    ended = run(trial.stage.arguments(), trial.folder, environment)
    trial.hits += 1
    if ended.code:
        raise NotSurvived(f"fails: {ended.error or _last(ended.said)}")
    if ended.seconds > 3 * (trial.reference.until + trial.reference.work) + SLACK:
        raise NotSurvived(f"takes {ended.seconds:.0f} s")
    for place, manifest in finished_stages(trial.folder):
        if not 0 <= manifest["seconds"] < LIMIT:
            raise NotSurvived(f"{place.name} says that it took {manifest['seconds']} s")
    trial.compare()


# Servers
# ----------------------------------------------------------------------------------------------


def server(trial: Trial, mode: str) -> None:
    """A server that stops doing its part after some requests, or does not from the beginning; then
    one that does.
    """
    waits = ("synthesis.timeout=2", "synthesis.max_retries=1")
    bad = Server(mode, good=-1) if mode == SILENT else Server(mode)
    with serve(bad):
        patient = ("synthesis.max_retries=8",) if "recovers" in mode else ()
        ended = run(
            trial.stage.arguments(*waits, *patient, f"synthesis.base_url={bad.address}/v1"),
            trial.folder,
        )
    trial.check_orderly(ended)
    trial.hits += 1
    trial.told.append(ended.error or "goes on")
    if ("recovers" in mode) != (ended.code == 0):
        raise NotSurvived(f"ended with code {ended.code}: {_last(ended.said)}")
    with serve(Server()) as good:
        trial.complete((f"synthesis.base_url={good.address}/v1",))


def dashboard(trial: Trial) -> None:
    """Training that logs to a W&B whose server takes connections and never answers."""
    with serve(Server(good=-1)) as silent:
        environment = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": silent.address,
            "WANDB_API_KEY": "0" * 40,
        }
        ended = run(
            trial.stage.arguments("logger=wandb", "logger.wandb.settings.init_timeout=2"),
            trial.folder,
            environment,
        )
    trial.hits += 1
    if ended.code:
        raise NotSurvived(f"fails: {ended.error or _last(ended.said)}")
    if ended.seconds > trial.reference.until + trial.reference.work + SLACK:
        raise NotSurvived(f"takes {ended.seconds:.0f} s")
    trial.compare()


SILENT = "never answers at all"


# The table
# ----------------------------------------------------------------------------------------------


def faults_of(stage: str) -> Iterator[Fault]:
    """What is done to a stage."""
    if stage == "synthesis by a server":
        for mode in (SILENT, *MODES):
            yield Fault(
                f"server {mode}", "server", partial(server, mode=mode), quick=mode == MODES[0]
            )
        return
    yield Fault(f"SIGKILL, {HITS} times", "kill", kills)
    for number in (signal.SIGTERM, signal.SIGINT):
        yield Fault(
            number.name,
            "kill",
            partial(stop, number=number),
            quick=stage == "training" and number == signal.SIGTERM,
        )
    for room in ROOM:
        yield Fault(
            f"full disk, {room:.0%} of the room",
            "disk",
            partial(full_disk, room=room),
            quick=room == ROOM[0],
        )
    for hours in HOURS:
        yield Fault(
            f"clock {hours:+} h",
            "clock",
            partial(clock_jump, hours=hours),
            quick=stage == "training" and hours > 0,
        )
    for damage in DAMAGES:
        if damage.stage == stage:
            for how in damage.ways:
                yield Fault(
                    f"{damage.name}: {how}",
                    "damage",
                    partial(damaged, damage=damage, how=how),
                    quick=damage.quick and how == "flip",
                )
    if stage == "training":
        yield Fault("W&B never answers", "server", dashboard, quick=False)


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing said)"
