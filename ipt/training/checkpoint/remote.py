"""Copies of checkpoints under an fsspec URL: uploaded in the background, and downloaded when there
is no checkpoint on this machine.

A copy is complete once it has its `checkpoint.json`, which is uploaded last and removed first.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from ipt.config import CheckpointConfig
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

log = logging.getLogger(__name__)


def upload(checkpoint: Path, url: str, config: CheckpointConfig) -> None:
    """Copy a complete checkpoint to `url` and remove older copies that the config does not keep.
    Raises UserError.
    """
    with reaching(f"checkpoint.url {url}"):
        system, root = _open(url)
        target = f"{root}/{checkpoint.name}"
        system.makedirs(target, exist_ok=True)
        # A copy of the same step exists if the run has resumed from an earlier one.
        if system.exists(f"{target}/{FACTS}"):
            system.rm_file(f"{target}/{FACTS}")
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == FACTS):
            system.put_file(str(path), f"{target}/{path.name}")
        for name in superseded(_complete(system, root), config):
            system.rm_file(f"{root}/{name}/{FACTS}")
            system.rm(f"{root}/{name}", recursive=True)


def fetch(url: str, folder: Path) -> None:
    """Download the newest checkpoint of `url` to `folder`, unless the folder has a complete one or
    the URL has none. Raises UserError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".fetch.lock"):  # all processes of a machine call it
        if whole_checkpoints(folder):
            return
        with reaching(f"checkpoint.url {url}"):
            system, root = _open(url)
            names = _complete(system, root)
            if names:
                _download(system, f"{root}/{names[-1]}", folder / names[-1])
        if names and not is_whole(folder / names[-1]):
            raise UserError(
                f"checkpoint.url {url}: the files of {names[-1]} do not have the sizes in its "
                f"{FACTS}: remove it there"
            )


def _download(system: Any, source: str, checkpoint: Path) -> None:
    log.info("downloading %s", source)
    temporary = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in system.ls(source, detail=False):
        system.get_file(file, str(temporary / Path(file).name))
    remove(checkpoint)  # an incomplete one
    temporary.rename(checkpoint)


def _complete(system: Any, root: str) -> list[str]:
    """Names of the complete checkpoints in a remote folder, oldest first."""
    system.invalidate_cache()
    if not system.exists(root):
        return []
    complete = []
    for path in system.ls(root, detail=False):
        name = Path(path.rstrip("/")).name
        if NAME.fullmatch(name) and system.exists(f"{root}/{name}/{FACTS}"):
            complete.append(name)
    return sorted(complete, key=checkpoint_step)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Each thread opens its own."""
    import fsspec

    system, path = fsspec.url_to_fs(url)
    return system, path.rstrip("/")
