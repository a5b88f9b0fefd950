"""A file of a corpus, on this machine or behind an fsspec URL: what kind it is, and what it holds."""

import gzip
import io
import json
import posixpath
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from ipt.errors import MissingFileError, UserError
from ipt.files import hash_file, hash_json
from ipt.places import POINTER_BYTES, check_pointer_bytes

# what a file can hold; .json last, which a folder's are passed over
KINDS = ("parquet", "jsonl", "txt", "json")
ENDINGS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".json": "json",
}
COMPRESSED = (".gz", ".zst")
READABLE = f"{', '.join(ENDINGS)} (all but the first also as .gz or .zst)"
LINE_BYTES = 1 << 28  # of a compressed file
ZSTANDARD_BYTES = (
    4096  # that are decompressed at a time: little, for they may hold ten thousand times as much
)
QUESTIONS = (
    "questions.jsonl"  # closed-book questions that may lie beside a corpus: never read as documents
)

# What a file system may tell about a file's content, the surest first; then when it was last
# written.
_CHECKSUMS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "content_md5",
    "Digest",
    "blob_id",
    "sha256",
    "checksum",
    "crc32c",
)
_TIMES = (
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
)


@dataclass(frozen=True)
class CorpusFile:
    """One file. `system` is the fsspec file system of a remote one, and None for one on this
    machine.
    """

    path: str
    name: str  # how documents name it: the same wherever the corpus is kept
    system: Any = field(default=None, compare=False)
    shown: str = field(default="", compare=False)  # how messages name it, by default by its path

    @property
    def where(self) -> str:
        """The file as messages name it."""
        return self.shown or self.path

    @property
    def kind(self) -> str | None:
        """One of KINDS, by the ending of the name; None for another file."""
        return file_kind(self.name)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes of the file as they are stored. For a broken or unreachable file the error is
        one line that names it.

        Raises UserError for a Git LFS pointer.
        """
        try:
            with (
                Path(self.path).open("rb")
                if self.system is None
                else io.BufferedReader(_Remote(self.system, self.path), 1 << 20) as data
            ):
                check_pointer_bytes(self.where, data.peek(POINTER_BYTES))
                yield data
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{self.where}: the file cannot be read to its end ({first_line(error)})"
            ) from None

    @contextmanager
    def open_lines(self) -> Iterator[IO[bytes]]:
        """The bytes of the file, decompressed if its name ends in .gz or .zst."""
        with self.open() as data:
            if self.name.lower().endswith(".gz"):
                with gzip.open(data, "rb") as stream:
                    yield io.BufferedReader(_Lines(stream), 1 << 17)
            elif self.name.lower().endswith(".zst"):
                yield io.BufferedReader(_Lines(io.BufferedReader(_Zstandard(data))), 1 << 17)
            else:
                yield data

    @contextmanager
    def open_anywhere(self) -> Iterator[IO[bytes]]:
        """The bytes of the file, which can be read in any order: a server that sends files only as
        a whole has it copied first.
        """
        with self.open() as data:
            if data.seekable():
                yield data
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(data, copy)
                copy.seek(0)
                yield copy

    def digest(self) -> str:
        """SHA-256 of a file on this machine; of a remote one a hash of its size and its checksum,
        or else when it was written.
        """
        if self.system is None:
            return hash_file(Path(self.path))
        with reaching(self.path):
            facts = self.system.info(self.path)
        known = next((name for name in (*_CHECKSUMS, *_TIMES) if facts.get(name)), None)
        return hash_json(
            {"size": facts.get("size"), "version": str(facts[known]) if known else None}
        )

    def exists(self) -> bool:
        if self.system is None:
            return Path(self.path).is_file()
        with reaching(self.path):
            return bool(self.system.exists(self.path))


def file_kind(name: str) -> str | None:
    """What a file of this name holds, one of KINDS, whatever the case of its ending; None for
    another file.
    """
    stem, ending = posixpath.splitext(name.lower())
    if ending in COMPRESSED:
        kind = ENDINGS.get(posixpath.splitext(stem)[1])
        return kind if kind != "parquet" else None
    return ENDINGS.get(ending)


def without_query(path: str, kind: str) -> str:
    return path.partition("?")[0] if kind in ("http", "https") else path


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turn what a file system raises, which is whatever its client does, into one line."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{where}: no such file or folder") from None
    except ImportError as error:
        raise UserError(f"{where}: a package is missing ({first_line(error)})") from None
    except Exception as error:
        raise UserError(
            f"{where}: cannot be reached ({type(error).__name__}: {first_line(error)})"
        ) from None


class _Zstandard(io.RawIOBase):
    """What is compressed in `data`, frame after frame. Raises EOFError where a frame is cut, which
    the library's own reader does not.
    """

    def __init__(self, data: IO[bytes]) -> None:
        self._data, self._decompressor = data, zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._data.read(ZSTANDARD_BYTES)
            if not self._input and self._frame is None:
                return 0
            if not self._input:
                raise EOFError("it ends in the middle of a compressed frame")
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        taken = min(len(buffer), len(self._output))
        buffer[:taken], self._output = self._output[:taken], self._output[taken:]
        return taken


class _Lines(io.RawIOBase):
    """What is decompressed, as long as it has line breaks: a small file could otherwise grow to a
    line that fills the memory.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._length = stream, 0

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        last = data.rfind(b"\n")
        self._length = self._length + len(data) if last < 0 else len(data) - last - 1
        if self._length > LINE_BYTES:
            raise OSError(
                f"{LINE_BYTES >> 20} MiB without a line break: decompress it yourself if you trust "
                "it"
            )
        return len(data)

    def readable(self) -> bool:
        return True


class _Remote(io.RawIOBase):
    """A file behind a URL. Whatever its client raises becomes an OSError."""

    def __init__(self, system: Any, path: str) -> None:
        with self._failing():
            self._data = system.open(path, "rb")
        self._in_any_order = "http" not in system.protocol or self._sends_parts()
        if not self._in_any_order:
            with self._failing():
                self._data = system.open(path, "rb", block_size=0)

    def readinto(self, buffer: Any) -> int:
        with self._failing():
            data = self._data.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._failing():
            return int(self._data.seek(offset, whence))

    def tell(self) -> int:
        return int(self._data.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._in_any_order

    def close(self) -> None:
        if not self.closed:
            self._data.close()
        super().close()

    def _sends_parts(self) -> bool:
        """Whether a web server sends parts of a file, which shows when one asks for its end."""
        try:
            self._data.seek(-1, io.SEEK_END)
            self._data.read(1)
            self._data.seek(0)
        except Exception:
            return False
        return True

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise OSError(first_line(error)) from error


def json_rows(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .json file, each with its number: those of a list, a single object, or else
    those of JSON lines.
    """
    with file.open_lines() as data:
        content = data.read()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from json_lines(file)
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        if not isinstance(value, dict):
            raise UserError(
                f"{file.where}, entry {number}: a JSON {type(value).__name__}, expected an object "
                "with named fields"
            )
        yield number, value


def json_lines(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each behind the number of its line; empty lines are
    passed over.

    Raises UserError that names the line of what is no JSON object in UTF-8.
    """
    with file.open_lines() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line, f"{file.where}, line {number}")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start}): convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        # a number of too many digits is a ValueError of Python's own
        raise UserError(f"{where}: not a line of JSON ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: a JSON {type(values).__name__}, expected an object with named fields"
        )
    return values


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
