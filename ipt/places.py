"""Paths given by the user: expand `~`, check that folders are writable, detect Git LFS pointers."""

import os
import tempfile
from pathlib import Path

from ipt.errors import UserError

POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER_BYTES = 1024  # maximum size of a pointer


def expanded(path: str) -> str:
    """`path` with `~` or `~user` replaced by the home folder.

    Raises UserError for `~` if there is no home folder.
    """
    start = path.lstrip()
    if not start.startswith("~"):
        return path
    try:
        return str(Path(start).expanduser())
    except RuntimeError:
        if start == "~" or start.startswith("~/"):
            raise UserError(f"{start}: HOME is not set: write the full path") from None
        return path  # a folder with this name


def home_folder(below: str) -> Path:
    """The folder `below` in the home folder. Raises UserError if there is no home folder."""
    return Path(expanded(f"~/{below}"))


def check_writable(key: str, path: Path) -> None:
    """Raises UserError unless the folder `path`, the value of `key`, is writable or can be created.

    Creates nothing.
    """
    advice = f"set {key} to a writable folder"
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        message = (
            f"{key}={shown}: the path is not UTF-8, which Parquet and safetensors require: {advice}"
        )
        raise UserError(message) from None
    try:
        place = _existing(path.absolute())
        if not place.is_dir():
            kind = "a broken link" if place.is_symlink() and not place.exists() else "a file"
            raise UserError(f"{key}={path}: {place} is {kind}, expected a folder: {advice}")
        with tempfile.TemporaryFile(dir=place):  # unnamed if the file system supports it
            pass
    except OSError as error:
        message = f"{key}={path}: not writable ({error.strerror or error}): {advice}"
        raise UserError(message) from None


def check_temporary() -> None:
    """Raises UserError if there is no writable folder for temporary files."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise UserError(
            "no folder for temporary files is writable: set TMPDIR to a writable folder"
        ) from None


def check_pointer(file: Path) -> None:
    """Raises UserError if `file` cannot be read or is a Git LFS pointer instead of the content."""
    try:
        with file.open("rb") as opened:
            head = opened.read(POINTER_BYTES)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    check_pointer_bytes(str(file), head)


def check_pointer_bytes(where: str, head: bytes) -> None:
    """As `check_pointer`, for the first bytes of a file that messages name `where`."""
    if head.startswith(POINTERS) and b"\noid sha256:" in head[:POINTER_BYTES]:
        raise UserError(
            f"{where} is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
            "repository"
        )


def _existing(path: Path) -> Path:
    """The path if it exists, else its nearest existing parent."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
