"""Choices that depend on nothing but a seed and a name: equal on every machine and in every order
of reading.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def short_hash(*parts: object) -> str:
    """16 hexadecimal digits that stand for `parts` in their order."""
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def unit_hash(*parts: object) -> float:
    """A number in [0, 1), uniform over different `parts`."""
    return int(short_hash(*parts)[:13], 16) / 16**13  # 52 bits, which a float holds exactly


def pick(choices: Sequence[T], *parts: object) -> T:
    """One of `choices`, by the hash of `parts`."""
    return choices[int(unit_hash(*parts) * len(choices))]
