"""Chains of documents that share a prompt, and the splitting of documents that are too long.

An M-shot chain is M different documents. The model writes pairs for each document, with the earlier
documents and their pairs in the prompt (paper section 3.1; the released code's multi-round
inference). Each chain is one coroutine: its next document starts as soon as the previous output is
parsed, regardless of other chains.
"""

import asyncio
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import Prompt, PromptFormat
from ipt.synthesis.formats.tags import Parsed

T = TypeVar("T")

# The end of a sentence: a full stop that is not followed by a lower-case letter, a full stop of a
# script without spaces, or a line break. The pattern starts only at the first of several full
# stops, because starting at each one takes quadratic time on dotted lines.
SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s+(?![a-z])|[。！？｡।]+[」』”’）]*\s*|\n\s*"
)
SPACE = re.compile(r"\s+")


class Piece(NamedTuple):
    """A document, or a part of a long one, with its own prompt."""

    doc_id: str
    text: str
    prompt: Prompt
    document: int  # index of the document in its shard
    share: float = 1.0  # fraction of the document


@dataclass(frozen=True)
class Round:
    """One document of a chain after its generation."""

    number: int
    piece: Piece
    prompt_tokens: int
    generation: Generation
    parsed: Parsed
    # the prompt contains the previous round and this round has pairs: the two form one text
    inherits_previous: bool


def plan_chains(documents: Sequence[T], shots: int) -> list[list[T]]:
    """Distribute N documents over `chunk = ceil(N / shots)` chains: chain c has the documents c,
    c + chunk, c + 2 chunk, …

    Each document is in exactly one chain, at the position where the released code puts it. If N is
    not a multiple of `shots`, the last chains are shorter.
    """
    chunk = -(-len(documents) // shots)
    return [list(documents[first::chunk]) for first in range(chunk)]


async def run_chain(
    pieces: Sequence[Piece],
    prompt_format: PromptFormat,
    generate: Callable[[Prompt, int], Awaitable[Generation]],
    max_prompt_tokens: int,
) -> AsyncIterator[Round]:
    """Yield the rounds of one chain. `generate(prompt, round)` returns the output for a prompt.

    A prompt contains the earlier documents if the previous output had at least one pair (or a
    rewrite) and the prompt does not exceed `max_prompt_tokens`. Otherwise it contains its own
    document only, and later prompts build on that (paper section 3.1).
    """
    history: Prompt | None = None
    for number, piece in enumerate(pieces):
        prompt, follows = piece.prompt, False
        if history is not None:
            joined = prompt_format.follow(history, piece.text)
            follows = len(joined.ids) <= max_prompt_tokens
            if follows:
                prompt = joined
        generation = await generate(prompt, number)
        parsed = prompt_format.parse(generation.text)
        history = None
        if parsed.found:
            ids = generation.token_ids
            if generation.finish_reason == "stop" and ids and ids[-1] in prompt_format.stop_ids:
                ids = ids[:-1]
            history = prompt_format.finish(prompt, ids, generation.text, parsed)
        yield Round(number, piece, len(prompt.ids), generation, parsed, follows and parsed.found)


async def run_bounded(tasks: Iterable[Callable[[int], Awaitable[Any]]], limit: int) -> None:
    """Run `tasks` with at most `limit` of them at the same time. They start in order, and `tasks`
    is consumed only as fast as they finish.

    Each task receives the number of its worker slot, which no other running task has. The first
    error cancels all tasks and is raised unchanged.
    """
    remaining = iter(tasks)

    async def work(slot: int) -> None:
        for start in remaining:
            await start(slot)

    try:
        async with asyncio.TaskGroup() as group:
            for slot in range(limit):
                group.create_task(work(slot))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


# Long documents: `synthesis.long_documents`
# ----------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """The pieces of a document that are used, and what happened to it: "" (it fits), split,
    truncated, or too_long (no pieces).
    """

    pieces: list[str]
    action: str


def fit(text: str, mode: str, limit: int, count: Callable[[str], int]) -> Fitted:
    """Make `text` fit. `count` returns the prompt length of a text in tokens, at most `limit` of
    which are allowed; the empty text must fit.
    """
    if count(text) <= limit:
        return Fitted([text], "")
    if mode == "split":
        return Fitted(split(text, limit, count), "split")
    if mode == "truncate":
        return Fitted([truncate(text, limit, count)], "truncated")
    return Fitted([], "too_long")


def split(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Split `text` into few pieces of similar length that fit. Joined, they are `text` again.

    The boundaries are between sentences. Only a sentence that is too long is split between words,
    and only a word that is too long is split between characters.
    """
    overhead = count("")
    units = _fitting_units(text, limit, count)
    lengths = [max(1, count(unit) - overhead) for unit in units]
    pieces = -(-sum(lengths) // max(1, limit - overhead))
    while True:
        parts = _group(units, lengths, pieces)
        if all(count(part) <= limit for part in parts):
            return parts
        pieces += 1  # ends at the latest when each unit is a piece


def truncate(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The longest prefix of `text` that fits, shortened to the end of a word if one ends in the
    second half of the prefix.
    """
    end = bisect_right(range(len(text)), limit, key=lambda length: count(text[:length])) - 1
    while count(text[:end]) > limit:  # a shorter text can have more tokens, by one or two
        end -= 1
    word_end = max(text.rfind(space, 0, end) for space in " \n\t")
    return text[:word_end] if word_end > end // 2 else text[:end]


def sentences(text: str) -> list[str]:
    """The sentences of `text`, each with the white space that follows it."""
    return _split_after(text, SENTENCE_END)


def _fitting_units(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    units: list[str] = []
    for sentence in sentences(text):
        if count(sentence) <= limit:
            units.append(sentence)
            continue
        for word in _split_after(sentence, SPACE):
            units.extend([word] if count(word) <= limit else word)
    return units


def _group(units: list[str], lengths: list[int], pieces: int) -> list[str]:
    """Join neighbouring units to at most `pieces` texts of similar length: the centre of a unit
    decides where it goes.
    """
    total, groups = sum(lengths), [""] * pieces
    for unit, length, end in zip(units, lengths, accumulate(lengths), strict=True):
        groups[min(pieces - 1, int((end - length / 2) * pieces / total))] += unit
    return [group for group in groups if group]


def _split_after(text: str, boundary: re.Pattern[str]) -> list[str]:
    ends = [0, *(match.end() for match in boundary.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if end > start]
