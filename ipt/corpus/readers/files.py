"""A file of a corpus, on this machine or behind an fsspec URL: its kind and its content."""

import gzip
import io
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

from ipt.corpus.readers.streams import BoundedLines, RemoteFile, ZstandardStream, first_line
from ipt.errors import MissingFileError, UserError
from ipt.files import hash_file, hash_json
from ipt.places import POINTER_BYTES, check_pointer_bytes

# formats; .json files in a folder are ignored, so it is the last
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
# closed-book questions next to a corpus, which are never read as documents
QUESTIONS = "questions.jsonl"

# Keys of fsspec's `info`: checksums, the most reliable first, and modification times
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
    """One file. `system` is the fsspec file system of a remote file, None for a local one."""

    path: str
    name: str  # how documents name it: the same wherever the corpus is kept
    system: Any = field(default=None, compare=False)
    shown: str = field(default="", compare=False)  # how messages name it, by default by its path

    @property
    def where(self) -> str:
        """The name of the file in messages."""
        return self.shown or self.path

    @property
    def kind(self) -> str | None:
        """One of KINDS, by the ending of the name; None for any other file."""
        return file_kind(self.name)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes of the file as stored.

        Raises UserError for a broken or unreachable file and for a Git LFS pointer.
        """
        try:
            with (
                Path(self.path).open("rb")
                if self.system is None
                else io.BufferedReader(RemoteFile(self.system, self.path), 1 << 20) as data
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
                    yield io.BufferedReader(BoundedLines(stream), 1 << 17)
            elif self.name.lower().endswith(".zst"):
                yield io.BufferedReader(
                    BoundedLines(io.BufferedReader(ZstandardStream(data))), 1 << 17
                )
            else:
                yield data

    @contextmanager
    def open_anywhere(self) -> Iterator[IO[bytes]]:
        """The bytes of the file with random access. Copies it first if the server sends only
        complete files.
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
        """SHA-256 of a local file. For a remote one a hash of its size and its checksum, or of its
        modification time if there is no checksum.
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
    """The kind of a file with this name, one of KINDS, or None. Ignores case."""
    stem, ending = posixpath.splitext(name.lower())
    if ending in COMPRESSED:
        kind = ENDINGS.get(posixpath.splitext(stem)[1])
        return kind if kind != "parquet" else None
    return ENDINGS.get(ending)


def without_query(path: str, kind: str) -> str:
    return path.partition("?")[0] if kind in ("http", "https") else path


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turn any exception of a file system client into a one-line UserError."""
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
