"""The synthesis stage: documents in, instruction-response pairs out, shard by shard."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ipt.config import SynthesisConfig
from ipt.console import Bar, console, progress
from ipt.stage import NOTE, is_as_noted, remove_notes
from ipt.synthesis.card import write_card
from ipt.synthesis.chains import Piece, run_bounded, run_chain
from ipt.synthesis.engines import Engine, Generation, PromptRefused, check_engine, start_engine
from ipt.synthesis.long_documents import MODES
from ipt.synthesis.prompts import FORMATS, RULE_BASED, Prompt, PromptFormat, Vocabulary
from ipt.synthesis.quality import statistics
from ipt.synthesis.shards import Documents, Shard, part_path, plan_shard

DTYPES = ("auto", "float32", "bfloat16", "float16")
CLUSTERS = ("none", "ray")
# Keys that may be changed between a run and its continuation: they do not decide what the pairs are.
OPERATION = {
    *("base_url", "api_key_env", "max_retries", "timeout", "max_live_chains", "max_num_batched_tokens"),
    *("gpu_memory_utilization", "kv_cache_gib", "tensor_parallel", "replicas", "cluster", "workers", "ray_address"),
}
Figures = dict[str, Any]


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
    corpus = Documents(documents, config.shard_size)
    _remove_torn(pairs)
    _remove_damaged(pairs)
    unfinished = [index for index in range(corpus.shards) if not part_path(pairs, index).exists()]
    session: Figures = {}
    if unfinished:
        with progress("synthesis", corpus.rows) as bar:
            bar.advance(corpus.rows - sum(corpus.size(index) for index in unfinished))
            session = _work_off(config, corpus, pairs, unfinished, seed, bar)
        _remove_torn(pairs)
    remove_notes(pairs)
    stats = statistics(pairs, max_new_tokens=config.max_new_tokens, parameters=_parameters(config))
    write_card(output, stats, synthesis_settings(config), seed)
    return {**stats, "session": session}


def _remove_torn(pairs: Path) -> None:
    """Remove what a process that was killed had begun to write, in an earlier session or as one of several workers of this one."""
    for torn in pairs.glob(".part-*.parquet.*"):
        if torn.suffix != NOTE:
            torn.unlink()


def _remove_damaged(pairs: Path) -> None:
    """Remove finished shards of an earlier session that are no longer what was written: they are made again."""
    for path in pairs.glob("part-*.parquet"):
        if not is_as_noted(path):
            console.print(f"{path} is damaged and made again", style="yellow", markup=False)
            path.unlink()


def check_synthesis(config: SynthesisConfig) -> None:
    """Raise a one-line ValueError for a config that `synthesize` would refuse. Loads nothing."""
    _check_choice("format", config.format, tuple(FORMATS))
    _check_choice("long_documents", config.long_documents, MODES)
    _check_choice("dtype", config.dtype, DTYPES)
    _check_choice("cluster", config.cluster, CLUSTERS)
    if config.format != RULE_BASED:
        check_engine(config.engine)
    if config.cluster == "ray":
        from ipt.synthesis.cluster import check_ray

        check_ray()
    for key in ("shots", "max_new_tokens", "shard_size", "max_live_chains", "max_num_batched_tokens", "tensor_parallel", "replicas"):
        if getattr(config, key) < 1:
            raise ValueError(f"synthesis.{key}={getattr(config, key)}: must be at least 1")
    for key in ("lookup_tokens", "max_retries"):
        if getattr(config, key) < 0:
            raise ValueError(f"synthesis.{key}={getattr(config, key)}: must be 0 or more")
    if config.timeout <= 0:
        raise ValueError(f"synthesis.timeout={config.timeout}: must be more than 0")
    if config.workers is not None and config.workers < 1:
        raise ValueError(f"synthesis.workers={config.workers}: must be at least 1, or null for what the cluster has room for")
    if config.max_pairs is not None and config.max_pairs < 1:
        raise ValueError(f"synthesis.max_pairs={config.max_pairs}: must be at least 1, or null for no grammar")
    if config.max_pairs is not None and config.format == "chat":
        raise ValueError(f"synthesis.max_pairs={config.max_pairs}: a grammar of format=ipt, chat prompts have their own: set it to null")
    if config.shots > 127:
        raise ValueError(f"synthesis.shots={config.shots}: must be at most 127")
    if config.max_new_tokens >= config.max_model_len:
        raise ValueError(
            f"synthesis.max_new_tokens={config.max_new_tokens}: must be less than synthesis.max_model_len={config.max_model_len}, "
            "which the document needs a share of"
        )
    if config.temperature < 0:
        raise ValueError(f"synthesis.temperature={config.temperature}: must be 0 (greedy) or more")
    if not 0 <= config.min_p <= 1 or (config.min_p and not config.temperature):
        raise ValueError(f"synthesis.min_p={config.min_p}: must be from 0 to 1, and needs synthesis.temperature above 0")
    if config.temperature and config.lookup_tokens:  # vLLM would leave out min_p, and on a CPU the seeds
        raise ValueError(f"synthesis.lookup_tokens={config.lookup_tokens}: needs synthesis.temperature=0")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ValueError(f"synthesis.gpu_memory_utilization={config.gpu_memory_utilization}: must be above 0 and at most 1")
    if config.kv_cache_gib is not None and config.kv_cache_gib <= 0:
        raise ValueError(f"synthesis.kv_cache_gib={config.kv_cache_gib}: must be above 0, or null for the engine's choice")
    if config.format == "chat":
        from ipt.synthesis.chat import load_prompt

        load_prompt(config.prompt)
    if config.adapter:
        from ipt.models import adapter_identity

        adapter_identity(config.adapter)


def synthesis_settings(config: SynthesisConfig) -> dict[str, Any]:
    """The part of `config` that decides what the pairs are; the rest says where and how fast they are made."""
    if config.format == RULE_BASED:
        return {key: getattr(config, key) for key in ("format", "shots", "shard_size")}
    return {key: value for key, value in asdict(config).items() if key not in OPERATION}


def synthesis_inputs(config: SynthesisConfig) -> dict[str, str]:
    """What the pairs depend on beside documents and config: the identity of the model, and of a prompt file."""
    from ipt.models import adapter_identity, model_identity
    from ipt.stage import hash_file

    inputs = {}
    if config.format == "chat":
        from ipt.synthesis.chat import prompt_path

        inputs["prompt"] = hash_file(prompt_path(config.prompt))
    if config.format != RULE_BASED:
        inputs["model"] = config.model if config.engine == "openai" else model_identity(config.model)
    if config.adapter:
        inputs["adapter"] = adapter_identity(config.adapter)
    return inputs


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"synthesis.{key}={value}: must be one of {', '.join(choices)}")


def _parameters(config: SynthesisConfig) -> int | None:
    """Parameters of the generator; None of a server's model, which is not here to be counted."""
    from ipt.models import count_parameters

    if config.format == RULE_BASED:
        return 0
    return None if config.engine == "openai" else count_parameters(config.model)


# Generation ----------------------------------------------------------------------------------------------------------


def _work_off(config: SynthesisConfig, corpus: Documents, pairs: Path, unfinished: list[int], seed: int, bar: Bar) -> Figures:
    """Work off the unfinished shards and return what this session did."""
    if config.cluster == "ray":
        from ipt.synthesis.cluster import work_off_on_ray

        return work_off_on_ray(config, corpus, pairs, unfinished, seed, bar)

    async def work() -> Figures:
        clock = time.monotonic()
        session = Session(config, corpus, pairs, *start(config, seed))
        try:
            await session.work_off(unfinished, bar.advance)
        finally:
            session.close()
        figures = with_rates(session.figures, time.monotonic() - session.started)
        return {**figures, "engine_load_seconds": round(session.started - clock, 1)}

    return asyncio.run(work())


def with_rates(figures: Figures, seconds: float) -> Figures:
    return {**figures, "seconds": round(seconds, 1), "tokens_per_second": round(figures["generated_tokens"] / seconds, 1)}


class Session:
    """An engine at work on shards, and what it did meanwhile. `generations_replayed` came from the journal of an earlier session."""

    def __init__(self, config: SynthesisConfig, corpus: Documents, pairs: Path, prompt_format: PromptFormat, engine: Engine) -> None:
        self.figures: Figures = dict.fromkeys(
            ("generations", "generations_replayed", "generations_refused", "pairs", "prompt_tokens", "cached_tokens", "generated_tokens"), 0
        )
        self._config, self._corpus, self._pairs, self._format, self._engine = config, corpus, pairs, prompt_format, engine
        self.started = time.monotonic()

    async def work_off(self, shards: Iterable[int], advance: Callable[[float, str], None]) -> None:
        """Finish `shards`: their chains one after the other, so that the window of live chains never waits for a shard's end.

        `advance` is told how many documents were finished, and a note for people.
        """
        await run_bounded(self._chains(shards, advance), self._config.max_live_chains * self._config.replicas)

    def close(self) -> None:
        self._engine.close()

    def _chains(self, shards: Iterable[int], advance: Callable[[float, str], None]) -> Iterator[Callable[[int], Awaitable[None]]]:
        for index in shards:
            plan = plan_shard(self._corpus.shard(index), self._config, self._format)
            advance(plan.dropped.total(), "")
            shard = Shard(self._pairs, index, plan)
            if not plan.chains:
                shard.write()
            for chain, pieces in enumerate(plan.chains):
                yield partial(self._run_chain, shard, chain, pieces, advance)

    async def _run_chain(self, shard: Shard, chain: int, pieces: list[Piece], advance: Callable[[float, str], None], lane: int) -> None:
        generate = partial(self._generate, shard, chain, lane)
        limit = self._config.max_model_len - self._config.max_new_tokens
        async for finished in run_chain(pieces, self._format, generate, limit):
            shard.add(chain, finished)
            self.figures["pairs"] += len(finished.parsed.pairs)
            advance(finished.piece.share, note(self.figures, time.monotonic() - self.started))

    async def _generate(self, shard: Shard, chain: int, lane: int, prompt: Prompt, number: int) -> Generation:
        known = shard.journal.find(chain, number, prompt)
        if known is not None:
            self.figures["generations_replayed"] += 1
            return known
        try:
            generation = await self._engine.generate(prompt, priority=-number, lane=lane)
        except PromptRefused as refusal:
            if not self.figures["generations_refused"]:
                said = f"synthesis: the engine refuses a prompt; this and further ones are counted as errors: {refusal}"
                console.print(said, style="yellow", markup=False)
            self.figures["generations_refused"] += 1
            generation = Generation([], "", "error", 0)
        shard.journal.add(chain, number, prompt, generation)
        self.figures["generations"] += 1
        self.figures["prompt_tokens"] += len(prompt.ids)
        self.figures["cached_tokens"] += generation.cached_tokens
        self.figures["generated_tokens"] += len(generation.token_ids)
        return generation


def note(figures: Figures, seconds: float) -> str:
    """What the progress bar says beside documents and time left."""
    rate = f", {figures['generated_tokens'] / seconds:.0f} tokens/s" if figures["generated_tokens"] else ""
    cached = f", {figures['cached_tokens'] / figures['prompt_tokens']:.0%} of prompts cached" if figures["cached_tokens"] else ""
    return f"{figures['pairs']} pairs{rate}{cached}"


def start(config: SynthesisConfig, seed: int) -> tuple[PromptFormat, Engine]:
    """The format and the engine that `config` names; call it inside a running event loop, and close the engine."""
    if config.format == RULE_BASED:
        from ipt.synthesis.engines.rules import RuleEngine

        return FORMATS[RULE_BASED](None, config), RuleEngine(seed)
    from ipt.models import load_tokenizer, resolve_model

    served = config.engine == "openai"
    model = "" if served else resolve_model(config.model, config.adapter)
    vocabulary = Vocabulary(load_tokenizer((config.tokenizer or config.model) if served else model))
    prompt_format = FORMATS[config.format](vocabulary, config)
    _check_window(config, None if served else model, prompt_format)
    console.print(f"[dim]synthesis: {config.engine} starts with {config.model}")
    return prompt_format, start_engine(config, model, vocabulary, prompt_format, seed)


def _check_window(config: SynthesisConfig, model: str | None, prompt_format: PromptFormat) -> None:
    """The model must have the context window that the config asks for, and the window must have room for documents."""
    from transformers import AutoConfig

    window = model and getattr(
        AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config(), "max_position_embeddings", None
    )
    if window and config.max_model_len > window:
        raise ValueError(f"synthesis.max_model_len={config.max_model_len}: the model {config.model} was made for at most {window} tokens")
    room = config.max_model_len - config.max_new_tokens - len(prompt_format.begin("").ids)
    if room < 1:
        raise ValueError(
            f"synthesis.max_model_len={config.max_model_len}: leaves no room for a document beside synthesis.max_new_tokens="
            f"{config.max_new_tokens} and what every prompt holds: raise it"
        )
