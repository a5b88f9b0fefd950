"""Chains of shots: which documents follow one another, and the asynchronous walk along them.

An M-shot chain is M different documents. Each is asked for its own pairs, with the earlier
documents and their pairs before it in the prompt (paper section 3.1; the released code's
multi-round inference). Here a chain is one coroutine: its next document starts as soon as the
previous one is parsed, whatever other chains do.
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


class Piece(NamedTuple):
    """A document, or a part of one that is too long, with its own prompt."""

    doc_id: str
    text: str
    prompt: Prompt
    document: int  # index of the document in its shard
    share: float = 1.0  # of its document


@dataclass(frozen=True)
class Round:
    """One document of a chain after its generation."""

    number: int
    piece: Piece
    prompt_tokens: int
    generation: Generation
    parsed: Parsed
    inherits_previous: (
        bool  # the previous round stood in the prompt, and this one has pairs: the two are one text
    )


def plan_chains(documents: Sequence[T], shots: int) -> list[list[T]]:
    """Deal N documents to ceil(N / shots) chains: document i, i + chunk, i + 2 chunk … with chunk =
    ceil(N / shots).

    Every document is in exactly one chain, at the place where the released code has it; any N and
    any `shots` >= 1 work. Where N is no multiple, the last chains are shorter.
    """
    chunk = -(-len(documents) // shots)
    return [list(documents[first::chunk]) for first in range(chunk)]


async def run_chain(
    pieces: Sequence[Piece],
    prompt_format: PromptFormat,
    generate: Callable[[Prompt, int], Awaitable[Generation]],
    max_prompt_tokens: int,
) -> AsyncIterator[Round]:
    """Yield the rounds of one chain. `generate(prompt, round)` gives the output for a prompt.

    A later shot sees the earlier ones if the one before it gave at least one pair (or a rewrite); a
    prompt that would be longer than `max_prompt_tokens` starts afresh with its own document, and
    what follows builds on that (paper section 3.1).
    """
    history: Prompt | None = None
    for number, piece in enumerate(pieces):
        prompt, follows = piece.prompt, False
        if history is not None:
            joined = prompt_format.follow(history, piece.text)
            if follows := len(joined.ids) <= max_prompt_tokens:
                prompt = joined
        generation = await generate(prompt, number)
        parsed = prompt_format.parse(generation.text)
        history = None
        if parsed.found:
            output_ids = generation.token_ids
            ended = (
                generation.finish_reason == "stop"
                and output_ids[-1:]
                and output_ids[-1] in prompt_format.stop_ids
            )
            history = prompt_format.finish(
                prompt, output_ids[:-1] if ended else output_ids, generation.text, parsed
            )
        yield Round(number, piece, len(prompt.ids), generation, parsed, follows and parsed.found)


async def run_bounded(tasks: Iterable[Callable[[int], Awaitable[Any]]], limit: int) -> None:
    """Run all `tasks`, at most `limit` at the same time and begun in order; `tasks` is read only as
    fast as they finish.

    Each is given its lane, a number below `limit` that no other one has at that time. The first
    error stops everything and is raised as it is.
    """
    remaining = iter(tasks)

    async def work(lane: int) -> None:
        for start in remaining:
            await start(lane)

    try:
        async with asyncio.TaskGroup() as group:
            for lane in range(limit):
                group.create_task(work(lane))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


# Long documents
# ----------------------------------------------------------------------------------------------

# The end of a sentence: a full stop before something that begins one, a full stop of a script
# without spaces, or a line break. A run of full stops is tried once, from its first one: trying
# each takes quadratic time on dotted lines.
SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s+(?![a-z])|[。！？｡।]+[」』”’）]*\s*|\n\s*"
)


class Fitted(NamedTuple):
    """The pieces that go on, and what was done: nothing (""), split, truncated, or too_long where
    none goes on.
    """

    pieces: list[str]
    action: str


def fit(text: str, mode: str, limit: int, count: Callable[[str], int]) -> Fitted:
    """Make `text` fit. `count` gives a text's prompt length in tokens, which may be at most
    `limit`; an empty text must fit.
    """
    if count(text) <= limit:
        return Fitted([text], "")
    if mode == "split":
        return Fitted(split(text, limit, count), "split")
    if mode == "truncate":
        return Fitted([truncate(text, limit, count)], "truncated")
    return Fitted([], "too_long")


def split(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Cut `text` into few pieces of similar length that fit; joined again they are `text`,
    character for character.

    Cuts are between sentences; only a sentence that does not fit is cut between words, and only a
    word that does not, within.
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
    """The longest beginning of `text` that fits, cut back to the end of a word where there is one
    in its second half.
    """
    end = bisect_right(range(len(text)), limit, key=lambda length: count(text[:length])) - 1
    while count(text[:end]) > limit:  # a shorter text can have more tokens, by one or two
        end -= 1
    word_end = max(text.rfind(space, 0, end) for space in " \n\t")
    return text[:word_end] if word_end > end // 2 else text[:end]


def sentences(text: str) -> list[str]:
    """`text` cut behind each sentence; the white space after a sentence belongs to it."""
    return _cut(text, SENTENCE_END)


def _fitting_units(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    units: list[str] = []
    for sentence in sentences(text):
        if count(sentence) <= limit:
            units.append(sentence)
            continue
        for word in _cut(sentence, re.compile(r"\s+")):
            units.extend([word] if count(word) <= limit else word)
    return units


def _group(units: list[str], lengths: list[int], pieces: int) -> list[str]:
    """Neighbouring units joined to at most `pieces` texts of similar length: a unit goes where its
    middle falls.
    """
    total, groups = sum(lengths), [""] * pieces
    for unit, length, end in zip(units, lengths, accumulate(lengths), strict=True):
        groups[min(pieces - 1, int((end - length / 2) * pieces / total))] += unit
    return [group for group in groups if group]


def _cut(text: str, boundary: re.Pattern[str]) -> list[str]:
    ends = [0, *(match.end() for match in boundary.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if end > start]
