"""One process that works on shards of documents: an engine, the chains on it, and counters."""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ipt.config import SynthesisConfig
from ipt.errors import UserError
from ipt.synthesis.chains import Piece, run_bounded, run_chain
from ipt.synthesis.engines import Engine, Generation, PromptRefused, start_engine
from ipt.synthesis.formats.base import RULE_BASED, Prompt, PromptFormat, Vocabulary
from ipt.synthesis.formats.registry import FORMATS
from ipt.synthesis.shards import Documents, Shard, plan_shard

Advance = Callable[[float, str], None]  # takes a number of finished documents and a progress note

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What one run did. `generations_replayed` were read from the journal of an earlier run."""

    generations: int = 0
    generations_replayed: int = 0
    generations_refused: int = 0
    pairs: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, key.name) + getattr(other, key.name) for key in fields(self)))

    def note(self, seconds: float) -> str:
        """The part of the progress line after the documents."""
        parts = [f"{self.pairs} pairs"]
        if self.generated_tokens:
            parts.append(f"{self.generated_tokens / seconds:.0f} tokens/s")
        if self.cached_tokens:
            parts.append(f"{self.cached_tokens / self.prompt_tokens:.0%} of prompts cached")
        return ", ".join(parts)

    def report(self, seconds: float) -> dict[str, Any]:
        """The counts with the run time and the throughput, for `stats.json`."""
        rate = round(self.generated_tokens / seconds, 1)
        return {**asdict(self), "seconds": round(seconds, 1), "tokens_per_second": rate}


class ShardWorker:
    """Runs the chains of shards on one engine."""

    def __init__(
        self,
        config: SynthesisConfig,
        corpus: Documents,
        pairs: Path,
        prompt_format: PromptFormat,
        engine: Engine,
    ) -> None:
        self.counts = Counts()
        self.started = time.monotonic()
        self._config = config
        self._corpus = corpus
        self._pairs = pairs
        self._format = prompt_format
        self._engine = engine

    async def process(self, shards: Iterable[int], advance: Advance) -> None:
        """Finish `shards`. The chains of a shard start while those of the previous one still run,
        so the number of concurrent chains stays constant.
        """
        limit = self._config.max_num_seqs * self._config.data_parallel_size
        await run_bounded(self._chains(shards, advance), limit)

    def close(self) -> None:
        self._engine.close()

    def _chains(
        self, shards: Iterable[int], advance: Advance
    ) -> Iterator[Callable[[int], Awaitable[None]]]:
        for index in shards:
            plan = plan_shard(self._corpus.shard(index), self._config, self._format)
            advance(plan.dropped.total(), "")
            shard = Shard(self._pairs, index, plan)
            if not plan.chains:
                shard.write()
            for chain, pieces in enumerate(plan.chains):
                yield partial(self._run_chain, shard, chain, pieces, advance)

    async def _run_chain(
        self, shard: Shard, chain: int, pieces: list[Piece], advance: Advance, slot: int
    ) -> None:
        generate = partial(self._generate, shard, chain, slot)
        limit = self._config.max_model_len - self._config.max_new_tokens
        async for finished in run_chain(pieces, self._format, generate, limit):
            shard.add(chain, finished)
            self.counts.pairs += len(finished.parsed.pairs)
            advance(finished.piece.share, self.counts.note(time.monotonic() - self.started))

    async def _generate(
        self, shard: Shard, chain: int, slot: int, prompt: Prompt, number: int
    ) -> Generation:
        known = shard.journal.find(chain, number, prompt)
        if known is not None:
            self.counts.generations_replayed += 1
            return known
        try:
            generation = await self._engine.generate(prompt, priority=-number, slot=slot)
        except PromptRefused as refusal:
            if not self.counts.generations_refused:
                log.warning(
                    "synthesis: the engine rejected a prompt; this and further ones are counted "
                    "as errors: %s",
                    refusal,
                )
            self.counts.generations_refused += 1
            generation = Generation([], "", "error", 0, str(refusal))
        shard.journal.add(chain, number, prompt, generation)
        self.counts.generations += 1
        self.counts.prompt_tokens += len(prompt.ids)
        self.counts.cached_tokens += generation.cached_tokens
        self.counts.generated_tokens += len(generation.token_ids)
        return generation


def start(config: SynthesisConfig, seed: int) -> tuple[PromptFormat, Engine]:
    """Start the prompt format and the engine of `config`. Call it inside a running event loop, and
    close the engine in the end.
    """
    if config.format == RULE_BASED:
        from ipt.synthesis.engines.rule_based import RuleEngine

        return FORMATS[RULE_BASED](None, config), RuleEngine(seed)
    from ipt.models import load_tokenizer, resolve_model
    from ipt.models.checks import check_weights
    from ipt.models.limits import check_window

    if config.engine == "openai":
        model = ""
        tokenizer = load_tokenizer(config.tokenizer or config.model)
    else:
        model = resolve_model(config.model, config.adapter)
        check_weights(model)  # vLLM does not notice some missing weights
        check_window(config.model, "synthesis.max_model_len", config.max_model_len)
        tokenizer = load_tokenizer(model)
    vocabulary = Vocabulary(tokenizer)
    prompt_format = FORMATS[config.format](vocabulary, config)
    overhead = len(prompt_format.begin("").ids)
    if config.max_model_len - config.max_new_tokens - overhead < 1:
        raise UserError(
            f"synthesis.max_model_len={config.max_model_len}: no space for a document after "
            f"synthesis.max_new_tokens={config.max_new_tokens} and {overhead} tokens of the "
            "prompt: increase it"
        )
    log.info("synthesis: starting %s with %s", config.engine, config.model, extra={"style": "dim"})
    return prompt_format, start_engine(config, model, vocabulary, prompt_format, seed)
