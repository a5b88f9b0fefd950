"""Checkpoints on disk: folders of safetensors files that appear complete or not at all.

    checkpoints/step-00000400/
        shard-*.safetensors   weights and optimizer state, one slice per process
                              (torch.distributed.checkpoint)
        rng-00000.json        random states of a process, one file for each
        metrics.jsonl         the metrics of the steps so far
        checkpoint.json       everything else, with size and SHA-256 of each file; written last

A folder gets its final name when all of it is on the disk, and loses the name before anything in it
is removed. Nothing in it is a pickle, so reading a checkpoint of unknown origin runs no code of its
author.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint import save as save_sharded

from ipt.config import CheckpointConfig
from ipt.errors import MissingFileError, UserError
from ipt.files import has_seal, hash_file, read_json, sealed
from ipt.training.optim.dtensor import local

FORMAT = 1
FACTS, METRICS = "checkpoint.json", "metrics.jsonl"
NAME = re.compile(r"step-(\d{8,})")
# Scales of 8-bit optimizer state; a slice may have one for each of its own blocks.
BLOCK_SCALES = (".absmax1", ".absmax2")
FILE_BYTES = 1 << 30  # approximate size of a file, which is assembled in memory


@dataclass(frozen=True)
class Snapshot:
    """What is saved of a run at the end of a step, in host memory."""

    # The same names in all processes, except for those that begin with `own_name`.
    tensors: dict[str, Tensor]
    random: dict[str, Any]  # random states of this process
    facts: dict[str, Any]  # JSON values, the same in all processes
    metrics: bytes  # metrics.jsonl so far, in the first process


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def own_name(name: str) -> str:
    """Name of a tensor that each process has for itself, such as the scales of an 8-bit optimizer's
    slice.
    """
    rank, world = _place(None)
    return f"process-{rank}-of-{world}.{name}"


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and size of a group; without one of all processes."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


# Writing
# ----------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write `folder`, which is complete on return. All processes call it; `group` is a gloo group
    if there are several.

    Raises OSError in all processes if one of them cannot write.
    """
    rank = dist.get_rank(group) if group else 0
    temporary = folder.with_name(f".{folder.name}.partial")
    with _together(group):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with _together(group):
        _write_file(temporary / f"rng-{rank:05d}.json", json.dumps(snapshot.random).encode())
    try:
        writer = HuggingFaceStorageWriter(
            str(temporary), _files_of(snapshot.tensors), save_distributed=True
        )
        save_sharded(
            snapshot.tensors, storage_writer=writer, process_group=group, no_dist=group is None
        )
    except CheckpointException as error:  # in all processes if one of them fails
        raise _first_failure(error) from error
    hashes = _gathered(lambda name: hash_file(temporary / name), temporary, group)
    with _together(group):
        if rank == 0:
            facts = {**snapshot.facts, "sha256": hashes}
            _finish(temporary, folder, replace(snapshot, facts=facts))


def prune(folder: Path, config: CheckpointConfig, keep: Path | None = None) -> None:
    """Remove checkpoints that the config does not keep, except `keep`."""
    for checkpoint in superseded([path.name for path in whole_checkpoints(folder)], config):
        if folder / checkpoint != keep:
            remove(folder / checkpoint)


def superseded(names: list[str], config: CheckpointConfig) -> list[str]:
    """The checkpoints that neither `keep_last` nor `keep_every_n_steps` keeps; `names`: oldest
    first.
    """
    every = config.keep_every_n_steps
    older = names[: max(0, len(names) - config.keep_last)]
    return [name for name in older if not (every and checkpoint_step(name) % every == 0)]


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted run was writing or removing."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")]:
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint; an incomplete one never has its name."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def _finish(temporary: Path, folder: Path, snapshot: Snapshot) -> None:
    """Run by the first process when all slices are written: write the other files and rename."""
    _write_file(temporary / METRICS, snapshot.metrics)
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    hashes = {**snapshot.facts["sha256"], METRICS: hash_file(temporary / METRICS)}
    facts = sealed({**snapshot.facts, "files": files, "sha256": hashes}, {})
    _write_file(temporary / FACTS, (json.dumps(facts, indent=2, default=str) + "\n").encode())
    _sync_folder(temporary)
    # An incomplete checkpoint of this step, or one of a run that resumed from an earlier step.
    remove(folder)
    temporary.rename(folder)
    _sync_folder(folder.parent)


def _gathered(
    work: Callable[[str], str], folder: Path, group: dist.ProcessGroup | None
) -> dict[str, str]:
    """File name -> result of `work`, for the files in a folder. Each process does some of them, and
    all get all results.
    """
    rank, world = _place(group) if group else (0, 1)
    own: dict[str, str] = {}
    with _together(group):
        for name in sorted(path.name for path in folder.iterdir())[rank::world]:
            own[name] = work(name)
    if group is None:
        return own
    parts: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(parts, own, group=group)
    return {name: value for part in parts for name, value in part.items()}


@contextmanager
def _together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Processes leave the block together, or all raise the OSError of one of them."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = error
    failures = [failure]
    if group:
        failures = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group=group)
    for failure in failures:
        if failure is not None:
            raise failure


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of the file in a process. The first process decides for all, so the
    names include those of the other processes' own tensors.
    """
    files: dict[str, int] = {}
    file, size = 1, 0
    _, world = _place(None)
    own = own_name("")
    for name, tensor in tensors.items():
        nbytes = local(tensor).nbytes
        if size and size + nbytes > FILE_BYTES:
            file, size = file + 1, 0
        size += nbytes
        if not name.startswith(own):
            files[name] = file
            continue
        for process in range(world):
            files[f"process-{process}-of-{world}.{name.removeprefix(own)}"] = file
    return files


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the first process that failed."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, OSError) else error


# Reading
# ----------------------------------------------------------------------------------------------


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    complete = [path for path in folder.glob("step-*") if is_whole(path)]
    return sorted(complete, key=lambda path: checkpoint_step(path.name))


def newest_checkpoint(folder: Path) -> Path:
    """`folder` if it is a checkpoint, else the newest one in it or in its `checkpoints`. Raises
    MissingFileError.
    """
    if (folder / FACTS).exists():
        return folder
    for place in (folder / "checkpoints", folder):
        if found := whole_checkpoints(place):
            return found[-1]
    raise MissingFileError(
        f"{folder} is no checkpoint (it has no {FACTS}) and contains no complete one"
    )


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint whose files all have their full size."""
    try:
        files = read_facts(checkpoint)["files"]
        return NAME.fullmatch(checkpoint.name) is not None and all(
            (checkpoint / name).stat().st_size == files[name] for name in files
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json`. Raises MissingFileError if there is none, and UserError if it is damaged
    or of another format.
    """
    path = checkpoint / FACTS
    if not path.exists():
        raise MissingFileError(f"{checkpoint} is no checkpoint: it has no {FACTS}")
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path}: expected checkpoint format {FORMAT}, found {facts.get('format')}: use the "
            "version of ipt that wrote it"
        )
    if not has_seal(facts, {}):
        raise UserError(f"{path} was changed after it was written: remove the checkpoint")
    return facts


def check_files(checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    """Compare all files with their hashes; each process reads some of them. Raises UserError in all
    processes if a file has changed.
    """
    expected = read_facts(checkpoint).get("sha256", {})  # early checkpoints do not have it
    found = _gathered(
        lambda name: hash_file(checkpoint / name) if name in expected else "", checkpoint, group
    )
    broken = sorted(name for name in found if name in expected and found[name] != expected[name])
    if broken:
        raise UserError(
            f"{checkpoint / broken[0]} was changed after it was written ({len(broken)} of "
            f"{len(expected)} files): remove this checkpoint and run the same command again, which "
            "resumes from the one before it"
        )


def read_random(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Random states of a process that wrote the checkpoint."""
    return json.loads((checkpoint / f"rng-{rank:05d}.json").read_text(encoding="utf-8"))


def read_tensors(
    checkpoint: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill `tensors` in place by name, DTensors with their slices. The checkpoint may have
    been written with other slices.

    Raises UserError if a tensor is missing or has another shape.
    """
    facts = read_facts(checkpoint)
    saved = facts["tensors"]
    for name, tensor in tensors.items():
        if name not in saved:
            raise UserError(f"{checkpoint} does not contain {name}: {_mismatch(name, facts)}")
        if saved[name] != list(tensor.shape):
            raise UserError(
                f"{checkpoint}: {name} has shape {saved[name]}, expected {list(tensor.shape)}: "
                f"{_mismatch(name, facts)}"
            )
    reader = HuggingFaceStorageReader(str(checkpoint))
    load_sharded(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def read_whole_tensors(checkpoint: Path, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, without the prefix, whole in one process.
    Floating-point tensors are converted to `dtype`.
    """
    check_files(checkpoint, None)
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, shape in read_facts(checkpoint)["tensors"].items():
        if name.startswith(prefix):
            kind = saved[name].properties.dtype
            tensors[name] = torch.empty(shape, dtype=dtype if kind.is_floating_point else kind)
    load_sharded(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _mismatch(name: str, facts: Mapping[str, Any]) -> str:
    if name.startswith("process-") or name.endswith(BLOCK_SCALES):
        return (
            "this optimizer keeps its state in blocks of each process, so resume with "
            f"{facts['processes']} processes, as before"
        )
    return "the checkpoint belongs to another model"
