"""Copies of checkpoints in a folder behind an fsspec URL: made in the background, and fetched where
there is none on this machine.

A copy is whole once it has its `checkpoint.json`, which is copied last and removed first.
"""

import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from ipt.config import CheckpointConfig
from ipt.console import console
from ipt.errors import UserError
from ipt.tokens.remote import reaching
from ipt.training.checkpoint.storage import (
    FACTS,
    NAME,
    checkpoint_step,
    is_whole,
    remove,
    superseded,
    whole_checkpoints,
)


def upload(checkpoint: Path, url: str, config: CheckpointConfig) -> None:
    """Copy a whole checkpoint below `url` and remove older copies beyond those that the config
    keeps. Raises UserError.
    """
    with reaching(f"checkpoint.url {url}"):
        system, root = _find(url)
        target = f"{root}/{checkpoint.name}"
        system.makedirs(target, exist_ok=True)
        if system.exists(
            f"{target}/{FACTS}"
        ):  # of the same step, from before the run went on from an earlier one
            system.rm_file(f"{target}/{FACTS}")
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == FACTS):
            system.put_file(str(path), f"{target}/{path.name}")
        for name in superseded(_whole(system, root), config):
            system.rm_file(f"{root}/{name}/{FACTS}")
            system.rm(f"{root}/{name}", recursive=True)


def fetch(url: str, folder: Path) -> None:
    """Copy the newest checkpoint below `url` into `folder`, unless that has one of its own or there
    is none. Raises UserError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".fetch.lock"):  # processes of one machine all come here
        if whole_checkpoints(folder):
            return
        with reaching(f"checkpoint.url {url}"):
            system, root = _find(url)
            names = _whole(system, root)
            if names:
                _download(system, f"{root}/{names[-1]}", folder / names[-1])
        if names and not is_whole(folder / names[-1]):
            raise UserError(
                f"checkpoint.url {url}: the files of {names[-1]} do not have the sizes that its "
                f"{FACTS} says: remove it there"
            )


def _download(system: Any, source: str, checkpoint: Path) -> None:
    console.print(f"fetching {source}")
    temporary = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in system.ls(source, detail=False):
        system.get_file(file, str(temporary / Path(file).name))
    remove(checkpoint)  # one that is not whole
    temporary.rename(checkpoint)


def _whole(system: Any, root: str) -> list[str]:
    """Names of the whole checkpoints in a remote folder, oldest first."""
    system.invalidate_cache()
    if not system.exists(root):
        return []
    names = [Path(path.rstrip("/")).name for path in system.ls(root, detail=False)]
    whole = [
        name for name in names if NAME.fullmatch(name) and system.exists(f"{root}/{name}/{FACTS}")
    ]
    return sorted(whole, key=checkpoint_step)


def _find(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; looked up in each thread anew."""
    import fsspec

    system, path = fsspec.url_to_fs(url)
    return system, path.rstrip("/")
