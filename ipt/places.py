"""Places that the user names: `~`, whether a folder can be written, and files that Git LFS has not
fetched.
"""

import os
import tempfile
from pathlib import Path

from ipt.errors import UserError

POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER_BYTES = 1024  # which no pointer exceeds


def expanded(path: str) -> str:
    """`path` with `~` or `~user` replaced by the home folder. Raises UserError for `~` where there
    is no home folder.
    """
    start = path.lstrip()
    if not start.startswith("~"):
        return path
    try:
        return str(Path(start).expanduser())
    except RuntimeError:
        if start == "~" or start.startswith("~/"):
            message = (
                f"{start}: this user has no home folder (HOME is not set): write the whole path"
            )
            raise UserError(message) from None
        return path  # a folder of this name


def home_folder(below: str) -> Path:
    """The folder `below` the home folder. Raises UserError where there is none."""
    return Path(expanded(f"~/{below}"))


def check_writable(key: str, path: Path) -> None:
    """Check that the folder `path` exists and can be written, or that it can be created. Leaves
    nothing behind.

    Raises UserError that names `key` and `path`.
    """
    advice = f"set {key} to a folder that you can write"
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        message = (
            f"{key}={shown}: the name is not UTF-8, and Parquet and safetensors need that: {advice}"
        )
        raise UserError(message) from None
    try:
        place = _existing(path.absolute())
        if not place.is_dir():
            kind = "a broken link" if place.is_symlink() and not place.exists() else "a file"
            raise UserError(f"{key}={path}: {place} is {kind}, expected a folder: {advice}")
        with tempfile.TemporaryFile(dir=place):  # has no name where the file system allows that
            pass
    except OSError as error:
        message = f"{key}={path}: cannot be written ({error.strerror or error}): {advice}"
        raise UserError(message) from None


def check_temporary() -> None:
    """Raise UserError if there is no folder for temporary files."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise UserError(
            "no folder for temporary files can be written: set TMPDIR to one that can"
        ) from None


def check_content(path: str, head: bytes) -> None:
    """Raise UserError if a file that begins with `head` is a Git LFS pointer in place of the file."""
    if head.startswith(POINTERS) and b"\noid sha256:" in head[:POINTER_BYTES]:
        raise UserError(
            f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
        )


def check_file(path: Path) -> None:
    """As `check_content`, for a file on this machine that is about to be read."""
    with path.open("rb") as file:
        check_content(str(path), file.read(POINTER_BYTES))


def _existing(path: Path) -> Path:
    """The path itself, or the nearest of the folders above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
