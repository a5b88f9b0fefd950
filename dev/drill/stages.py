"""The stages of a tiny recipe: the command of each, how to run it, and its reference run."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds after which a command counts as hanging
RECIPE = (
    "experiment=tiny",
    "corpus.path=documents",
    "corpus.held_out_fraction=0.2",
    "tasks=[held_out_perplexity]",
    "synthesis.shard_size=4",
    "filters.thresholds.duplicate_question=[null,0]",
    "tokens.shard_tokens=4000",
    "trainer.max_steps=24",
    "checkpoint.every_n_train_steps=2",
    "checkpoint.keep_last=2",
    "checkpoint.keep_after_training=true",
    "checkpoint.every_n_minutes=0.05",
)
PHASES = ("synthesis", "tokens", "training", "evaluation", "report")
SERVED = (
    "synthesis.engine=openai",
    "synthesis.model=served",
    "synthesis.tokenizer=embedded:tiny-synthesizer",
)


@dataclass(frozen=True)
class Stage:
    """A command, and the folder that it creates when the stage itself starts."""

    name: str
    command: tuple[str, ...]
    begins: str  # glob
    after: str | None = None  # the stage whose folder this one starts with; None: no earlier stage

    def arguments(self, *more: str) -> list[str]:
        return [sys.executable, *self.command, *more]


def _recipe(*phases: str) -> tuple[str, ...]:
    return ("-m", "ipt", "reproduce", *RECIPE, f"stages=[{','.join(phases)}]")


def whole_recipe(stage: str) -> list[str]:
    """The command that repeats all missing work up to and including this stage."""
    phases = next(
        (number for number, phase in enumerate(PHASES) if phase in _BY_NAME[stage].command[-1]),
        len(PHASES) - 1,
    )
    return [sys.executable, *_recipe(*PHASES[: phases + 1])]


def _stage_folder(name: str) -> str:
    return f"outputs/stages/{name}-*"


STAGES = (
    Stage("corpus", _recipe("synthesis"), _stage_folder("corpus")),
    Stage("synthesis", _recipe("synthesis"), _stage_folder("synthesis"), "corpus"),
    Stage("filters", _recipe("synthesis"), _stage_folder("filters"), "synthesis"),
    Stage("rendering", _recipe("tokens"), _stage_folder("rendering"), "filters"),
    Stage("tokens", _recipe("tokens"), _stage_folder("tokens"), "rendering"),
    Stage("training", _recipe("training"), _stage_folder("training"), "tokens"),
    Stage("evaluation", _recipe("evaluation"), _stage_folder("evaluation"), "training"),
    Stage("report", _recipe("report"), "outputs/tiny/config.yaml", "evaluation"),
    Stage(
        "sweep",
        (
            str(ROOT / "train.py"),
            "-m",
            *RECIPE,
            "evaluation.limit=2",
            "mixture.ratios.instruction=0,1",
        ),
        _stage_folder("training"),
        "tokens",
    ),
)
_BY_NAME = {stage.name: stage for stage in STAGES}
SERVER_STAGE = Stage(
    "synthesis by a server",
    (str(ROOT / "synthesize.py"), *RECIPE, *SERVED),
    _stage_folder("synthesis"),
    "corpus",
)


# Running
# ----------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """Result of a command."""

    code: int
    output: str
    seconds: float

    @property
    def error(self) -> str:
        """The last error line; "" if there is none."""
        return next(
            (line for line in reversed(self.output.splitlines()) if line.startswith("error: ")), ""
        )

    @property
    def is_orderly(self) -> bool:
        """Whether the command succeeded, or printed an error line and no traceback."""
        return self.code == 0 or (bool(self.error) and "Traceback" not in self.output)


class Running:
    """A running command. It and its subprocesses have their own process group."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        def prepare() -> None:
            # background jobs of a shell ignore SIGINT, and so would their subprocesses
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if before:
                before()

        self._log = folder.with_name(f"{folder.name}.log")
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(environment or {}),
                start_new_session=True,
                preexec_fn=prepare,
            )

    def wait_for(self, there: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Wait for `there()` to become true. False if the command ends first or time is up."""
        end = time.monotonic() + limit
        while self.process.poll() is None and time.monotonic() < end:
            if there():
                return True
            time.sleep(0.005)
        return False

    def finish(self, limit: float = LIMIT) -> Ended:
        """Wait for the command to end. After `limit` seconds kill it, which gives code -9."""
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
        seconds = time.monotonic() - self._started
        return Ended(
            self.process.returncode,
            self._log.read_text(errors="replace", encoding="utf-8"),
            seconds,
        )

    def kill(self, only_group: bool = False) -> None:
        """Kill all processes, as when the machine goes down. `only_group`: kill the process group
        alone; subprocesses in other groups must end by themselves.
        """
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        if not only_group:
            for member in family:
                if member.is_running():
                    member.kill()
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=90)
        assert not left, (
            f"processes outlive their parent: {[process.cmdline() for process in left]}"
        )


def run(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    return Running(command, folder, environment, before).finish()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """One thread, because the last bits of sums depend on their number; wide lines, so that no
    message wraps.
    """
    paths = [more.get("PYTHONPATH", ""), str(ROOT)]
    own = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {**os.environ, **own, **more, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


# The reference run
# ----------------------------------------------------------------------------------------------


@dataclass
class Undisturbed:
    """The reference run of a stage: its folder before and after a run without a fault."""

    stage: Stage
    before: Path
    whole: Path
    until: float = 0.0  # seconds until the stage itself starts
    work: float = 0.0  # seconds from there to the end of the command
    content: Counter[tuple[str, ...]] = field(default_factory=Counter)


def undisturbed(
    stage: Stage, place: Path, before: Path | None, more: tuple[str, ...] = ()
) -> Undisturbed:
    """Run the stage in a folder without results of this or later stages. Raises RuntimeError if it
    fails.
    """
    from dev.drill.content import content_of

    start, whole = place / f"{stage.name} before", place / f"{stage.name} whole"
    for folder in (start, whole):
        if before is None:
            write_documents(folder / "documents")
        else:
            _copy_up_to(before, folder, stage)
    clock = time.monotonic()
    running = Running(stage.arguments(*more), whole)
    running.wait_for(lambda: any(whole.glob(stage.begins)))
    until = time.monotonic() - clock
    ended = running.finish()
    if ended.code:
        raise RuntimeError(f"{stage.name} fails without any fault: {ended.output[-2000:]}")
    return Undisturbed(stage, start, whole, until, ended.seconds - until, content_of(whole))


def write_documents(folder: Path) -> None:
    """Write 40 documents in files of four formats that a corpus can be read from."""
    folder.mkdir(parents=True)
    words = [
        "heart",
        "liver",
        "lung",
        "brain",
        "kidney",
        "stomach",
        "spleen",
        "skin",
        "muscle",
        "bone",
        "nerve",
        "vein",
    ]
    draw = random.Random(0)
    rows = [
        {
            "text": " ".join(
                f"The {draw.choice(words)} lies near the {draw.choice(words)}." for _ in range(30)
            )
        }
        for _ in range(40)
    ]
    lines = [
        "".join(json.dumps(row) + "\n" for row in rows[start : start + 10]).encode()
        for start in range(0, 40, 10)
    ]
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1], mtime=0))
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor(write_checksum=True).compress(lines[2])
    )
    pq.write_table(pa.Table.from_pylist(rows[30:]), folder / "d.parquet")


def copy(folder: Path, target: Path) -> Path:
    """Copy a folder, replacing `target`."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True))


def _copy_up_to(whole: Path, target: Path, stage: Stage) -> None:
    """Copy the folder of an earlier stage without the results of this stage and later ones."""
    copy(whole, target)
    names = [known.name for known in STAGES]
    first = names.index(stage.name) if stage.name in names else names.index("synthesis")
    for name in [
        *names[first:],
        *(["contamination"] if first <= names.index("evaluation") else []),
    ]:
        for folder in [
            *target.glob(_stage_folder(name)),
            *target.glob(f"outputs/stages/.{name}-*"),
        ]:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    if stage.name != "report":
        shutil.rmtree(target / "outputs" / "tiny", ignore_errors=True)
