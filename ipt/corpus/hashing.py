"""Choices that depend only on a seed and a name, so they are equal on every machine and in any
order.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def short_hash(*parts: object) -> str:
    """A hash of `parts` in order, as 16 hexadecimal digits."""
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def unit_hash(*parts: object) -> float:
    """A number in [0, 1), distributed uniformly over different `parts`."""
    return int(short_hash(*parts)[:13], 16) / 16**13  # 52 bits, which a float holds exactly


def pick(choices: Sequence[T], *parts: object) -> T:
    """One of `choices`, by the hash of `parts`."""
    return choices[int(unit_hash(*parts) * len(choices))]
