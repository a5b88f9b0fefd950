"""How much text goes through a model at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# keys of a batch per token of `batch_tokens`: rows behind a shared prefix attend to more than they
# hold
KEYS = 16
ALIKE = 0.8  # of the longest row's length: shorter ones would mostly be padding
UNLIMITED = 2**20  # context of a model that states no limit


def batches(lengths: Sequence[int], batch_tokens: int, prefix: int = 0) -> Iterator[list[int]]:
    """Indices of rows that go through the model together: longest first, at most `batch_tokens`
    with padding, or one row.

    Once a batch has an eighth of that, rows much shorter than its longest begin another one. Behind
    a shared prefix of so many tokens, rows have as many more keys each, which are limited too.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows, longest = len(batch) + 1, lengths[batch[0]] if batch else 0
        is_full = rows * longest > batch_tokens or rows * (longest + prefix) > KEYS * batch_tokens
        if batch and (
            is_full
            or (len(batch) * longest > batch_tokens / 8 and lengths[index] < ALIKE * longest)
        ):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def context_length(model: "PreTrainedModel") -> int:
    """Tokens that the model can read at once."""
    return int(
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED
    )


def full_attention_length(model: "PreTrainedModel") -> int:
    """Texts of at most so many tokens are seen whole by every layer; 0 where some layers do not
    attend at all.

    A mask that we pass replaces the model's own, so a row of branches must not need a sliding
    window.
    """
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return 0
    return int(getattr(config, "sliding_window", None) or UNLIMITED)


# Rows that begin alike
# ----------------------------------------------------------------------------------------------


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
    # big-endian: bytes sort as tokens do
    keys = [np.asarray(row, dtype=">u4").tobytes() for row in rows]
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
