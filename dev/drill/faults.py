"""The faults. Each is a function that disturbs a running stage and raises NotSurvived if the stage
does not recover.
"""

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

from dev.drill.content import content_of, finished_stages
from dev.drill.servers import MODES, Server, serve
from dev.drill.stages import LIMIT, Ended, Running, Stage, Undisturbed, copy, run, whole_recipe
from ipt.stage import STARTED

HITS = 3  # kills per drill
MARGIN = 0.3  # seconds added to the duration of a stage, which may be a few milliseconds
SPACE = (0.2, 0.7)  # fractions of the bytes that a stage writes
LARGEST = 8192  # maximum file size in bytes if tmpfs cannot be mounted
HOURS = (5, -5)
# seconds that a command may take beyond its reference run; more means that it waited in vain
SLACK = 60
DISK_FULL = "no room to write"  # in the message of ipt


class NotSurvived(Exception):
    """The fault was not survived; the message says why."""


class Differs(NotSurvived):
    """The command completed, but its files differ from those of the reference run."""


@dataclass
class Trial:
    """One drill: a copy of the stage's initial folder, and the reference run of the stage."""

    reference: Undisturbed
    folder: Path
    random: random.Random
    hits: int = 0  # how often the fault occurred while the stage was running
    notes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.reference.stage

    def check_orderly(self, ended: Ended) -> None:
        if not ended.is_orderly:
            raise NotSurvived(
                f"ended with code {ended.code} without an error line: {_last(ended.output)}"
            )

    def complete(self, more: tuple[str, ...] = (), command: list[str] | None = None) -> None:
        """Run the same command again. It must succeed and give the files of the reference run."""
        ended = run(command or self.stage.arguments(*more), self.folder)
        if ended.code:
            raise NotSurvived(f"running it again fails: {ended.error or _last(ended.output)}")
        self.compare()

    def compare(self) -> None:
        """Raise Differs unless the folder has all files of the reference run and no file with other
        content.

        Extra copies of a file are fine: the manifest of a repeated training has other durations,
        so later stages write to another folder.
        """
        found, expected = content_of(self.folder), self.reference.content
        if different := sorted(
            {entry[:2] for entry in [*(expected - found), *(found.keys() - expected.keys())]}
        ):
            raise Differs(
                "differs from the reference run in "
                f"{', '.join(' '.join(entry) for entry in different[:4])}"
            )


@dataclass(frozen=True)
class Fault:
    """A fault of a stage. `quick`: part of the selection of `--quick`."""

    name: str
    kind: str
    work: Callable[[Trial], None]
    quick: bool = True


# Kills
# ----------------------------------------------------------------------------------------------


def kills(trial: Trial) -> None:
    """Send SIGKILL several times, every second time to the process group of the command alone, then
    run the command without a fault.
    """
    for number in range(HITS):
        running = _run_until_a_moment(trial)
        if running is not None:
            trial.hits += 1
            running.kill(only_group=number % 2 == 1)
    trial.complete()


def stop(trial: Trial, number: signal.Signals) -> None:
    """Send a signal to the process, as a batch queue or Ctrl-C does."""
    running = _run_until_a_moment(trial)
    if running is None:
        return trial.complete()
    trial.hits += 1
    os.kill(running.process.pid, number)
    ended = running.finish(limit=90)
    if ended.code == -signal.SIGKILL:
        raise NotSurvived(f"runs for 90 s after {number.name}")
    if ended.code != -number and "Traceback" in ended.output:
        raise NotSurvived(f"traceback after {number.name}: {_last(ended.output)}")
    trial.notes.append(ended.error or f"code {ended.code}")
    trial.complete()


def _run_until_a_moment(trial: Trial) -> Running | None:
    """Start the command and return at a random moment of its stage; None if it has ended."""
    known = _begun(trial)
    running = Running(trial.stage.arguments(), trial.folder)
    moment = trial.random.uniform(0, _work_seconds(trial) + MARGIN)
    if not running.wait_for(lambda: bool(_begun(trial) - known)):
        running.finish()
        return None
    end = time.monotonic() + moment
    return running if running.wait_for(lambda: time.monotonic() >= end) else None


def _begun(trial: Trial) -> set[tuple[Path, int]]:
    """The folders or files that the stage creates at its start, with their times."""
    found = set()
    for path in trial.folder.glob(trial.stage.begins):
        with suppress(FileNotFoundError):
            found.add((path, (path / STARTED if path.is_dir() else path).stat().st_mtime_ns))
    return found


def _work_seconds(trial: Trial) -> float:
    """Duration of the stage alone if its manifest has it, otherwise until the command ends."""
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


def full_disk(trial: Trial, space: float) -> None:
    """Give the stage a fraction of the disk space that it needs, then all of it."""
    used, needed = _disk_bytes(trial.folder), _disk_bytes(trial.reference.whole)
    with _small_disk(trial.folder, used + int(space * (needed - used))) as (limit, enlarge):
        ended = run(trial.stage.arguments(), trial.folder, before=limit)
        trial.check_orderly(ended)
        if ended.code == 0:
            raise NotSurvived("the disk did not fill up: the drill is wrong")
        if DISK_FULL not in ended.output:
            raise NotSurvived(f"the error does not mention the full disk: {ended.error}")
        trial.hits += 1
        trial.notes.append(ended.error)
        enlarge()
        trial.complete()


def can_mount() -> bool:
    return os.environ.get("DRILL_NAMESPACE") == "1"


@contextmanager
def _small_disk(
    folder: Path, size: int
) -> Iterator[tuple[Callable[[], None] | None, Callable[[], None]]]:
    """Put the folder on a tmpfs of `size` bytes, and back at the end. If tmpfs cannot be mounted,
    limit the file size to LARGEST instead.

    Yields a function that the subprocess must call before it starts, if any, and a function that
    enlarges the file system.
    """
    if not can_mount():
        yield partial(resource.setrlimit, resource.RLIMIT_FSIZE, (LARGEST, LARGEST)), lambda: None
        return
    saved = copy(folder, folder.with_name("before the small disk"))
    _mount(folder, f"size={size}")
    try:
        shutil.copytree(saved, folder, symlinks=True, dirs_exist_ok=True)
        yield None, partial(_mount, folder, "remount,size=1g")
    finally:
        left = copy(folder, folder.with_name("after the small disk"))
        subprocess.run(["umount", str(folder)], check=True)
        copy(left, folder)


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _disk_bytes(folder: Path) -> int:
    """Disk usage of the files, in blocks of 4 KiB."""
    return sum(
        -(-path.stat().st_size // 4096) * 4096
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


# Damaged files
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A file that is damaged before the stage reads it. `unfinished`: the file is one that the
    stage itself wrote before it was killed.
    """

    name: str
    stage: str  # the stage that reads the file
    pattern: str  # glob in outputs/stages, or in documents for the corpus
    unfinished: bool = False
    ways: tuple[str, ...] = ("flip", "truncate")
    quick: bool = False

    @property
    def place(self) -> str:
        return "documents" if self.stage == "corpus" else "outputs/stages"


DAMAGES = (
    # a flipped bit in a text is just another text, which nothing can detect
    Damage("documents (JSON lines)", "corpus", "a.jsonl", ways=("truncate",)),
    Damage("documents (gzip)", "corpus", "b.jsonl.gz"),
    Damage("documents (Zstandard)", "corpus", "c.jsonl.zst"),
    Damage("documents (external Parquet)", "corpus", "d.parquet", ways=("truncate",)),
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
    """Flip a bit of a file or truncate it. The stage must rewrite it or report its name."""
    path = _file_to_damage(trial, damage)
    _spoil(path, how, trial.random)
    trial.hits += 1
    name = str(path.relative_to(trial.folder))
    if not damage.unfinished and damage.stage != "corpus":
        _check_verify(trial, path)
    ended = run(trial.stage.arguments(), trial.folder)
    trial.check_orderly(ended)
    if ended.code == 0:
        trial.notes.append("rewritten")
        return trial.compare()
    if path.name not in ended.output and path.parent.name not in ended.output:
        raise NotSurvived(f"the error does not name {name}: {ended.error}")
    trial.notes.append("named in an error")
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
            raise NotSurvived(f"{damage.pattern} never appeared: the drill is wrong")
        running.kill()
    paths = sorted(path for path in trial.folder.glob(pattern) if path.stat().st_size)
    if not paths:
        raise NotSurvived(f"no file matches {damage.pattern}: the drill is wrong")
    return paths[-1]


def _spoil(path: Path, how: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if how == "truncate":
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(7)
    path.write_bytes(content)


def _check_verify(trial: Trial, path: Path) -> None:
    """Check that `python -m ipt verify` names the file."""
    ended = run([*whole_recipe("corpus")[:3], "verify", "outputs/stages"], trial.folder)
    if ended.code == 0 or path.name not in ended.output:
        raise NotSurvived(f"verify does not find {path.name}")


# Clocks
# ----------------------------------------------------------------------------------------------


def clock_jump(trial: Trial, hours: int) -> None:
    """Set the clock forward or back in the middle of the stage."""
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
        raise NotSurvived(f"fails: {ended.error or _last(ended.output)}")
    if ended.seconds > 3 * (trial.reference.until + trial.reference.work) + SLACK:
        raise NotSurvived(f"takes {ended.seconds:.0f} s")
    for place, manifest in finished_stages(trial.folder):
        if not 0 <= manifest["seconds"] < LIMIT:
            raise NotSurvived(
                f"the manifest of {place.name} has a duration of {manifest['seconds']} s"
            )
    trial.compare()


# Servers
# ----------------------------------------------------------------------------------------------


def server(trial: Trial, mode: str) -> None:
    """Run with a server that fails at once or after some requests, then with a working one."""
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
    trial.notes.append(ended.error or "continues")
    if ("recovers" in mode) != (ended.code == 0):
        raise NotSurvived(f"ended with code {ended.code}: {_last(ended.output)}")
    with serve(Server()) as good:
        trial.complete((f"synthesis.base_url={good.address}/v1",))


def dashboard(trial: Trial) -> None:
    """Train with logger=wandb and a W&B server that accepts connections but never answers."""
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
        raise NotSurvived(f"fails: {ended.error or _last(ended.output)}")
    if ended.seconds > trial.reference.until + trial.reference.work + SLACK:
        raise NotSurvived(f"takes {ended.seconds:.0f} s")
    trial.compare()


SILENT = "never answers at all"


# List of faults
# ----------------------------------------------------------------------------------------------


def faults_of(stage: str) -> Iterator[Fault]:
    """The faults that are injected into a stage."""
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
    for space in SPACE:
        yield Fault(
            f"full disk, {space:.0%} of the space",
            "disk",
            partial(full_disk, space=space),
            quick=space == SPACE[0],
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


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no output)"
