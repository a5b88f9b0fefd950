"""Checkpoints on disk: folders of safetensors files that appear whole or not at all.

    checkpoints/step-00000400/
        shard-*.safetensors   weights and optimizer state, one slice per process
                              (torch.distributed.checkpoint)
        rng-00000.json        random states of a process, one file for each
        metrics.jsonl         the metrics of the steps so far
        checkpoint.json       everything else, with size and SHA-256 of each file; written last

A folder gets its name only when all of it is on the disk, and loses it before anything of it is
removed. Nothing in it is a pickle, so reading a checkpoint of unknown origin runs no code of its
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
from torch.distributed.tensor import DTensor

from ipt.config import CheckpointConfig
from ipt.errors import MissingFileError, UserError
from ipt.files import has_seal, hash_file, read_json, sealed

FORMAT = 1
FACTS, METRICS = "checkpoint.json", "metrics.jsonl"
NAME = re.compile(r"step-(\d{8,})")
OF_BLOCKS = (
    ".absmax1",
    ".absmax2",
)  # scales of 8-bit states, of which there may be one for each block of a slice
FILE_BYTES = (
    1 << 30
)  # a process writes about so much into one file, which is put together in memory


@dataclass(frozen=True)
class Snapshot:
    """What is saved of a run at the end of a step, in host memory."""

    tensors: dict[
        str, Tensor
    ]  # in all processes under the same names, or under names that begin with `own_name`
    random: dict[str, Any]  # of this process
    facts: dict[str, Any]  # JSON-able, the same in all processes
    metrics: bytes  # metrics.jsonl so far; of the first process


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def own_name(name: str) -> str:
    """Name of a tensor that each process has its own one of, as the scales of an 8-bit optimizer's
    slice.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return f"process-{rank}-of-{world}.{name}"


# Writing
# ----------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write `folder`. All processes call it, with a gloo `group` where there are several; when it
    returns, the folder is whole.

    Raises OSError in all processes if one of them cannot write.
    """
    first, rank = group is None or dist.get_rank(group) == 0, dist.get_rank(group) if group else 0
    temporary = folder.with_name(f".{folder.name}.partial")
    with _together(group):
        if first:
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
    hashes = _gathered(
        lambda names: {name: hash_file(temporary / name) for name in names}, temporary, group
    )
    with _together(group):
        if first:
            _finish(
                temporary, folder, replace(snapshot, facts={**snapshot.facts, "sha256": hashes})
            )


def prune(folder: Path, config: CheckpointConfig, spared: Path | None = None) -> None:
    """Remove checkpoints beyond those that the config keeps; `spared` stays too."""
    for checkpoint in superseded([path.name for path in whole_checkpoints(folder)], config):
        if folder / checkpoint != spared:
            remove(folder / checkpoint)


def superseded(names: list[str], config: CheckpointConfig) -> list[str]:
    """Of checkpoints, oldest first, those that neither `keep_last` nor `keep_every_n_steps` keeps."""
    older = names[: max(0, len(names) - config.keep_last)]
    return [
        name
        for name in older
        if not (
            config.keep_every_n_steps and checkpoint_step(name) % config.keep_every_n_steps == 0
        )
    ]


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted run was writing or removing."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")]:
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that at no moment half of it has its name."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def _finish(temporary: Path, folder: Path, snapshot: Snapshot) -> None:
    """What the first process does once all slices are written: the rest of the files, and the name."""
    _write_file(temporary / METRICS, snapshot.metrics)
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    hashes = {**snapshot.facts["sha256"], METRICS: hash_file(temporary / METRICS)}
    facts = sealed({**snapshot.facts, "files": files, "sha256": hashes}, {})
    _write_file(temporary / FACTS, (json.dumps(facts, indent=2, default=str) + "\n").encode())
    _sync_folder(temporary)
    remove(
        folder
    )  # one of the same step that is not whole, or that a run which went on from an earlier one overtakes
    temporary.rename(folder)
    _sync_folder(folder.parent)


def _gathered(
    work: Callable[[list[str]], dict[str, str]], folder: Path, group: dist.ProcessGroup | None
) -> dict[str, str]:
    """What `work` makes of the names of the files in a folder; each process does a share of them,
    and all get the whole.
    """
    world, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    own: dict[str, str] = {}
    with _together(group):
        own = work(sorted(path.name for path in folder.iterdir())[rank::world])
    if group is None:
        return own
    parts: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(parts, own, group=group)
    return {name: value for part in parts for name, value in part.items()}


@contextmanager
def _together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Processes go on together after the block, or all raise what went wrong in one of them."""
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
    """Which file of a process each tensor goes to. The first process decides for all, so it names
    the other processes' own ones too.
    """
    files, file, size = {}, 1, 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    own = own_name("")
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if size and size + local.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        size += local.nbytes
        for process in range(world) if name.startswith(own) else (None,):
            files[
                name
                if process is None
                else f"process-{process}-of-{world}.{name.removeprefix(own)}"
            ] = file
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
    """What went wrong in the first of the processes that failed."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, OSError) else error


# Reading
# ----------------------------------------------------------------------------------------------


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(
        (path for path in folder.glob("step-*") if is_whole(path)),
        key=lambda path: checkpoint_step(path.name),
    )


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint that a folder is, or the newest of those in it or in its `checkpoints`. Raises
    MissingFileError.
    """
    if (folder / FACTS).exists():
        return folder
    for place in (folder / "checkpoints", folder):
        if whole := whole_checkpoints(place):
            return whole[-1]
    raise MissingFileError(
        f"{folder} is no checkpoint (it has no {FACTS}) and holds none that is whole"
    )


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint with all its files in their full size."""
    try:
        files = read_facts(checkpoint)["files"]
        return NAME.fullmatch(checkpoint.name) is not None and all(
            (checkpoint / name).stat().st_size == files[name] for name in files
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json`. Raises MissingFileError if the folder has none, and UserError if it is
    none of ours.
    """
    path = checkpoint / FACTS
    if not path.exists():
        raise MissingFileError(f"{checkpoint} is no checkpoint: it has no {FACTS}")
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of format {FORMAT}, which this version of ipt reads"
        )
    if not has_seal(facts, {}):
        raise UserError(f"{path} is not what was written: remove the checkpoint")
    return facts


def check_files(checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    """Read all files, each process a share. Raises UserError in all of them, naming those that are
    not what was written.
    """
    written = read_facts(checkpoint).get(
        "sha256", {}
    )  # the first checkpoints of this format have none

    def changed(names: list[str]) -> dict[str, str]:
        return {
            name: ""
            for name in names
            if name in written and hash_file(checkpoint / name) != written[name]
        }

    if broken := sorted(_gathered(changed, checkpoint, group)):
        remedy = (
            "remove this checkpoint, then the same command goes on from the one before it, or else "
            "from the beginning"
        )
        raise UserError(
            f"{checkpoint / broken[0]} is not what was written ({len(broken)} of {len(written)} "
            f"files): {remedy}"
        )


def read_random(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Random states of one of the processes that wrote the checkpoint."""
    return json.loads((checkpoint / f"rng-{rank:05d}.json").read_text(encoding="utf-8"))


def read_tensors(
    checkpoint: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill `tensors` in place with those of their names; DTensors with their slices, whatever the
    slices were when they were written.

    Raises UserError if the checkpoint has no tensor of a name, or has it in another shape.
    """
    there = HuggingFaceStorageReader(str(checkpoint))
    facts = read_facts(checkpoint)
    saved = facts["tensors"]
    for name, tensor in tensors.items():
        if name not in saved:
            raise UserError(f"{checkpoint} does not hold {name}: {_why_not(name, facts)}")
        if saved[name] != list(tensor.shape):
            shapes = f"{saved[name]}, here {list(tensor.shape)}"
            raise UserError(
                f"{checkpoint} holds {name} in the shape {shapes}: {_why_not(name, facts)}"
            )
    load_sharded(tensors, storage_reader=there, process_group=group, no_dist=group is None)


def read_whole_tensors(checkpoint: Path, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, without it, put together in one process;
    floating-point ones as `dtype`.
    """
    check_files(checkpoint, None)
    shapes = {
        name: shape
        for name, shape in read_facts(checkpoint)["tensors"].items()
        if name.startswith(prefix)
    }
    saved: dict[str, Any] = (
        HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    )
    kinds = {name: saved[name].properties.dtype for name in shapes}
    tensors = {
        name: torch.empty(shape, dtype=dtype if kinds[name].is_floating_point else kinds[name])
        for name, shape in shapes.items()
    }
    load_sharded(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _why_not(name: str, facts: Mapping[str, Any]) -> str:
    if name.startswith("process-") or name.endswith(OF_BLOCKS):
        return (
            "this optimizer keeps its state in blocks of each process, so go on with "
            f"{facts['processes']} of them, as before"
        )
    return "it is the checkpoint of another model"
