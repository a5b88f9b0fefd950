"""A size-limited cache of remote files on local disk, addressed by content and shared by all
processes.
"""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock


class FileCache:
    """Files of a folder by their SHA-256. Beyond `limit` bytes the least recently opened files are
    removed.

    An open file is locked until the process or its last mapping ends, and a locked file is never
    removed. So the cache exceeds `limit` while more bytes are open.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit

    def open(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> BinaryIO:
        """The file with this hash and size. If it is missing, `fetch` writes it to a path and
        raises its own errors.
        """
        path = self.folder / sha256
        while (file := _open_in_use(path, size)) is None:
            with FileLock(self._lock(sha256[:2])):
                if not _is_whole(path, size):
                    self._make_room(size)
                    self._fetch(path, fetch)
        return file

    def _fetch(self, path: Path, fetch: Callable[[Path], None]) -> None:
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            # what is being written is not removed to make room for another
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                fetch(unfinished)
                os.fsync(file.fileno())
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        with FileLock(self._lock("room")):
            files = [
                (path.stat().st_mtime_ns, path.stat().st_size, path)
                for path in self.folder.iterdir()
                if path.is_file()
            ]
            held = sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if held + size <= self.limit:
                    return
                if _remove_unused(path):
                    held -= bytes_

    def _lock(self, name: str) -> Path:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _open_in_use(path: Path, size: int) -> BinaryIO | None:
    """The file, locked against removal for as long as anything keeps it open; None if it is not
    there or cut short.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    os.utime(file.fileno())  # when it was last opened
    return file


def _remove_unused(path: Path) -> bool:
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False
