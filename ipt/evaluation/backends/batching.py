"""Batches of token rows, and prefixes that rows share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# keys of a batch per token of `batch_tokens`: rows after a shared prefix also attend to the prefix
KEYS = 16
ALIKE = 0.8  # minimum length of a row in a batch, as a fraction of the longest one
UNLIMITED = 2**20  # context length of a model without a stated limit


def batches(lengths: Sequence[int], batch_tokens: int, prefix: int = 0) -> Iterator[list[int]]:
    """Indices of the rows of each batch, longest first: at most `batch_tokens` with padding, or one
    row.

    Once a batch has an eighth of that, a row much shorter than its longest begins a new batch.
    `prefix`: length of a shared prefix, which adds keys to each row; these are limited too.
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
    """The context length of the model."""
    return int(
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED
    )


def full_attention_length(model: "PreTrainedModel") -> int:
    """The length up to which all layers attend to the whole text; 0 if some layers have no
    attention.

    Our tree masks replace the model's own mask, so such rows must fit in a sliding window.
    """
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return 0
    return int(getattr(config, "sliding_window", None) or UNLIMITED)


# Rows that begin alike
# ----------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Indices of rows with the same first `length` tokens."""

    length: int
    members: list[int]


@dataclass
class _Run:
    """Neighbours in sorted order from `begin` on that share `length` tokens, and the best groups of
    their parts.
    """

    length: int
    begin: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # length, begin, end


def shared_prefixes(rows: Sequence[Sequence[int]], overhead: int) -> list[Group]:
    """Disjoint groups of rows that save the most tokens: each member but one saves the common
    prefix, and each group costs `overhead` tokens.

    Runs of sorted neighbours with a common prefix form a tree, in which each run is either a group
    or divided into its parts, whichever saves more.
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
    """The run that ends before `end`, with the last part `last`: as one group or as its parts,
    whichever saves more.
    """
    parts = run.saved + last.saved
    whole = (end - run.begin - 1) * run.length - overhead
    if whole > parts:
        return _Run(run.length, run.begin, whole, [(run.length, run.begin, end)])
    return _Run(run.length, run.begin, parts, run.groups + last.groups)


def _common(rows: Sequence[NDArray[np.uint32]]) -> Iterator[int]:
    """The number of tokens that each row shares with the next."""
    for first, second in pairwise(rows):
        size = min(len(first), len(second))
        differs = first[:size] != second[:size]
        yield int(differs.argmax()) if differs.any() else size
