"""Fuzzes one target in a process of its own, so that a crash, a hang or a memory leak does not
affect the other targets.
"""

import errno
import faulthandler
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import CodeType, FrameType
from typing import Any

from dev.fuzz.targets import TARGETS, Target
from ipt.errors import UserError

SECONDS = 10  # an input that takes longer is a finding
BYTES = 1 << 30  # an input that allocates more than this is a finding
WATCHED = 5  # one in so many inputs records line coverage, which is several times slower
OURS = str(Path(__file__).resolve().parents[2] / "ipt")


class Hang(BaseException):
    """An input took longer than SECONDS."""


@dataclass
class Progress:
    """Result of a worker, which it writes for the main process."""

    executions: int = 0
    slowest: float = 0.0  # seconds of the slowest input
    kept: int = 0  # inputs that reached new lines
    # error type and place -> path of the input, error message
    findings: dict[str, list[str]] = field(default_factory=dict)


def work(name: str, folder: Path, home: Path, seed: int, first: int, seconds: float) -> Progress:
    """Run inputs number `first`, `first + 1`, … of the target until the time is up.

    An input is determined by the seed, its number and the inputs kept so far. Findings and kept
    inputs are written to `folder`. For the case of a crash, `home` has the current input and the
    number of inputs before it.
    """
    target, lines, progress = TARGETS[name], Lines(), Progress()
    kept = folder / "kept" / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pool = [*target.seeds(), *(path.read_bytes() for path in sorted(kept.iterdir()))]
        with suppress(ValueError, FileNotFoundError):
            target.check(
                pool[0], Path(scratch)
            )  # warm-up of imports and caches, without a time limit
        for data in pool:
            _try(target, data, Path(scratch), lines, progress, folder)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + BYTES, resource.RLIM_INFINITY))
        end = monotonic() + seconds
        while monotonic() < end:
            number = first + progress.executions
            random_ = random.Random(f"{seed}/{name}/{number}")
            data = target.mutate(random_.choice(pool), random_, pool)
            (home / "current").write_bytes(data)
            (home / "number").write_text(str(progress.executions), encoding="utf-8")
            watched = lines if number % WATCHED == 0 else None
            if _try(target, data, Path(scratch), watched, progress, folder) and len(data) < 1 << 16:
                pool.append(data)
                (kept / f"{number:010d}").write_bytes(data)
                progress.kept += 1
            progress.executions += 1
    return progress


class Lines:
    """The lines of ipt that have run. `new`: whether the last input reached a line for the first
    time.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[CodeType, int]] = set()
        self.new = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.new = False
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = frame.f_code, frame.f_lineno
        if place not in self._seen:
            self._seen.add(place)
            self.new = True
        return self._line


def _try(
    target: Target,
    data: bytes,
    scratch: Path,
    lines: Lines | None,
    progress: Progress,
    folder: Path,
) -> bool:
    """Run an input and keep it if it is a finding. Returns whether it reached new lines, if `lines`
    is given.
    """
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    started = monotonic()
    try:
        with lines.watch() if lines else nullcontext():
            target.check(data, scratch)
    except (Exception, Hang) as error:
        signal.alarm(0)
        if not documented(error):
            _keep(target.name, data, error, progress, folder)
    finally:
        signal.alarm(0)
        progress.slowest = max(progress.slowest, monotonic() - started)
    return lines is not None and lines.new


def documented(error: BaseException) -> bool:
    """Whether an error is expected: a UserError, or an OSError because a file name is too long."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return isinstance(error, UserError) or too_long


def _keep(name: str, data: bytes, error: BaseException, progress: Progress, folder: Path) -> None:
    """Write the input and the traceback, keeping the shortest input per error type and place."""
    traces = traceback.extract_tb(error.__traceback__)
    ours = next(
        (trace for trace in reversed(traces) if trace.filename.startswith(OURS)), traces[-1]
    )
    place = f"{type(error).__name__} in {Path(ours.filename).name}:{ours.name}:{ours.lineno}"
    path = folder / "findings" / name / hashlib.sha256(place.encode()).hexdigest()[:12]
    if path.exists() and path.stat().st_size <= len(data):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(
        "".join(traceback.format_exception(error)), errors="backslashreplace", encoding="utf-8"
    )
    progress.findings[place] = [str(path), " ".join(str(error).split())[:200]]


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"took longer than {SECONDS} seconds")


def _data_bytes() -> int:
    """Bytes of this process that count towards RLIMIT_DATA."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[5])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    name, folder, home, seed, first, seconds = sys.argv[1:]
    faulthandler.enable()
    done = work(name, Path(folder), Path(home), int(seed), int(first), float(seconds))
    (Path(home) / "progress.json").write_text(json.dumps(vars(done)), encoding="utf-8")
