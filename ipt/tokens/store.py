"""Token stores: documents as token ids in memory-mapped shards that are written once and read at
random.
"""

import mmap
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ipt.console import progress
from ipt.errors import UserError
from ipt.files import hash_json
from ipt.tokens.folders import LocalFolder, ShardFolder
from ipt.tokens.shards import (
    LOSS,
    LOSS_FILE,
    OFFSET,
    OFFSETS_FILE,
    TOKEN,
    TOKENS_FILE,
    EncodedDocument,
    Origin,
    ShardIndex,
    ShardWriter,
    shard_name,
)

# of one store at the same time: each takes a file descriptor, and a process may have some 1,000
OPEN_FILES = 128
CACHE_GIB = 100.0
SCANNED_TOKENS = 2**32  # of a store, for its largest id: 16 GiB, some 15 seconds
SCANNED_AT_ONCE = 2**24


def write_store(
    folder: Path, documents: Iterable[EncodedDocument], fingerprint: str, shard_tokens: int
) -> None:
    """Write `documents` in order as `shard-00000`, `shard-00001`, … of about `shard_tokens` tokens
    each.
    """
    remaining, number = iter(documents), 0
    following = next(remaining, None)
    while following is not None or number == 0:
        with ShardWriter(folder / shard_name(number), Origin(fingerprint)) as shard:
            while following is not None and shard.n_tokens < shard_tokens:
                shard.write(following)
                following = next(remaining, None)
        number += 1


class TokenStore:
    """Random access to the documents of a store, here or behind a URL.

    `len()` is the number of documents and `n_tokens` that of tokens. Opening a store reads the
    indices of its shards; other files are mapped when they are first needed and never read as a
    whole. Raises UserError or MissingFileError naming the shard that is missing, cut short,
    another's, or made with another tokenizer than the first one.
    """

    def __init__(self, folder: "Path | ShardFolder") -> None:
        self._folder: ShardFolder = LocalFolder(folder) if isinstance(folder, Path) else folder
        self.indices = self._folder.indices()
        self.location = self._folder.location
        self.fingerprint = self.indices[0].origin.tokenizer
        *self._first_document, self._n_documents = accumulate(
            (index.n_docs for index in self.indices), initial=0
        )
        *self._first_token, self.n_tokens = accumulate(
            (index.n_tokens for index in self.indices), initial=0
        )
        self._maps = _Maps(self._folder.max_open_bytes)

    @classmethod
    def open(cls, location: str | Path, cache_gib: float = CACHE_GIB) -> "TokenStore":
        """The store at a path or an fsspec URL; of the latter, at most `cache_gib` GiB of shards
        are kept on this machine.
        """
        kind, separator, path = str(location).partition("://")
        if not separator or kind in ("file", "local"):
            return cls(Path(path if separator else location))
        from ipt.tokens.remote import RemoteFolder

        return cls(RemoteFolder(str(location), cache_gib))

    def __len__(self) -> int:
        return self._n_documents

    @property
    def digest(self) -> str:
        """Hash of all that the store holds: equal for equal documents in equal shards, wherever
        they lie.
        """
        return hash_json([index.to_json() for index in self.indices])

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `start:end` of a document, as uint32; past its end there are none."""
        shard, first, last = self._span(document, start, end)
        return self._map(shard, TOKENS_FILE, TOKEN)[first:last]

    def is_target(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray | None:
        """For tokens `start:end`, whether each is trained on; None when all are."""
        shard = self._shard_of(document)
        if not self.indices[shard].has_loss_mask:
            return None
        shard, first, last = self._span(document, start, end)
        return self._map(shard, LOSS_FILE, LOSS)[first:last].astype(bool)

    def positions(self, documents: np.ndarray) -> np.ndarray:
        """Where each document begins, counted in tokens of the whole store (int64); of `len(store)`
        it is `n_tokens`.
        """
        documents = np.asarray(documents, np.int64)
        if documents.size and not (documents.min() >= 0 and documents.max() <= self._n_documents):
            raise IndexError(
                f"{self.location} has {self._n_documents} documents, asked for {documents.min()} "
                f"to {documents.max()}"
            )
        shards = np.searchsorted(self._first_document, documents, side="right") - 1
        result = np.empty(documents.shape, np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            offsets = self._map(shard, OFFSETS_FILE, None)
            result[here] = (
                offsets[documents[here] - self._first_document[shard]] + self._first_token[shard]
            )
        return result

    def largest_id(self) -> int:
        """The largest token id of a store on this machine, or of its first 2**32 tokens; -1 of a
        remote one.
        """
        if not isinstance(self._folder, LocalFolder):
            return -1
        largest, left = -1, SCANNED_TOKENS
        for shard in range(len(self.indices)):
            tokens = self._map(shard, TOKENS_FILE, TOKEN)[:left]
            for start in range(0, len(tokens), SCANNED_AT_ONCE):
                largest = max(largest, int(tokens[start : start + SCANNED_AT_ONCE].max()))
            left -= len(tokens)
        return largest

    def verify(self) -> None:
        """Read all files and compare them with the hashes in the indices. Raises UserError naming
        each that differs.
        """
        files = [(index, name) for index in self.indices for name in index.files]
        damaged = []
        with progress("verify", len(files)) as bar:
            for index, name in files:
                if self._folder.hash(index, name) != index.files[name]["sha256"]:
                    damaged.append(f"{index.shard}/{name}")
                bar.advance()
        if damaged:
            raise UserError(
                f"{self.location}: not what was written: {', '.join(damaged)}; tokenise again, or "
                "copy these shards anew"
            )

    def _shard_of(self, document: int) -> int:
        if not 0 <= document < self._n_documents:
            raise IndexError(
                f"{self.location} has {self._n_documents} documents, there is no document "
                f"{document}"
            )
        return bisect_right(self._first_document, document) - 1

    def _span(self, document: int, start: int, end: int | None) -> tuple[int, int, int]:
        shard = self._shard_of(document)
        local = document - self._first_document[shard]
        begin, stop = self._map(shard, OFFSETS_FILE, None)[local : local + 2].tolist()
        return shard, min(begin + start, stop), stop if end is None else min(begin + end, stop)

    def _map(self, shard: int, name: str, dtype: np.dtype | None) -> np.ndarray:
        """A file of a shard as an array; without a dtype it is a .npy file."""
        found = self._maps.get((shard, name))
        if found is None:
            found = self._open(self.indices[shard], name, dtype)
            self._maps.put((shard, name), found, self.indices[shard].files[name]["bytes"])
        return found

    def _open(self, index: ShardIndex, name: str, dtype: np.dtype | None) -> np.ndarray:
        with self._folder.open(index, name) as file:
            if dtype is not None:
                return _mapped(file, dtype, index.files[name]["bytes"] // dtype.itemsize, 0)
            count = index.n_docs + 1
            try:
                whole = np.lib.format.read_magic(file) == (1, 0)
                whole = whole and np.lib.format.read_array_header_1_0(file) == (
                    (count,),
                    False,
                    OFFSET,
                )
                offsets = _mapped(file, OFFSET, count, file.tell()) if whole else None
            except Exception:  # numpy's reader of headers raises whatever it comes upon
                offsets = None
        if offsets is None or offsets[0] != 0 or offsets[-1] != index.n_tokens:
            raise UserError(
                f"{self.location}/{index.shard}/{name} is not that of its shard: the shard is "
                "damaged, tokenise it again"
            )
        return offsets


class _Maps:
    """The arrays of a store that are mapped now. Beyond so many files or bytes the least recently
    used are let go.
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._arrays: OrderedDict[Any, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> np.ndarray | None:
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key][0]
            return None

    def put(self, key: Any, array: np.ndarray, size: int) -> None:
        """Keep the array of a file of `size` bytes."""
        with self._lock:
            if key not in self._arrays:  # another thread may have been as fast
                self._arrays[key] = array, size
                self._bytes += size
            while len(self._arrays) > OPEN_FILES or (
                self._bytes > self._max_bytes and len(self._arrays) > 1
            ):
                _, (_, old) = self._arrays.popitem(last=False)
                self._bytes -= old

    def __reduce__(self) -> tuple[Any, ...]:
        return _Maps, (self._max_bytes,)  # another process maps the files itself


def _mapped(file: BinaryIO, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """The array that a file holds, read-only and read when touched. It keeps the file open, and
    with it a lock on the file.
    """
    if count == 0:
        return np.zeros(0, dtype)  # nothing that could be mapped
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype, count, offset)
