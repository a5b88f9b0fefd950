"""The synthesis stage: documents in, instruction-response pairs out, shard by shard."""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

from ipt.chat_templates import check_kwargs
from ipt.config import SynthesisConfig, check_choices, key_settings
from ipt.console import Progress, console, progress
from ipt.errors import UserError
from ipt.files import NOTE, is_as_noted, remove_notes
from ipt.synthesis.dataset_card import write_card
from ipt.synthesis.engines import check_engine
from ipt.synthesis.formats.base import RULE_BASED
from ipt.synthesis.quality.statistics import statistics
from ipt.synthesis.shards import Documents, part_path
from ipt.synthesis.worker import Figures, ShardWorker, start, with_rates


def synthesize(config: SynthesisConfig, documents: Path, output: Path, seed: int) -> dict[str, Any]:
    """Make pairs for `documents/part-*.parquet` and write them to `output/pairs/part-*.parquet`;
    return the statistics.

    Documents are cut into shards of `config.shard_size`, in order. A shard whose part exists is
    finished and not redone; inside an unfinished one the journalled generations are not redone. The
    model is loaded only if there is something to do. Raises UserError for a config that cannot
    work, MissingFileError where there are no documents, EngineDied if the engine fails in between:
    finished shards and journals stay, and the same call goes on from there.
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
    _stop_if_all_refused(pairs, stats)
    write_card(output, stats, synthesis_settings(config), seed)
    if stats["pairs"] or stats["rewrites"]:
        _say_if_alone(
            config, stats["joined"], stats["rows"] - stats["finish_reasons"].get("error", 0)
        )
    return {**stats, "session": session}


def _stop_if_all_refused(pairs: Path, stats: dict[str, Any]) -> None:
    """Raise UserError if no prompt was accepted, and remove the shards so that the next run tries
    again.
    """
    refused = stats["finish_reasons"].get("error", 0)
    if not refused or refused < stats["rows"]:
        return
    for path in pairs.glob("part-*.parquet"):
        path.unlink()
    words = next(iter(stats["refused"]), "no reason given")
    raise UserError(
        f"synthesis.model: all of {refused} prompts were refused ({words}): change what the reason "
        "names and run again; no output is kept"
    )


def _say_if_alone(config: SynthesisConfig, joined: int, rows: int) -> None:
    """A line where several shots were asked for and most later ones saw none before them."""
    later = rows - math.ceil(rows / config.shots)
    if config.format != RULE_BASED and 2 * joined < later:
        said = (
            f"synthesis.shots={config.shots}: {joined} of {later} later shots continue those "
            "before them; where these had pairs, "
            f"not all of it fits synthesis.max_model_len={config.max_model_len}: raise it, or "
            "lower synthesis.max_document_tokens"
        )
        console.print(said, style="yellow", markup=False)


def _remove_torn(pairs: Path) -> None:
    """Remove what a process that was killed had begun to write, in an earlier session or as one of
    several workers of this one.
    """
    for torn in pairs.glob(".part-*.parquet.*"):
        if torn.suffix != NOTE:
            torn.unlink()


def _remove_damaged(pairs: Path) -> None:
    """Remove finished shards of an earlier session that are no longer what was written: they are
    made again.
    """
    for path in pairs.glob("part-*.parquet"):
        if not is_as_noted(path):
            console.print(f"{path} is damaged and made again", style="yellow", markup=False)
            path.unlink()


def check_synthesis(config: SynthesisConfig) -> None:
    """Raise a one-line UserError for a config that `synthesize` would refuse. Loads nothing."""
    check_choices(config, "synthesis.")
    check_kwargs(config.chat_template_kwargs, "synthesis.chat_template_kwargs")
    if config.format != RULE_BASED:
        check_engine(config.engine)
    if config.cluster == "ray":
        from ipt.synthesis.ray import check_ray

        check_ray()
    for key in (
        "shots",
        "max_new_tokens",
        "shard_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "tensor_parallel_size",
        "data_parallel_size",
    ):
        if getattr(config, key) < 1:
            raise UserError(f"synthesis.{key}={getattr(config, key)}: must be at least 1")
    for key in ("prompt_lookup_num_tokens", "max_retries"):
        if getattr(config, key) < 0:
            raise UserError(f"synthesis.{key}={getattr(config, key)}: must be 0 or more")
    if config.timeout <= 0:
        raise UserError(f"synthesis.timeout={config.timeout}: must be more than 0")
    if config.workers is not None and config.workers < 1:
        raise UserError(
            f"synthesis.workers={config.workers}: must be at least 1, or null for what the cluster "
            "has room for"
        )
    if config.max_document_tokens is not None and config.max_document_tokens < 1:
        raise UserError(
            f"synthesis.max_document_tokens={config.max_document_tokens}: must be at least 1, or "
            "null for what fits"
        )
    if config.max_pairs is not None and config.max_pairs < 1:
        raise UserError(
            f"synthesis.max_pairs={config.max_pairs}: must be at least 1, or null for no grammar"
        )
    if config.max_pairs is not None and config.format == "chat":
        raise UserError(
            f"synthesis.max_pairs={config.max_pairs}: a grammar of format=ipt, chat prompts have "
            "their own: set it to null"
        )
    if config.shots > 127:
        raise UserError(f"synthesis.shots={config.shots}: must be at most 127")
    if config.max_new_tokens >= config.max_model_len:
        raise UserError(
            f"synthesis.max_new_tokens={config.max_new_tokens}: must be less than "
            f"synthesis.max_model_len={config.max_model_len}, "
            "which the document needs a share of"
        )
    if config.temperature < 0:
        raise UserError(f"synthesis.temperature={config.temperature}: must be 0 (greedy) or more")
    if not 0 <= config.min_p <= 1 or (config.min_p and not config.temperature):
        raise UserError(
            f"synthesis.min_p={config.min_p}: must be from 0 to 1, and needs synthesis.temperature "
            "above 0"
        )
    if (
        config.temperature and config.prompt_lookup_num_tokens
    ):  # vLLM would leave out min_p, and on a CPU the seeds
        raise UserError(
            f"synthesis.prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}: needs synthesis.temperature=0"
        )
    if not 0 < config.gpu_memory_utilization <= 1:
        raise UserError(
            f"synthesis.gpu_memory_utilization={config.gpu_memory_utilization}: must be above 0 "
            "and at most 1"
        )
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes <= 0:
        raise UserError(
            f"synthesis.kv_cache_memory_bytes={config.kv_cache_memory_bytes}: must be above 0, or null for the "
            "engine's choice"
        )
    if config.format == "chat":
        from ipt.synthesis.formats.chat import load_prompt

        load_prompt(config.prompt)
    if config.adapter:
        from ipt.models import adapter_identity

        adapter_identity(config.adapter)


def synthesis_settings(config: SynthesisConfig) -> dict[str, Any]:
    """The settings that the pairs depend on."""
    if config.format == RULE_BASED:
        return {key: getattr(config, key) for key in ("format", "shots", "shard_size")}
    return key_settings(config)


def synthesis_inputs(config: SynthesisConfig) -> dict[str, str]:
    """What the pairs depend on beside documents and config: the identity of the model, and of a
    prompt file.
    """
    from ipt.files import hash_file
    from ipt.models import adapter_identity, model_identity

    inputs = {}
    if config.format == "chat":
        from ipt.synthesis.formats.chat import prompt_path

        inputs["prompt"] = hash_file(prompt_path(config.prompt))
    if config.format != RULE_BASED:
        inputs["model"] = (
            config.model if config.engine == "openai" else model_identity(config.model)
        )
    if config.engine == "openai" and config.format != RULE_BASED:
        inputs["tokenizer"] = model_identity(
            config.tokenizer or config.model
        )  # with its chat template
    if config.adapter:
        inputs["adapter"] = adapter_identity(config.adapter)
    return inputs


def _parameters(config: SynthesisConfig) -> int | None:
    """Parameters of the generator; None of a server's model, which is not here to be counted."""
    from ipt.models import count_parameters

    if config.format == RULE_BASED:
        return 0
    return None if config.engine == "openai" else count_parameters(config.model)


# Generation
# ----------------------------------------------------------------------------------------------


def _work_off(
    config: SynthesisConfig,
    corpus: Documents,
    pairs: Path,
    unfinished: list[int],
    seed: int,
    bar: Progress,
) -> Figures:
    """Work off the unfinished shards and return what this session did."""
    if config.cluster == "ray":
        from ipt.synthesis.ray import work_off_on_ray

        return work_off_on_ray(config, corpus, pairs, unfinished, seed, bar)

    async def work() -> Figures:
        clock = time.monotonic()
        session = ShardWorker(config, corpus, pairs, *start(config, seed))
        try:
            await session.work_off(unfinished, bar.advance)
        finally:
            session.close()
        figures = with_rates(session.figures, time.monotonic() - session.started)
        return {**figures, "engine_load_seconds": round(session.started - clock, 1)}

    return asyncio.run(work())
