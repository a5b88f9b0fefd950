"""The files of one shard of a token store, and how to write them.

shard-00000/tokens.bin    uint32, little-endian: the ids of all documents, concatenated
shard-00000/offsets.npy   int64 [n_docs + 1]: the start of each document
shard-00000/loss.bin      uint8: 1 for each token that is a target; only if some are not
shard-00000/index.json    inputs and settings of the shard, size and SHA-256 of the other files
"""

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ipt.errors import UserError

FORMAT = 2
TOKEN, OFFSET, LOSS = np.dtype("<u4"), np.dtype("<i8"), np.dtype("u1")
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
LOSS_FILE = "loss.bin"
INDEX_FILE = "index.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
FILL = 1 << 20  # tokens of a loss mask that are written at a time


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of one document and, where only a part of it is trained on, a 1 for each token that
    is a target.
    """

    tokens: np.ndarray
    is_target: np.ndarray | None = None


@dataclass(frozen=True)
class Origin:
    """What a shard was made with and from. Shards that say the same hold the same documents."""

    tokenizer: str  # its fingerprint
    bos: int | None = None  # the token that each document begins with
    eos: int | None = None  # the token that each document ends with
    rows: Mapping[str, Any] | None = (
        None  # which rows of which texts (tasks.Task.rows); None: it was not made from files
    )


@dataclass(frozen=True)
class ShardIndex:
    """The content of an `index.json`; `files` has bytes and sha256 of each file."""

    shard: str
    origin: Origin
    n_docs: int
    n_tokens: int
    files: Mapping[str, Mapping[str, Any]]

    @property
    def has_loss_mask(self) -> bool:
        return LOSS_FILE in self.files

    def to_json(self) -> str:
        counts = {"n_docs": self.n_docs, "n_tokens": self.n_tokens, "files": self.files}
        return (
            json.dumps(
                {"format": FORMAT, "shard": self.shard, **asdict(self.origin), **counts}, indent=2
            )
            + "\n"
        )


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def parse_index(text: str | bytes, where: str, shard: str) -> ShardIndex:
    """The index that `where` (for messages) holds of `shard`. Raises UserError naming it if it is
    that of another, or none.
    """
    damaged = UserError(
        f"{where} is not the index of a shard: the shard is damaged, tokenise it again"
    )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(value, dict):
        raise damaged
    if value.get("format") != FORMAT:
        raise UserError(
            f"{where} has format {str(value.get('format'))[:20]}, this version of ipt reads "
            f"{FORMAT}: tokenise the texts again"
        )
    if not _is_index(value):
        raise damaged
    origin = Origin(value["tokenizer"], value["bos"], value["eos"], value["rows"])
    index = ShardIndex(value["shard"], origin, value["n_docs"], value["n_tokens"], value["files"])
    if index.shard != shard:
        raise UserError(
            f"{where} is the index of {index.shard}, not of {shard}: files of two shards were "
            "swapped, put each in its place"
        )
    sizes = {
        TOKENS_FILE: index.n_tokens * TOKEN.itemsize,
        LOSS_FILE: index.n_tokens * LOSS.itemsize,
    }
    for name, file in index.files.items():
        if file["bytes"] != sizes.get(name, file["bytes"]):
            raise UserError(
                f"{where} contradicts itself: {index.n_tokens} tokens, but {name} of "
                f"{file['bytes']} bytes: tokenise it again"
            )
    if (size := index.files[OFFSETS_FILE]["bytes"]) < (index.n_docs + 1) * OFFSET.itemsize:
        raise UserError(
            f"{where} contradicts itself: {index.n_docs} documents, but {OFFSETS_FILE} of {size} "
            "bytes: tokenise it again"
        )
    return index


def _is_index(value: Mapping[str, Any]) -> bool:
    """Whether all is there and of the right kind. Names and hashes become paths, so nothing else
    may stand in their place.
    """
    counts = ("n_docs", "n_tokens")
    tokens = ("bos", "eos")
    rows = value.get("rows")
    files = value.get("files")
    return (
        all(isinstance(value.get(name), str) for name in ("shard", "tokenizer"))
        and all(_is_count(value.get(name)) for name in counts)
        and all(
            name in value and (value[name] is None or _is_count(value[name])) for name in tokens
        )
        and "rows" in value
        and (
            rows is None
            or (
                isinstance(rows, dict)
                and all(_is_count(rows.get(name)) for name in ("part", "parts"))
            )
        )
        and isinstance(files, dict)
        and {TOKENS_FILE, OFFSETS_FILE} <= set(files) <= {TOKENS_FILE, OFFSETS_FILE, LOSS_FILE}
        and all(isinstance(file, dict) and _is_count(file.get("bytes")) for file in files.values())
        and all(
            isinstance(file.get("sha256"), str) and SHA256.fullmatch(file["sha256"])
            for file in files.values()
        )
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class ShardWriter:
    """Writes a shard a document at a time, in memory that does not grow with the tokens.

    As a context manager: the folder appears whole at the end of the block, in the place of one that
    was there. If the block raises, nothing appears.
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin
        self.n_tokens = 0
        self._unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
        self._lengths = array("q")

    def __enter__(self) -> Self:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self._tokens = _HashedFile(self._unfinished / TOKENS_FILE)
        self._loss: _HashedFile | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in (self._tokens, self._loss):
                if file is not None:
                    file.close()
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def write(self, document: EncodedDocument) -> None:
        if document.is_target is not None and self._loss is None:
            self._loss = _HashedFile(self._unfinished / LOSS_FILE)
            for start in range(0, self.n_tokens, FILL):
                # documents before the first with a mask are trained on as a whole
                self._loss.write(np.ones(min(FILL, self.n_tokens - start), LOSS).tobytes())
        self._tokens.write(document.tokens.astype(TOKEN, copy=False).tobytes())
        if self._loss is not None:
            target = (
                np.ones(len(document.tokens)) if document.is_target is None else document.is_target
            )
            self._loss.write(target.astype(LOSS, copy=False).tobytes())
        self._lengths.append(len(document.tokens))
        self.n_tokens += len(document.tokens)

    def _finish(self) -> None:
        offsets = np.zeros(len(self._lengths) + 1, OFFSET)
        np.cumsum(self._lengths, out=offsets[1:])
        offsets_file = _HashedFile(self._unfinished / OFFSETS_FILE)
        np.save(offsets_file, offsets)
        files = {TOKENS_FILE: self._tokens, OFFSETS_FILE: offsets_file} | (
            {LOSS_FILE: self._loss} if self._loss else {}
        )
        facts = {name: file.close() for name, file in files.items()}
        index = _HashedFile(self._unfinished / INDEX_FILE)
        index.write(
            ShardIndex(self.folder.name, self.origin, len(self._lengths), self.n_tokens, facts)
            .to_json()
            .encode()
        )
        index.close()
        if self.folder.exists():
            remove_shard(self.folder)
        self._unfinished.rename(self.folder)


def remove_shard(folder: Path) -> None:
    """Remove a shard, its index first: without one, what is left of it after a kill is no shard."""
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted writers left in the folder of a store."""
    for path in folder.glob(".shard-*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


class _HashedFile:
    """A file that is written from its beginning to its end and then known by size and SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def close(self) -> dict[str, Any]:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}
