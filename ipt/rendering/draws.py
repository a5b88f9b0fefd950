"""Random choices that depend only on a seed, a chain's id, a version and a purpose."""

from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import Any, TypeVar

from xxhash import xxh3_64_intdigest

T = TypeVar("T")


class Draws:
    """The choices of one text. Each purpose has its own stream: a hash of (purpose, seed, version,
    id).

    So choices are independent of each other (the released code couples them), and equal on any
    machine, in any order and in any process. A choice holds for the complete text.
    """

    def __init__(self, seed: int, chain: str, version: int = 0) -> None:
        self._any_version = f"\0{seed}\0\0{chain}".encode()
        self._this_version = f"\0{seed}\0{version}\0{chain}".encode()
        self._version = version
        self._fractions: dict[str, float] = {}
        self._picked: dict[str, Any] = {}

    def fraction(self, purpose: str) -> float:
        """A number in [0, 1)."""
        if purpose not in self._fractions:
            self._fractions[purpose] = (
                xxh3_64_intdigest(purpose.encode() + self._this_version) >> 11
            ) / 2**53
        return self._fractions[purpose]

    def pick(self, purpose: str, pool: Sequence[T]) -> T:
        """One of `pool`, uniformly. Versions of a chain pick different entries as long as there are
        enough.
        """
        if purpose not in self._picked:
            first = xxh3_64_intdigest(purpose.encode() + self._any_version)
            self._picked[purpose] = pool[(first + self._version * _stride(len(pool))) % len(pool)]
        return self._picked[purpose]

    def order(self, purpose: str, size: int) -> list[int]:
        """A permutation of range(size)."""
        key = purpose.encode() + self._this_version
        return sorted(range(size), key=lambda index: xxh3_64_intdigest(key, seed=index))


@cache
def _stride(size: int) -> int:
    """A step that visits all entries of a pool of `size` and jumps far, because neighbouring
    entries are alike.
    """
    return next(
        step for step in range(max(1, round(0.618 * size)), 2 * size) if gcd(step, size) == 1
    )
