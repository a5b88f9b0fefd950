"""One process at work on shards of documents: an engine, its chains, and what they came to."""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ipt.config import SynthesisConfig
from ipt.console import console
from ipt.errors import UserError
from ipt.synthesis.chains import Piece, run_bounded, run_chain
from ipt.synthesis.engines import Engine, Generation, PromptRefused, start_engine
from ipt.synthesis.formats.base import RULE_BASED, Prompt, PromptFormat, Vocabulary
from ipt.synthesis.formats.registry import FORMATS
from ipt.synthesis.shards import Documents, Shard, plan_shard

Figures = dict[str, Any]


def with_rates(figures: Figures, seconds: float) -> Figures:
    return {
        **figures,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(figures["generated_tokens"] / seconds, 1),
    }


class ShardWorker:
    """An engine at work on shards, and what it did meanwhile. `generations_replayed` came from the
    journal of an earlier session.
    """

    def __init__(
        self,
        config: SynthesisConfig,
        corpus: Documents,
        pairs: Path,
        prompt_format: PromptFormat,
        engine: Engine,
    ) -> None:
        self.figures: Figures = dict.fromkeys(
            (
                "generations",
                "generations_replayed",
                "generations_refused",
                "pairs",
                "prompt_tokens",
                "cached_tokens",
                "generated_tokens",
            ),
            0,
        )
        self._config, self._corpus, self._pairs, self._format, self._engine = (
            config,
            corpus,
            pairs,
            prompt_format,
            engine,
        )
        self.started = time.monotonic()

    async def work_off(self, shards: Iterable[int], advance: Callable[[float, str], None]) -> None:
        """Finish `shards`: their chains one after the other, so that the window of live chains
        never waits for a shard's end.

        `advance` is told how many documents were finished, and a note for people.
        """
        await run_bounded(
            self._chains(shards, advance),
            self._config.max_num_seqs * self._config.data_parallel_size,
        )

    def close(self) -> None:
        self._engine.close()

    def _chains(
        self, shards: Iterable[int], advance: Callable[[float, str], None]
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
        self,
        shard: Shard,
        chain: int,
        pieces: list[Piece],
        advance: Callable[[float, str], None],
        lane: int,
    ) -> None:
        generate = partial(self._generate, shard, chain, lane)
        limit = self._config.max_model_len - self._config.max_new_tokens
        async for finished in run_chain(pieces, self._format, generate, limit):
            shard.add(chain, finished)
            self.figures["pairs"] += len(finished.parsed.pairs)
            advance(finished.piece.share, note(self.figures, time.monotonic() - self.started))

    async def _generate(
        self, shard: Shard, chain: int, lane: int, prompt: Prompt, number: int
    ) -> Generation:
        known = shard.journal.find(chain, number, prompt)
        if known is not None:
            self.figures["generations_replayed"] += 1
            return known
        try:
            generation = await self._engine.generate(prompt, priority=-number, lane=lane)
        except PromptRefused as refusal:
            if not self.figures["generations_refused"]:
                said = (
                    "synthesis: the engine refuses a prompt; this and further ones are counted as "
                    f"errors: {refusal}"
                )
                console.print(said, style="yellow", markup=False)
            self.figures["generations_refused"] += 1
            generation = Generation([], "", "error", 0, str(refusal))
        shard.journal.add(chain, number, prompt, generation)
        self.figures["generations"] += 1
        self.figures["prompt_tokens"] += len(prompt.ids)
        self.figures["cached_tokens"] += generation.cached_tokens
        self.figures["generated_tokens"] += len(generation.token_ids)
        return generation


def note(figures: Figures, seconds: float) -> str:
    """What the progress bar says beside documents and time left."""
    rate = (
        f", {figures['generated_tokens'] / seconds:.0f} tokens/s"
        if figures["generated_tokens"]
        else ""
    )
    cached = (
        f", {figures['cached_tokens'] / figures['prompt_tokens']:.0%} of prompts cached"
        if figures["cached_tokens"]
        else ""
    )
    return f"{figures['pairs']} pairs{rate}{cached}"


def start(config: SynthesisConfig, seed: int) -> tuple[PromptFormat, Engine]:
    """The format and the engine that `config` names; call it inside a running event loop, and close
    the engine.
    """
    if config.format == RULE_BASED:
        from ipt.synthesis.engines.rule_based import RuleEngine

        return FORMATS[RULE_BASED](None, config), RuleEngine(seed)
    from ipt.model_checks import check_weights
    from ipt.models import load_tokenizer, resolve_model

    served = config.engine == "openai"
    model = "" if served else resolve_model(config.model, config.adapter)
    if not served:
        check_weights(model)  # vLLM leaves some missing weights as they are
    vocabulary = Vocabulary(load_tokenizer((config.tokenizer or config.model) if served else model))
    prompt_format = FORMATS[config.format](vocabulary, config)
    _check_window(config, None if served else model, prompt_format)
    console.print(f"[dim]synthesis: {config.engine} starts with {config.model}")
    return prompt_format, start_engine(config, model, vocabulary, prompt_format, seed)


def _check_window(config: SynthesisConfig, model: str | None, prompt_format: PromptFormat) -> None:
    """The model must have the context window that the config asks for, and the window must have
    room for documents.
    """
    if model:
        from ipt.model_limits import check_window

        check_window(config.model, "synthesis.max_model_len", config.max_model_len)
    room = config.max_model_len - config.max_new_tokens - len(prompt_format.begin("").ids)
    if room < 1:
        raise UserError(
            f"synthesis.max_model_len={config.max_model_len}: leaves no room for a document beside "
            "synthesis.max_new_tokens="
            f"{config.max_new_tokens} and what every prompt holds: raise it"
        )
