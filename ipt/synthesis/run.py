"""The synthesis stage: documents in, instruction-response pairs out, shard by shard."""

import asyncio
import logging
import math
import time
from pathlib import Path
from typing import Any

from ipt.chat_templates import check_kwargs
from ipt.config import SynthesisConfig, check_choices, key_settings
from ipt.console import Progress, progress
from ipt.errors import UserError
from ipt.files import NOTE, hash_file, is_as_noted, remove_notes
from ipt.synthesis.dataset_card import write_card
from ipt.synthesis.engines import check_engine
from ipt.synthesis.formats.base import RULE_BASED
from ipt.synthesis.formats.prompt_file import load_prompt, prompt_path
from ipt.synthesis.quality.statistics import statistics
from ipt.synthesis.shards import Documents, part_path
from ipt.synthesis.worker import ShardWorker, start

MINIMA = {
    "shots": 1,
    "max_new_tokens": 1,
    "max_document_tokens": 1,
    "max_pairs": 1,
    "shard_size": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "workers": 1,
    "kv_cache_memory_bytes": 1,
    "temperature": 0,
    "prompt_lookup_num_tokens": 0,
    "max_retries": 0,
}

log = logging.getLogger(__name__)


def synthesize(config: SynthesisConfig, documents: Path, output: Path, seed: int) -> dict[str, Any]:
    """Make pairs for `documents/part-*.parquet`, write them to `output/pairs/part-*.parquet` and
    return the statistics.

    The documents are processed in shards of `config.shard_size`, in order. Finished shards are
    skipped, and generations in the journal of an unfinished shard are not repeated. The model is
    loaded only if there is work to do. Raises UserError for an invalid config, MissingFileError if
    there are no documents, and EngineDied if the engine fails; finished shards and journals are
    kept, and the same call resumes.
    """
    check_synthesis(config)
    pairs = output / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    corpus = Documents(documents, config.shard_size)
    _remove_temporary(pairs)
    _remove_damaged(pairs)
    unfinished = [index for index in range(corpus.shards) if not part_path(pairs, index).exists()]
    session: dict[str, Any] = {}
    if unfinished:
        with progress("synthesis", corpus.rows) as bar:
            bar.advance(corpus.rows - sum(corpus.size(index) for index in unfinished))
            session = _process(config, corpus, pairs, unfinished, seed, bar)
        _remove_temporary(pairs)
    remove_notes(pairs)
    stats = statistics(pairs, max_new_tokens=config.max_new_tokens, parameters=_parameters(config))
    _check_not_all_rejected(pairs, stats)
    write_card(output, stats, synthesis_settings(config), seed)
    _warn_if_few_joined(config, stats)
    return {**stats, "session": session}


def check_synthesis(config: SynthesisConfig) -> None:
    """Raise UserError for a config that `synthesize` rejects. Loads no model."""
    check_choices(config, "synthesis.")
    check_kwargs(config.chat_template_kwargs, "synthesis.chat_template_kwargs")
    if config.format != RULE_BASED:
        check_engine(config.engine)
    if config.cluster == "ray":
        from ipt.synthesis.ray import check_ray

        check_ray()
    for key, minimum in MINIMA.items():
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise UserError(f"synthesis.{key}={value}: must be at least {minimum}")
    if config.shots > 127:
        raise UserError(f"synthesis.shots={config.shots}: must be at most 127")
    if config.timeout <= 0:
        raise UserError(f"synthesis.timeout={config.timeout}: must be greater than 0")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise UserError(
            f"synthesis.gpu_memory_utilization={config.gpu_memory_utilization}: must be greater "
            "than 0 and at most 1"
        )
    _check_combinations(config)
    if config.format == "chat":
        load_prompt(config.prompt)
    if config.adapter:
        from ipt.models import adapter_identity

        adapter_identity(config.adapter)


def _check_combinations(config: SynthesisConfig) -> None:
    if config.max_pairs is not None and config.format == "chat":
        raise UserError(
            f"synthesis.max_pairs={config.max_pairs}: only format=ipt has this grammar: set it to "
            "null"
        )
    if config.max_new_tokens >= config.max_model_len:
        raise UserError(
            f"synthesis.max_new_tokens={config.max_new_tokens}: must be less than "
            f"synthesis.max_model_len={config.max_model_len}, which includes the document"
        )
    if not 0 <= config.min_p <= 1 or (config.min_p and not config.temperature):
        raise UserError(
            f"synthesis.min_p={config.min_p}: must be from 0 to 1, and needs synthesis.temperature "
            "above 0"
        )
    # vLLM ignores min_p with prompt lookup, and on a CPU the seeds
    if config.temperature and config.prompt_lookup_num_tokens:
        raise UserError(
            f"synthesis.prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}: needs "
            "synthesis.temperature=0"
        )


def synthesis_settings(config: SynthesisConfig) -> dict[str, Any]:
    """The keys of `config` that affect the pairs."""
    if config.format == RULE_BASED:
        return {key: getattr(config, key) for key in ("format", "shots", "shard_size")}
    return key_settings(config)


def synthesis_inputs(config: SynthesisConfig) -> dict[str, str]:
    """Identities of what the pairs depend on besides documents and settings: the model, its adapter
    and tokenizer, and the prompt file.
    """
    from ipt.models import adapter_identity, model_identity

    inputs = {}
    if config.format == "chat":
        inputs["prompt"] = hash_file(prompt_path(config.prompt))
    if config.format != RULE_BASED and config.engine == "openai":
        inputs["model"] = config.model
        inputs["tokenizer"] = model_identity(config.tokenizer or config.model)
    elif config.format != RULE_BASED:
        inputs["model"] = model_identity(config.model)
    if config.adapter:
        inputs["adapter"] = adapter_identity(config.adapter)
    return inputs


def _process(
    config: SynthesisConfig,
    corpus: Documents,
    pairs: Path,
    unfinished: list[int],
    seed: int,
    bar: Progress,
) -> dict[str, Any]:
    """Finish the `unfinished` shards and return what this run did."""
    if config.cluster == "ray":
        from ipt.synthesis.ray import process_on_ray

        return process_on_ray(config, corpus, pairs, unfinished, seed, bar)

    async def work() -> dict[str, Any]:
        clock = time.monotonic()
        worker = ShardWorker(config, corpus, pairs, *start(config, seed))
        try:
            await worker.process(unfinished, bar.advance)
        finally:
            worker.close()
        report = worker.counts.report(time.monotonic() - worker.started)
        return {**report, "engine_load_seconds": round(worker.started - clock, 1)}

    return asyncio.run(work())


def _parameters(config: SynthesisConfig) -> int | None:
    """Parameters of the model; None if it runs on a server, where they cannot be counted."""
    from ipt.models import count_parameters

    if config.format == RULE_BASED:
        return 0
    return None if config.engine == "openai" else count_parameters(config.model)


def _remove_temporary(pairs: Path) -> None:
    """Remove what killed processes, of an earlier run or of lost workers, wrote only in part."""
    for path in pairs.glob(".part-*.parquet.*"):
        if path.suffix != NOTE:
            path.unlink()


def _remove_damaged(pairs: Path) -> None:
    """Remove finished shards whose content has changed since they were written."""
    for path in pairs.glob("part-*.parquet"):
        if not is_as_noted(path):
            log.warning("%s is damaged: its shard runs again", path)
            path.unlink()


def _check_not_all_rejected(pairs: Path, stats: dict[str, Any]) -> None:
    """Raise UserError if every prompt was rejected, and remove the shards, so that the next run
    tries again.
    """
    rejected = stats["finish_reasons"].get("error", 0)
    if not rejected or rejected < stats["rows"]:
        return
    for path in pairs.glob("part-*.parquet"):
        path.unlink()
    reason = next(iter(stats["refused"]), "no reason given")
    raise UserError(
        f"synthesis.model: all {rejected} prompts were rejected ({reason}): fix the reason and run "
        "again; no output is kept"
    )


def _warn_if_few_joined(config: SynthesisConfig, stats: dict[str, Any]) -> None:
    """Warn if most prompts of later shots do not contain the earlier shots."""
    rows = stats["rows"] - stats["finish_reasons"].get("error", 0)
    later = rows - math.ceil(rows / config.shots)
    has_output = stats["pairs"] or stats["rewrites"]
    if config.format == RULE_BASED or not has_output or 2 * stats["joined"] >= later:
        return
    log.warning(
        "synthesis.shots=%d: only %d of %d later shots continue the earlier ones. Where those have "
        "pairs, they do not fit in synthesis.max_model_len=%d: increase it, or lower "
        "synthesis.max_document_tokens",
        *(config.shots, stats["joined"], later, config.max_model_len),
    )
