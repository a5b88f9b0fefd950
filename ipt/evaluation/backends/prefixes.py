"""Which token rows begin alike, so that what they share need be computed only once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Group(NamedTuple):
    """Rows (their indices) whose first `length` tokens are the same."""

    length: int
    members: list[int]


@dataclass
class _Run:
    """Neighbours in sorted order that share `length` tokens, from `begin` on; and the best that is
    known for parts of them.
    """

    length: int
    begin: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # length, begin, end


def shared_prefixes(rows: Sequence[Sequence[int]], overhead: int) -> list[Group]:
    """Groups of rows, no row in two of them, that save the most tokens: each member but one saves
    the common prefix.

    A group costs `overhead` tokens, so one that saves no more is not made. Runs of sorted
    neighbours with a common prefix form a tree, in which each run is taken whole or left to its
    parts, whichever saves more.
    """
    keys = [
        np.asarray(row, dtype=">u4").tobytes() for row in rows
    ]  # big-endian: bytes sort as tokens do
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ids = [np.frombuffer(keys[index], dtype=">u4") for index in order]
    root = _Run(-1, 0)
    stack = [root]
    for end, length in enumerate((*_common(ids), -1), start=1):
        part = _Run(length, end - 1)  # one row alone
        while stack[-1].length > length:
            part = _resolved(stack.pop(), part, end, overhead)
        if stack[-1].length < length:
            stack.append(_Run(length, part.begin))
        stack[-1].saved += part.saved
        stack[-1].groups += part.groups
    return [Group(length, sorted(order[begin:end])) for length, begin, end in root.groups]


def _resolved(run: _Run, last: _Run, end: int, overhead: int) -> _Run:
    """The run that ends before `end`, `last` being its last part: as one group, or as its parts,
    whatever saves more.
    """
    parts = run.saved + last.saved
    whole = (end - run.begin - 1) * run.length - overhead
    if whole > parts:
        return _Run(run.length, run.begin, whole, [(run.length, run.begin, end)])
    return _Run(run.length, run.begin, parts, run.groups + last.groups)


def _common(rows: Sequence[NDArray[np.uint32]]) -> Iterator[int]:
    """How many tokens each row shares with the next."""
    for first, second in pairwise(rows):
        size = min(len(first), len(second))
        differs = first[:size] != second[:size]
        yield int(differs.argmax()) if differs.any() else size
