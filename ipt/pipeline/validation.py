"""Checks of a config before a model is loaded. Each raises UserError.

Checks of a model's weights, vocabulary and positions come last, because they import transformers.
"""

from pathlib import Path

from ipt import chat
from ipt.config import Config, SourceConfig, SynthesisConfig
from ipt.corpus.build import check_corpus
from ipt.distributed import launcher_number, rank
from ipt.errors import UserError
from ipt.evaluation.callback import check_during_training
from ipt.evaluation.contamination import check_data
from ipt.evaluation.run import check_config, check_tasks
from ipt.evaluation.task import load_tasks
from ipt.mixture.schedule import used_sources
from ipt.models import check_model, resolve_model
from ipt.pipeline.stages import PHASES, SOURCE_TEXTS, arm_config, source_corpus
from ipt.places import check_temporary, check_writable
from ipt.playground.server import check_page
from ipt.rendering.run import check_rendering
from ipt.synthesis.finetuning_data import check_tuning_source
from ipt.synthesis.formats.base import RULE_BASED
from ipt.synthesis.quality.filters import check_filters
from ipt.synthesis.run import check_synthesis
from ipt.tokens.source import KIND as STORE
from ipt.tokens.source import check_ids, open_source
from ipt.tokens.tokenize import check_tokens
from ipt.training.validation import check_launch, check_training


def check_places(config: Config) -> None:
    """Check that the folders of results can be written. Rank 0 checks for all processes."""
    if rank() > 0:
        return
    if config.output_dir:
        check_writable("output_dir", Path(config.output_dir))
    check_writable("stages_dir", Path(config.stages_dir))
    check_temporary()


def check_synthesize(config: Config) -> None:
    check_corpus(config.corpus)
    check_synthesis_stage(config)
    check_synthesizer(config.synthesis)


def check_tracking(config: Config) -> None:
    """The loggers, which import Lightning and W&B only if there are any."""
    if config.loggers and rank() == 0:
        from ipt.training.logger import check_loggers

        check_loggers(config)


def check_train(config: Config) -> None:
    _check_training_stage(config)
    check_tracking(config)
    check_launch(config.trainer)
    check_trained_model(config)


def _check_training_stage(config: Config) -> None:
    check_model(config.model)
    _check_mixture(config)
    check_training(config)
    if config.tasks:
        _check_tasks(config)
    check_during_training(config)


def check_evaluate(config: Config) -> None:
    check_model(config.model)
    if not config.tasks:
        raise UserError("tasks=[]: name at least one task or group, for example tasks=[ontology]")
    _check_tasks(config)
    check_tracking(config)
    check_scored_model(config.model, config)


def check_chat(config: Config) -> None:
    check_model(config.model)
    check_config(config.evaluation)
    chat.check_chat(config.chat, config.evaluation)
    check_scored_model(config.model, config)


def check_playground(config: Config) -> None:
    check_synthesis_stage(config)
    check_rendering(config.rendering)
    check_page(config.playground)
    check_chat(config)
    check_synthesizer(config.synthesis)
    for name in config.playground.models:
        check_scored_model(name, config)


def check_arms(config: Config) -> None:
    """Check the keys that select arms, seeds and stages."""
    if not config.arms:
        raise UserError(
            f"experiment {config.name} has no arms: train it with `python train.py "
            f"experiment={config.name}`"
        )
    if "start" in config.arms:
        raise UserError("arms.start: the base model has this name; choose another name for the arm")
    for key, known in (("stages", list(PHASES)), ("only", list(config.arms))):
        if unknown := [name for name in getattr(config, key) if name not in known]:
            raise UserError(f"{key}=[{unknown[0]}]: must be among {', '.join(known)}")
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: a seed occurs twice")


def check_reproduce(config: Config) -> None:
    check_arms(config)
    phases = config.stages or list(PHASES)
    scored = {"evaluation", "report"} & set(phases)
    arms = [arm_config(config, config.arms[name]) for name in config.only or config.arms]
    for arm in arms:
        _check_training_stage(arm)
        if scored and not arm.tasks:
            raise UserError(
                "tasks=[]: name tasks to evaluate the arms on, such as tasks=[medicine], or set "
                "stages=[synthesis,tokens,training]"
            )
        if arm.tasks:
            _check_tasks(arm)
        if "training" in phases:
            _check_processes(arm, phases)
    check_tracking(config)
    for arm in arms:
        check_trained_model(arm)


def check_trained_model(config: Config) -> None:
    """Check the model that is trained, its data, and whether it can be exported."""
    from ipt.export.folder import check_export
    from ipt.models.checks import check_weights, local_folder
    from ipt.models.limits import check_model_limits

    source = resolve_model(config.model)
    if not config.architecture:
        check_weights(source)
    lengths: dict[str, int | None] = {"mixture.seq_len": config.mixture.seq_len}
    if config.tasks:
        lengths["evaluation.max_length"] = config.evaluation.max_length
    check_model_limits(config.model, config.architecture, lengths)
    _check_store_ids(config)
    if local_folder(source) is not None:
        check_export(config)
    if "instruction" in used_sources(config.mixture):
        check_synthesizer(config.synthesis)


def check_scored_model(name: str, config: Config) -> None:
    """Check a model that is evaluated or used in a chat."""
    from ipt.models.checks import check_weights
    from ipt.models.limits import check_model_limits

    check_weights(resolve_model(name))
    check_model_limits(name, None, {"evaluation.max_length": config.evaluation.max_length})


def check_synthesizer(config: SynthesisConfig) -> None:
    """Check the weights of the synthesizer and its adapter, and its context window."""
    if config.format == RULE_BASED:
        return
    if config.engine == "openai":
        if config.tokenizer:
            check_model(config.tokenizer)
        return
    from ipt.models.checks import check_adapter, check_weights
    from ipt.models.limits import check_model_limits, check_window

    source = resolve_model(config.model)
    check_weights(source)
    if config.adapter:
        check_adapter(source, config.adapter)
    check_model_limits(config.model, None, {})
    check_window(config.model, "synthesis.max_model_len", config.max_model_len)


def _check_store_ids(config: Config) -> None:
    """Check that token stores of kind=store have only ids in the model's vocabulary."""
    from ipt.models.limits import model_limits

    for name in used_sources(config.mixture):
        source = config.mixture.sources.get(name)
        if source is None or source.kind != STORE:
            continue
        limits = model_limits(config.model, config.architecture)
        if limits is not None:
            check_ids(name, source, limits.vocabulary, config.tokens.cache_gib)


def _check_processes(config: Config, phases: list[str]) -> None:
    """Only the training stage can run in several processes."""
    if (launcher_number("WORLD_SIZE") or 1) > 1 and set(phases) - {"tokens", "training"}:
        raise UserError(
            f"stages=[{','.join(phases)}]: several processes were started, but only "
            "stages=[training] can use them"
        )
    check_launch(config.trainer, "-m ipt reproduce … stages=[training], others with one process")


def check_synthesis_stage(config: Config) -> None:
    """Check the settings of synthesis and filters, the engine, and the name of the model."""
    check_synthesis(config.synthesis)
    check_filters(config.filters)
    _check_overlap(config)
    if config.synthesis.format != RULE_BASED and config.synthesis.engine != "openai":
        check_model(config.synthesis.model)


def _check_overlap(config: Config) -> None:
    """Check the tasks to search for. The corpus cannot be searched for tasks made from it."""
    if not (config.corpus.overlap or config.filters.overlap):
        return
    tasks = config.decontamination.tasks or config.tasks
    if not tasks:
        raise UserError(
            "decontamination.tasks=[]: name evaluation tasks to search for, here or in tasks"
        )
    own = [task.name for task in load_tasks(tasks, config.data_dir) if task.needs_corpus]
    if config.corpus.overlap and own:
        mode = config.corpus.overlap
        raise UserError(
            f"corpus.overlap={mode}: the task {own[0]} is made from the corpus: name other tasks "
            "in decontamination.tasks"
        )


def _check_mixture(config: Config) -> None:
    check_tokens(config.tokens)
    sources = used_sources(config.mixture)
    if {"raw", "instruction"} & set(sources):
        check_corpus(config.corpus)
    if "instruction" in sources:
        check_synthesis_stage(config)
        check_rendering(config.rendering)
    for name in sorted(set(sources) - {"raw", "instruction"}):
        check_source(name, config)


def _check_tasks(config: Config) -> None:
    check_tasks(config.evaluation, config.tasks, data_dir=config.data_dir)
    for path in config.evaluation.contamination:
        check_data(path, config.model)


def check_source(name: str, config: Config) -> None:
    """Check a source of the mixture other than raw and instruction. Reads the first row of files,
    and the index of a token store.
    """
    source = named_source(name, config)
    if source.kind == STORE:
        open_source(name, source, config.model, config.tokens.cache_gib)
    elif source.kind in SOURCE_TEXTS:
        check_corpus(
            source_corpus(name, source),
            SOURCE_TEXTS[source.kind],
            section=f"mixture.sources.{name}",
        )
    else:
        check_tuning_source(name, source)


def named_source(name: str, config: Config) -> SourceConfig:
    """The config of a source. Raises UserError if there is none."""
    if name not in config.mixture.sources:
        raise UserError(
            f"mixture.ratios.{name}: no such source; add it with +mixture.sources.{name}.path=PATH"
        )
    return config.mixture.sources[name]
