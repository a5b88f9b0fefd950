"""Chains of shots: which documents follow one another, and the asynchronous walk along them.

An M-shot chain is M different documents. Each is asked for its own pairs, with the earlier
documents and their pairs before it in the prompt (paper section 3.1; the released code's
multi-round inference). Here a chain is one coroutine: its next document starts as soon as the
previous one is parsed, whatever other chains do.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
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
