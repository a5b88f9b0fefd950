"""The synthesis stage: documents in, instruction-response pairs out, shard by shard."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ipt.config import SynthesisConfig
from ipt.console import Bar, console, progress
from ipt.synthesis.chains import Piece, run_bounded, run_chain
from ipt.synthesis.engines import Engine, Generation, PromptRefused, check_engine, start_engine
from ipt.synthesis.long_documents import MODES
from ipt.synthesis.prompts import FORMATS, PromptFormat, Vocabulary
from ipt.synthesis.quality import statistics
from ipt.synthesis.shards import Shard, part_path, plan_shard, read_shards

DTYPES = ("auto", "float32", "bfloat16", "float16")


def synthesize(config: SynthesisConfig, documents: Path, output: Path, seed: int) -> dict[str, Any]:
    """Make pairs for `documents/part-*.parquet` and write them to `output/pairs/part-*.parquet`; return the statistics.

    Documents are cut into shards of `config.shard_size`, in order. A shard whose part exists is finished and not redone; inside
    an unfinished one the journalled generations are not redone. The model is loaded only if there is something to do.
    Raises ValueError for a config that cannot work, FileNotFoundError where there are no documents, EngineDied if the engine
    fails in between: finished shards and journals stay, and the same call goes on from there.
    """
    check_synthesis(config)
    pairs = output / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    parts = sorted(documents.glob("part-*.parquet"))
    total = sum(pq.read_metadata(part).num_rows for part in parts)
    if not total:
        raise FileNotFoundError(f"{documents}: no documents in part-*.parquet, nothing to synthesise from: check the corpus stage")
    sizes = [min(config.shard_size, total - start) for start in range(0, total, config.shard_size)]
    unfinished = [index for index in range(len(sizes)) if not part_path(pairs, index).exists()]
    session: dict[str, Any] = {}
    if unfinished:
        with progress("synthesis", total) as bar:
            bar.advance(total - sum(sizes[index] for index in unfinished))
            session = _generate(config, documents, pairs, set(unfinished), seed, bar)
    return {**statistics(pairs), "session": session}


def check_synthesis(config: SynthesisConfig) -> None:
    """Raise a one-line ValueError for a config that `synthesize` would refuse. Loads nothing."""
    check_engine(config.engine)
    _check_choice("format", config.format, tuple(FORMATS))
    _check_choice("long_documents", config.long_documents, MODES)
    _check_choice("dtype", config.dtype, DTYPES)
    for key in ("shots", "max_new_tokens", "shard_size", "max_live_chains", "max_num_batched_tokens"):
        if getattr(config, key) < 1:
            raise ValueError(f"synthesis.{key}={getattr(config, key)}: must be at least 1")
    if config.shots > 127:
        raise ValueError(f"synthesis.shots={config.shots}: must be at most 127")
    if config.max_new_tokens >= config.max_model_len:
        raise ValueError(
            f"synthesis.max_new_tokens={config.max_new_tokens}: must be less than synthesis.max_model_len={config.max_model_len}, "
            "which the document needs a share of"
        )
    if config.temperature < 0:
        raise ValueError(f"synthesis.temperature={config.temperature}: must be 0 (greedy) or more")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ValueError(f"synthesis.gpu_memory_utilization={config.gpu_memory_utilization}: must be above 0 and at most 1")
    if config.kv_cache_gib is not None and config.kv_cache_gib <= 0:
        raise ValueError(f"synthesis.kv_cache_gib={config.kv_cache_gib}: must be above 0, or null for the engine's choice")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"synthesis.{key}={value}: must be one of {', '.join(choices)}")


# Generation ----------------------------------------------------------------------------------------------------------


def _generate(config: SynthesisConfig, documents: Path, pairs: Path, unfinished: set[int], seed: int, bar: Bar) -> dict[str, Any]:
    """Work off the unfinished shards and return what this session did."""
    from ipt.models import load_tokenizer, resolve_model

    model = resolve_model(config.model)
    vocabulary = Vocabulary(load_tokenizer(model))
    prompt_format = FORMATS[config.format](vocabulary)
    _check_window(config, model, prompt_format)

    async def work() -> dict[str, Any]:
        console.print(f"[dim]synthesis: loading {config.model} into the engine {config.engine}")
        clock = time.monotonic()
        engine = start_engine(config, model, vocabulary, seed)
        session = Session(config, prompt_format, engine, bar)
        session.figures["engine_load_seconds"] = round(time.monotonic() - clock, 1)
        try:
            await run_bounded(session.chains(documents, pairs, unfinished), config.max_live_chains)
        finally:
            engine.close()
        return session.finish()

    return asyncio.run(work())


class Session:
    """One run over unfinished shards: hands out their chains, and counts what the engine does meanwhile."""

    def __init__(self, config: SynthesisConfig, prompt_format: PromptFormat, engine: Engine, bar: Bar) -> None:
        self.figures: dict[str, Any] = {"generations": 0, "generations_replayed": 0, "generations_refused": 0, "generated_tokens": 0}
        self._config, self._format, self._engine, self._bar = config, prompt_format, engine, bar
        self._clock = time.monotonic()
        self._pairs = 0

    def chains(self, documents: Path, pairs: Path, unfinished: set[int]) -> Iterator[Callable[[], Awaitable[None]]]:
        """The chains of all unfinished shards, one after the other: the window of live chains never waits for a shard's end."""
        for index, rows in enumerate(read_shards(documents, self._config.shard_size)):
            if index not in unfinished:
                continue
            plan = plan_shard(rows, self._config, self._format)
            self._bar.advance(plan.dropped.total())
            shard = Shard(pairs, index, plan)
            if not plan.chains:
                shard.write()
            for chain, pieces in enumerate(plan.chains):
                yield partial(self._run_chain, shard, chain, pieces)

    def finish(self) -> dict[str, Any]:
        """What this session did; `generations_replayed` came from the journal of an interrupted one."""
        seconds = time.monotonic() - self._clock
        return {**self.figures, "seconds": round(seconds, 1), "tokens_per_second": round(self.figures["generated_tokens"] / seconds, 1)}

    async def _run_chain(self, shard: Shard, chain: int, pieces: list[Piece]) -> None:
        generate = partial(self._generate, shard, chain)
        limit = self._config.max_model_len - self._config.max_new_tokens
        async for finished in run_chain(pieces, self._format, generate, limit):
            shard.add(chain, finished)
            self._pairs += len(finished.parsed.pairs)
            rate = self.figures["generated_tokens"] / (time.monotonic() - self._clock)
            self._bar.advance(finished.piece.share, f"{self._pairs} pairs, {rate:.0f} tokens/s")

    async def _generate(self, shard: Shard, chain: int, prompt: list[int], number: int) -> Generation:
        known = shard.journal.find(chain, number, prompt)
        if known is not None:
            self.figures["generations_replayed"] += 1
            return known
        try:
            generation = await self._engine.generate(
                prompt, max_tokens=self._config.max_new_tokens, stop_ids=self._format.stop_ids, priority=-number
            )
        except PromptRefused as refusal:
            if not self.figures["generations_refused"]:
                console.print(f"[yellow]synthesis: the engine refuses a prompt; this and further ones are counted as errors: {refusal}")
            self.figures["generations_refused"] += 1
            generation = Generation([], "", "error", 0)
        shard.journal.add(chain, number, prompt, generation)
        self.figures["generations"] += 1
        self.figures["generated_tokens"] += len(generation.token_ids)
        return generation


def _check_window(config: SynthesisConfig, model: str, prompt_format: PromptFormat) -> None:
    """The model must have the context window that the config asks for, and the window must have room for documents."""
    from transformers import AutoConfig

    window = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if window is not None and config.max_model_len > window:
        raise ValueError(f"synthesis.max_model_len={config.max_model_len}: the model {config.model} was made for at most {window} tokens")
    room = config.max_model_len - config.max_new_tokens - len(prompt_format.begin(""))
    if room < 1:
        raise ValueError(
            f"synthesis.max_model_len={config.max_model_len}: leaves no room for a document beside synthesis.max_new_tokens="
            f"{config.max_new_tokens} and the tags: raise it"
        )
