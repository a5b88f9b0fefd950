"""Draws that are the same on every machine and in every version of Python."""

import hashlib
from collections.abc import Iterator
from itertools import count


def draw(size: int, key: str) -> Iterator[int]:
    """The numbers below `size` in an order that `key` decides. Taking the first few costs no more
    than these.
    """
    seen: set[int] = set()
    for attempt in count():
        if len(seen) == size:
            return
        number = int(text_hash(f"{key}/{attempt}"), 16) % size
        if number not in seen:
            seen.add(number)
            yield number


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
