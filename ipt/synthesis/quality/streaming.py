"""Figures of streams of any length, in bounded memory: exact as long as the stream is small, and
estimates in a stated way beyond.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from math import ceil, log2, sqrt
from typing import Generic, TypeVar

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

T = TypeVar("T")
HASHES = 2**64


class DistinctCount:
    """How many different texts there were. Exact up to `kept` of them, then an unbiased estimate
    (off by 0.1% with a million kept).

    Hashes below a threshold are kept; whenever there are too many the threshold is halved.
    """

    def __init__(self, kept: int = 1_000_000) -> None:
        self._kept, self._threshold = kept, HASHES
        self._hashes: set[int] = set()

    def add(self, text: str) -> None:
        number = xxh3_64_intdigest(text.encode())
        if number < self._threshold:
            self._hashes.add(number)
            while len(self._hashes) > self._kept:
                self._threshold //= 2
                self._hashes = {number for number in self._hashes if number < self._threshold}

    def result(self) -> int:
        return len(self._hashes) * (HASHES // self._threshold)


class FrequentCount:
    """How often each text came, for the frequent ones. Exact as long as there are at most `kept`
    different texts.

    Beyond that the rarer half is forgotten, and a text of it that comes again starts from one:
    counts are then lower bounds, close for texts that are much more frequent than those forgotten.
    """

    def __init__(self, kept: int = 200_000) -> None:
        self._kept = kept
        self._counts: Counter[str] = Counter()

    def add(self, text: str) -> int:
        """Count `text`, and return how often it came before."""
        before = self._counts[text]
        self._counts[text] = before + 1
        if len(self._counts) > self._kept:
            self._counts = Counter(dict(self._counts.most_common(self._kept // 2)))
        return before

    def most_common(self, n: int) -> list[tuple[str, int]]:
        return self._counts.most_common(n)


class BloomFilter:
    """Whether a text came before: a Bloom filter of 2 to 4 bytes for each of `capacity` texts, at
    most 1 GiB.

    A text that came before is always known. A new one is taken for known in fewer than one of 1,000
    cases up to `capacity`, or up to 500 million texts.
    """

    def __init__(self, capacity: int) -> None:
        self._bits = 2 ** min(max(ceil(log2(16 * capacity + 1)), 10), 33)
        self._set = bytearray(self._bits // 8)

    def add(self, text: str) -> bool:
        """Remember `text`, and return whether it came before."""
        first, step = divmod(xxh3_128_intdigest(text.encode()), HASHES)
        known = True
        for number in range(8):
            place, bit = divmod((first + number * (step | 1)) % self._bits, 8)
            known = known and bool(self._set[place] >> bit & 1)
            self._set[place] |= 1 << bit
        return known


class ReservoirSample(Generic[T]):
    """`size` random items of a stream, the same ones for the same stream and seed; all of them if
    there are fewer.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.items: list[T] = []
        self._size, self._seen, self._random = size, 0, random.Random(seed).random

    def add(self, item: T) -> None:
        self._seen += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (place := int(self._random() * self._seen)) < self._size:
            self.items[place] = item


class Histogram:
    """Counts by bins [edges[i], edges[i + 1]); the last one has no upper end. No value may be less
    than edges[0].
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges, self._counts = edges, [0] * len(edges)

    def add(self, value: int) -> None:
        self._counts[bisect_right(self._edges, value) - 1] += 1

    def result(self) -> dict[str, list[int]]:
        return {"edges": list(self._edges), "counts": self._counts}


def share(part: float, whole: float) -> float | None:
    """part / whole, to four places; None where there is nothing to divide by."""
    return round(part / whole, 4) if whole else None


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float] | None:
    """The 95% interval of a share (Wilson 1927), which holds for few trials and for shares near 0
    and 1; None without trials.
    """
    if not n:
        return None
    rate, spread = successes / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z * sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)
