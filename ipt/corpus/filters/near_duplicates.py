"""Near-duplicates by MinHash and locality-sensitive hashing.

The sketches come from a library, but the index is our own: the libraries' indices need 2.6 kB per
document and compare a document with everything that resembles it slightly, which in a corpus of
forms is everything. This one compares a document only with the first document of each shared band
and needs 300 to 500 bytes.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

# with so many a similarity is estimated to within 0.035 (one standard deviation)
PERMUTATIONS, SEED = (128, 42)
CHUNK = 4096  # sketches that are stored together


class NearDuplicates:
    """Finds sets of tokens with a Jaccard similarity of at least `similarity` to an earlier set."""

    def __init__(self, similarity: float) -> None:
        self.similarity, self.documents = similarity, 0
        self._rows = PERMUTATIONS // _bands(similarity)
        self._sketches: list[npt.NDArray[np.uint8]] = []
        self._first = _FirstDocument()

    def add(self, tokens: Sequence[str]) -> bool:
        """Add a document and return True, or return False if it is similar to an earlier one."""
        values = _minhash(tokens)
        bands = values.reshape(-1, self._rows)
        keys = [
            xxh3_64_intdigest(band.tobytes(), seed=number) >> 32
            for number, band in enumerate(bands)
        ]
        sketch = (values * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)
        for other in {first for key in keys if (first := self._first.get(key)) is not None}:
            if (
                _similarity(sketch, self._sketches[other // CHUNK][other % CHUNK])
                >= self.similarity
            ):
                return False
        if self.documents % CHUNK == 0:
            self._sketches.append(np.empty((CHUNK, PERMUTATIONS), np.uint8))
        self._sketches[-1][self.documents % CHUNK] = sketch
        for key in keys:
            self._first.put(key, self.documents)
        self.documents += 1
        return True


def _minhash(tokens: Sequence[str]) -> npt.NDArray[np.uint32]:
    from rensa import RMinHash

    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(tokens)
    return np.array(sketch.digest(), np.uint32)


def _similarity(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Fraction of equal hashes, corrected for those that are equal by chance because only one byte
    of each is stored.
    """
    chance = 1 / 256
    return float((np.count_nonzero(one == other) / PERMUTATIONS - chance) / (1 - chance))


def _bands(similarity: float) -> int:
    """The smallest number of bands for which two documents of this similarity share one with a
    probability of 85%.
    """
    choices = (1, 2, 4, 8, 16, 32)
    return next(
        bands
        for bands in choices
        if 1 - (1 - similarity ** (PERMUTATIONS // bands)) ** bands >= 0.85
    )


class _FirstDocument:
    """The first document with each 32-bit key. A flat table with linear probing: 8 bytes per entry,
    a quarter of them free.
    """

    def __init__(self) -> None:
        # of each entry: the key, and the document's number plus one
        self._table = array("Q", [0]) * 1024
        self._entries = 0

    def get(self, key: int) -> int | None:
        entry = self._table[self._slot(key)]
        return (entry & 0xFFFFFFFF) - 1 if entry else None

    def put(self, key: int, document: int) -> None:
        slot = self._slot(key)
        if self._table[slot]:
            return
        self._table[slot] = key << 32 | document + 1
        self._entries += 1
        if 4 * self._entries > 3 * len(self._table):
            entries, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
            for entry in filter(None, entries):
                self._table[self._slot(entry >> 32)] = entry

    def _slot(self, key: int) -> int:
        """The slot of the key, or the free slot for it."""
        table, last = self._table, len(self._table) - 1
        slot = key & last
        while (entry := table[slot]) and entry >> 32 != key:
            slot = slot + 1 & last
        return slot
