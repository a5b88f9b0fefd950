"""Statistics of streams of any length in bounded memory: exact for small streams, estimates with a
stated error for larger ones.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from math import ceil, log2
from typing import Generic, TypeVar

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

T = TypeVar("T")
HASHES = 2**64


class DistinctCount:
    """The number of distinct texts. Exact up to `kept` of them, then an unbiased estimate (with a
    standard error of 0.1% for a million).

    Hashes below a threshold are kept; when there are too many, the threshold is halved.
    """

    def __init__(self, kept: int = 1_000_000) -> None:
        self._kept = kept
        self._threshold = HASHES
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
    """Counts of the most frequent texts. Exact for at most `kept` distinct texts.

    Beyond that the less frequent half is discarded, and its texts start again from one: counts are
    then lower bounds, and close for texts that are much more frequent than the discarded ones.
    """

    def __init__(self, kept: int = 200_000) -> None:
        self._kept = kept
        self._counts: Counter[str] = Counter()

    def add(self, text: str) -> int:
        """Count `text`, and return how often it occurred before."""
        before = self._counts[text]
        self._counts[text] = before + 1
        if len(self._counts) > self._kept:
            self._counts = Counter(dict(self._counts.most_common(self._kept // 2)))
        return before

    def most_common(self, n: int) -> list[tuple[str, int]]:
        return self._counts.most_common(n)


class BloomFilter:
    """Whether a text occurred before, with 2 to 4 bytes per text of `capacity`, at most 1 GiB.

    There are no false negatives. The rate of false positives is below 0.1% up to `capacity`, or up
    to 500 million texts.
    """

    def __init__(self, capacity: int) -> None:
        self._bits = 2 ** min(max(ceil(log2(16 * capacity + 1)), 10), 33)
        self._set = bytearray(self._bits // 8)

    def add(self, text: str) -> bool:
        """Add `text`, and return whether it occurred before."""
        first, step = divmod(xxh3_128_intdigest(text.encode()), HASHES)
        known = True
        for number in range(8):
            place, bit = divmod((first + number * (step | 1)) % self._bits, 8)
            known = known and bool(self._set[place] >> bit & 1)
            self._set[place] |= 1 << bit
        return known


class ReservoirSample(Generic[T]):
    """`size` random items of a stream, or all of them if there are fewer. The same stream and seed
    give the same items.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.items: list[T] = []
        self._size = size
        self._seen = 0
        self._random = random.Random(seed).random

    def add(self, item: T) -> None:
        self._seen += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (place := int(self._random() * self._seen)) < self._size:
            self.items[place] = item


class Histogram:
    """Counts per bin [edges[i], edges[i + 1]); the last bin has no upper edge. Values must be at
    least edges[0].
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges = edges
        self._counts = [0] * len(edges)

    def add(self, value: int) -> None:
        self._counts[bisect_right(self._edges, value) - 1] += 1

    def result(self) -> dict[str, list[int]]:
        return {"edges": list(self._edges), "counts": self._counts}


def share(part: float, whole: float) -> float | None:
    """part / whole, rounded to four places; None if `whole` is 0."""
    return round(part / whole, 4) if whole else None


def wilson_interval(successes: int, n: int) -> tuple[float, float] | None:
    """The 95% confidence interval of a proportion (Wilson 1927), which is valid for few trials and
    near 0 and 1; None without trials.
    """
    if not n:
        return None
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return round(float(interval.low), 4), round(float(interval.high), 4)
