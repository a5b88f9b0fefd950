"""The synthesizer of the page: the engine of synthesis, which streams the output for one text."""

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

PAUSE = 0.1  # seconds between two updates
UNFINISHED = "unfinished"  # finish reason of a generation that is still running
ONE_CHAIN = 2**31  # shots: all texts are in one chain


class Example(NamedTuple):
    """An earlier text with its generations: one, or one per piece of a long text."""

    text: str
    generations: tuple[Generation, ...]
    pairs: int


@dataclass
class Writing:
    """The output so far. It grows while the page reads it."""

    text: str
    examples: int = 0  # number of rounds that belong to examples
    prompt_format: PromptFormat | None = None  # None: the engine is loading
    rounds: list[Round] = field(default_factory=list)
    # Number, piece and prompt of the round that is running, and its output so far.
    current: tuple[int, Piece, Prompt] | None = None
    output: str = ""
    started: float = 0.0  # start of the first round
    seconds: float = 0.0
    ended: bool = False

    def written(self) -> list[Round]:
        """The rounds of the text itself, with the output so far of the one that is running."""
        return self._rounds()[self.examples :]

    def rows(self) -> list[PairsRow]:
        """The rows that synthesis would pass to rendering."""
        rows = []
        for round in self._rounds():
            piece, parsed = round.piece, round.parsed
            content = ChainRow(piece.doc_id, piece.text, parsed.pairs, parsed.rewrite)
            rows.append(PairsRow(0, round.inherits_previous, content))
        return rows

    def example(self) -> Example:
        """This text with its output, as an example for another text."""
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
    """Starts its engine on first use, in a thread of its own, and keeps it.

    For one caller at a time.
    """

    def __init__(self, config: SynthesisConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._engine: tuple[PromptFormat, Engine] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="synthesizer", daemon=True)
        self._thread.start()

    def write(self, examples: Sequence[Example], text: str, stopped: Event) -> Iterator[Writing]:
        """Generate pairs for `text` after `examples`; yields the same object while it grows.

        The chain is that of synthesis (ipt.synthesis.chains): a text that does not fit the context
        window after the examples starts a new prompt. Setting `stopped` or closing the iterator
        stops the generation. Raises UserError for a text that is skipped for its length, and the
        exceptions of the engine.
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
        """Stop the generation, then the engine."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _write(self, examples: Sequence[Example], writing: Writing) -> None:
        prompt_format, engine = self._engine = self._engine or start(self.config, self._seed)
        writing.prompt_format = prompt_format
        known = [generation for example in examples for generation in example.generations]
        writing.examples = len(known)
        documents = []
        for number, text in enumerate([*(one.text for one in examples), writing.text], start=1):
            documents.append({"doc_id": f"text {number}", "text": text})
        plan = plan_shard(documents, replace(self.config, shots=ONE_CHAIN), prompt_format)
        if plan.dropped:
            raise UserError(
                f"synthesis.long_documents={self.config.long_documents} drops this text: "
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
            self._engine = None  # the next text starts a new one
            engine.close()
            raise

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._engine:
            self._engine[1].close()
