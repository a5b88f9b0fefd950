"""Everything that can be known to be wrong before a model is loaded, in one line each."""

from ipt.config import Config, CorpusConfig
from ipt.corpus.build import check_corpus
from ipt.evaluation.run import check_tasks
from ipt.evaluation.task import load_tasks
from ipt.experiment.pipeline import arm_config
from ipt.mixture.plan import resolve_ratios
from ipt.models import check_model
from ipt.rendering.run import check_rendering
from ipt.synthesis.filtering import OVERLAP_MODES, check_filters
from ipt.synthesis.prompts import RULE_BASED
from ipt.synthesis.run import check_synthesis
from ipt.synthesis.tuning import check_tuning_source
from ipt.training.check import check_training


def check_synthesize(config: Config) -> None:
    check_corpus(config.corpus)
    _check_synthesis(config)


def check_train(config: Config) -> None:
    check_model(config.model)
    _check_mixture(config)
    check_training(config)
    if config.tasks:
        check_tasks(config.evaluation, config.tasks)


def check_evaluate(config: Config) -> None:
    check_model(config.model)
    if not config.tasks:
        raise ValueError("tasks=[]: name at least one task or group, for example tasks=[ontology]")
    check_tasks(config.evaluation, config.tasks)


def check_reproduce(config: Config) -> None:
    if not config.arms:
        raise ValueError(f"experiment {config.name} has no arms: train it with `python train.py experiment={config.name}`")
    for changes in config.arms.values():
        check_train(arm_config(config, changes))


def _check_synthesis(config: Config) -> None:
    check_synthesis(config.synthesis)
    check_filters(config.filters)
    _check_overlap(config)
    if config.synthesis.format != RULE_BASED and config.synthesis.engine != "openai":
        check_model(config.synthesis.model)


def _check_overlap(config: Config) -> None:
    """Tasks to look for must be there; those that ask about this very corpus cannot be looked for in its documents."""
    if not (config.corpus.overlap or config.filters.overlap):
        return
    if config.corpus.overlap not in (None, *OVERLAP_MODES):
        raise ValueError(f"corpus.overlap={config.corpus.overlap}: must be one of {', '.join(OVERLAP_MODES)}, or null")
    tasks = config.decontamination.tasks or config.tasks
    if not tasks:
        raise ValueError("decontamination.tasks=[]: name the evaluation tasks to look for, or name some in tasks")
    own = [task.name for task in load_tasks(tasks) if task.needs_corpus]
    if config.corpus.overlap and own:
        mode = config.corpus.overlap
        raise ValueError(f"corpus.overlap={mode}: {own[0]} is made from the corpus itself: name others in decontamination.tasks")


def _check_mixture(config: Config) -> None:
    ratios = {name for name, ratio in resolve_ratios(config.mixture.ratios).items() if ratio > 0}
    if ratios & {"raw", "instruction"}:
        check_corpus(config.corpus)
    if "instruction" in ratios:
        _check_synthesis(config)
        check_rendering(config.rendering)
    for name in sorted(ratios - {"raw", "instruction"}):
        source = config.mixture.sources.get(name)
        if source is None:
            raise ValueError(f"mixture.ratios.{name}: no such source; others than raw and instruction need mixture.sources.{name}.path")
        if source.kind == "texts":
            check_corpus(CorpusConfig(kind="files", path=source.path, text_field=source.text_field))
        else:
            check_tuning_source(name, source)
