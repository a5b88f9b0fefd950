"""A source as an endless stream of tokens: one epoch after the other, each in its own order,
readable at any position.

The order needs constant memory. Documents form chunks of 4,096 neighbours. An epoch permutes the
chunks, takes 64 at a time as a window and permutes the documents of each window. A store of up to
2^18 documents is a single window, so it is permuted completely; a window of a larger store mixes
documents from 64 random places.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import numpy as np

CHUNK = 4096  # neighbouring documents that an epoch keeps together
WINDOW = 64  # chunks whose documents are permuted together


class Documents(Protocol):
    """The document lengths of a token store, as a plan reads them."""

    n_tokens: int

    def __len__(self) -> int:
        """Number of documents."""

    def positions(self, documents: np.ndarray) -> np.ndarray:
        """Position at which each document begins, in tokens of the complete store; at len(self) the
        end of the last one.
        """


class Stream:
    """Tokens of a source by their position in the endless stream.

    `share` below 1 keeps that fraction of the documents, chosen by seed and equal in every epoch.
    Counting their tokens takes one pass over all lengths: about a second per 10 million documents.
    """

    def __init__(self, documents: Documents, name: str, seed: int, share: float = 1.0) -> None:
        self._documents, self._name, self._seed, self._share = documents, name, seed, share
        self._count = len(documents)
        self._epochs, self._windows = Recent(2), Recent(2)
        if share < 1:
            self.n_documents, self._chunk_tokens = self._count_kept()
        else:
            borders = np.append(np.arange(0, self._count, CHUNK), self._count)
            self.n_documents = self._count
            self._chunk_tokens = np.diff(documents.positions(borders))
        self.n_tokens = int(self._chunk_tokens.sum())

    def read(self, start: int, end: int) -> np.ndarray:
        """The pieces that fill the positions `start` to `end`: int64 [pieces, 4] of document, first
        token, last token + 1, document length.
        """
        rows = [np.zeros((0, 4), np.int64)]
        while start < end:
            window, first = self._window_at(start)
            last = min(first + end - start, int(window.ends[-1]))
            rows.append(_cut_out(window, first, last))
            start += last - first
        return np.concatenate(rows)

    def _window_at(self, position: int) -> tuple["_Window", int]:
        """The window that holds a position of the stream, and the position in it."""
        epoch, offset = divmod(position, self.n_tokens)
        chunks, starts = self._epochs.get(epoch, lambda: self._epoch(epoch))
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        window = self._windows.get((epoch, number), lambda: self._window(epoch, number, chunks))
        return window, offset - int(starts[number])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in the epoch's order, and the position in the epoch at which each window
        begins.
        """
        chunks = permutation(len(self._chunk_tokens), self._seed, self._name, epoch, "chunks")
        ends = np.cumsum(self._chunk_tokens[chunks])
        return chunks, np.concatenate([[0], ends[WINDOW - 1 :: WINDOW]])

    def _window(self, epoch: int, window: int, chunks: np.ndarray) -> "_Window":
        places = chunks[window * WINDOW : (window + 1) * WINDOW, None] * CHUNK + np.arange(CHUNK)
        documents = places[places < self._count]
        documents = documents[
            permutation(len(documents), self._seed, self._name, epoch, f"window {window}")
        ]
        lengths = self._lengths(documents)
        documents, lengths = documents[lengths > 0], lengths[lengths > 0]
        return _Window(documents, np.cumsum(lengths))

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document; 0 for a document that is not kept."""
        lengths = self._documents.positions(documents + 1) - self._documents.positions(documents)
        return lengths if self._share == 1 else np.where(self._is_kept(documents), lengths, 0)

    def _is_kept(self, documents: np.ndarray) -> np.ndarray:
        key = int.from_bytes(_digest(self._seed, self._name, "subsample")[:8])
        return scramble(documents.astype(np.uint64) + np.uint64(key)) < np.uint64(
            min(int(self._share * 2**64), 2**64 - 1)
        )

    def _count_kept(self) -> tuple[int, np.ndarray]:
        kept, totals = 0, []
        for start in range(0, self._count, CHUNK * WINDOW):
            documents = np.arange(start, min(start + CHUNK * WINDOW, self._count))
            kept += int(self._is_kept(documents).sum())
            totals.append(
                np.add.reduceat(self._lengths(documents), np.arange(0, len(documents), CHUNK))
            )
        return kept, np.concatenate([np.zeros(0, np.int64), *totals])


class _Window(NamedTuple):
    """The non-empty documents of a window in reading order, and the end of each, counted from the
    start of the window.
    """

    documents: np.ndarray
    ends: np.ndarray


def _cut_out(window: _Window, first: int, last: int) -> np.ndarray:
    """Pieces that fill the positions `first` to `last` of a window."""
    begin = np.searchsorted(window.ends, first, side="right")
    stop = np.searchsorted(window.ends, last, side="left") + 1
    ends = window.ends[begin:stop]
    lengths = np.diff(ends, prepend=window.ends[begin - 1] if begin else 0)
    begins = ends - lengths
    return np.stack(
        [
            window.documents[begin:stop],
            np.maximum(first - begins, 0),
            np.minimum(last, ends) - begins,
            lengths,
        ],
        axis=1,
    )


class Recent:
    """A cache of the few most recent values."""

    def __init__(self, size: int) -> None:
        self._size, self._values = size, OrderedDict[Hashable, Any]()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._values:
            if len(self._values) >= self._size:
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]


def permutation(count: int, *entropy: object) -> np.ndarray:
    """A random order of `count` items that depends only on `entropy`.

    It sorts raw 64-bit numbers, the only random output that numpy keeps stable across versions, so
    a run keeps its order after an upgrade.
    """
    return np.argsort(
        np.random.PCG64(int.from_bytes(_digest(*entropy))).random_raw(count), kind="stable"
    )


def scramble(numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each uint64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _digest(*entropy: object) -> bytes:
    return hashlib.sha256("/".join(map(str, entropy)).encode()).digest()
