"""The synthesizer behind the page: the engine that synthesis runs, at work on one text at a time
and watched while it is.
"""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from time import monotonic
from typing import NamedTuple

from ipt.config import SynthesisConfig
from ipt.errors import UserError
from ipt.rendering.pairs import ChainRow
from ipt.rendering.run import PairsRow
from ipt.synthesis.chains import Piece, Round, run_chain
from ipt.synthesis.engines import Engine, EngineDied, Generation
from ipt.synthesis.formats.base import Prompt, PromptFormat
from ipt.synthesis.shards import plan_shard
from ipt.synthesis.worker import start

PAUSE = 0.1  # seconds between two looks at what is being written
UNFINISHED = "unfinished"  # in place of a generation's reason to finish
ONE_CHAIN = 2**31  # shots: all pieces of all texts follow one another


class Example(NamedTuple):
    """An earlier text with what was written for it: one generation, or one for each piece of a long
    text.
    """

    text: str
    generations: tuple[Generation, ...]
    pairs: int


@dataclass
class Writing:
    """What has been written so far. It grows while it is looked at."""

    text: str
    examples: int = 0  # how many of the rounds belong to examples
    prompt_format: PromptFormat | None = None  # None: the engine is being loaded
    rounds: list[Round] = field(default_factory=list)
    current: tuple[int, Piece, Prompt] | None = (
        None  # number and piece of the round that is being written, and its prompt
    )
    output: str = ""  # of that round
    started: float = 0.0  # of the first round that is written
    seconds: float = 0.0
    ended: bool = False

    def written(self) -> list[Round]:
        """The rounds of the text itself, with the one that is being written as far as it goes."""
        return self._rounds()[self.examples :]

    def rows(self) -> list[PairsRow]:
        """What synthesis would hand on to rendering."""
        rows = []
        for piece, parsed, inherits in [
            (round.piece, round.parsed, round.inherits_previous) for round in self._rounds()
        ]:
            rows.append(
                PairsRow(
                    0, inherits, ChainRow(piece.doc_id, piece.text, parsed.pairs, parsed.rewrite)
                )
            )
        return rows

    def example(self) -> Example:
        """This text with its output, to be put before another."""
        rounds = self.written()
        return Example(
            self.text,
            tuple(round.generation for round in rounds),
            sum(len(round.parsed.pairs) for round in rounds),
        )

    def _rounds(self) -> list[Round]:
        rounds, current, output = list(self.rounds), self.current, self.output
        if self.prompt_format is None or current is None or current[0] < len(rounds) or not output:
            return rounds
        (_, piece, prompt), parsed = current, self.prompt_format.parse(output)
        follows = len(prompt.ids) > len(piece.prompt.ids)
        generation = Generation([], output, UNFINISHED, 0)
        return [
            *rounds,
            Round(
                len(rounds), piece, len(prompt.ids), generation, parsed, follows and parsed.found
            ),
        ]


class Synthesizer:
    """Starts its engine when it is first asked, in a thread of its own, and keeps it. For one
    caller at a time.
    """

    def __init__(self, config: SynthesisConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._engine: tuple[PromptFormat, Engine] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="synthesizer", daemon=True)
        self._thread.start()

    def write(self, examples: Sequence[Example], text: str, stopped: Event) -> Iterator[Writing]:
        """Write pairs for `text` behind `examples`; gives again and again the same object, as far
        as it has grown.

        The chain is that of synthesis (ipt.synthesis.chains): what does not fit the context window
        starts afresh. `stopped` ends it, and so does closing the iterator. Raises what the engine
        raises, UserError for a text that is skipped for its length.
        """
        writing = Writing(text)
        future = asyncio.run_coroutine_threadsafe(self._write(examples, writing), self._loop)
        try:
            while not future.done() and not stopped.is_set():
                wait([future], timeout=PAUSE)
                yield writing
        finally:
            writing.ended = True
            future.cancel()
        if not future.cancelled():
            future.result()
        yield writing

    def close(self) -> None:
        """End what is being written, then the engine."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _write(self, examples: Sequence[Example], writing: Writing) -> None:
        prompt_format, engine = self._engine = self._engine or start(self.config, self._seed)
        writing.prompt_format = prompt_format
        known = [generation for example in examples for generation in example.generations]
        writing.examples = len(known)
        texts = [*(example.text for example in examples), writing.text]
        documents = [
            {"doc_id": f"text {number}", "text": text} for number, text in enumerate(texts, start=1)
        ]
        plan = plan_shard(documents, replace(self.config, shots=ONE_CHAIN), prompt_format)
        if plan.dropped:
            raise UserError(
                f"synthesis.long_documents={self.config.long_documents} leaves this text out: "
                f"{', '.join(plan.dropped)}"
            )
        (chain,), limit = plan.chains, self.config.max_model_len - self.config.max_new_tokens

        async def generate(prompt: Prompt, number: int) -> Generation:
            if number < len(known):
                return known[number]
            writing.started = writing.started or monotonic()
            writing.output, writing.current = "", (number, chain[number], prompt)
            return await engine.generate(
                prompt, priority=0, slot=0, watch=lambda output: setattr(writing, "output", output)
            )

        try:
            async for finished in run_chain(chain, prompt_format, generate, limit):
                writing.rounds.append(finished)
                writing.seconds = monotonic() - (writing.started or monotonic())
        except EngineDied:
            self._engine = None  # the next text starts another one
            engine.close()
            raise

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._engine:
            self._engine[1].close()
