"""The inputs of a training, and whether they are on this machine. Downloads nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ipt.config import Config, CorpusConfig
from ipt.corpus.build import check_corpus
from ipt.errors import UserError
from ipt.mixture.schedule import used_sources
from ipt.models import check_model
from ipt.pipeline.stages import SOURCE_TEXTS
from ipt.pipeline.validation import check_source, check_synthesis_stage, named_source
from ipt.rendering.run import check_rendering
from ipt.synthesis.formats.base import RULE_BASED
from ipt.tokens.source import KIND as STORE

HERE, FETCHED, MISSING = "here", "to be fetched", "missing"
# sources that are made from the corpus
PIPELINE = ("raw", "instruction")


class Input(NamedTuple):
    what: str
    where: str
    state: str  # HERE | FETCHED | MISSING
    problem: str = ""  # what is missing
    tokens: int | None = None  # of a finished token store


def training_inputs(config: Config) -> list[Input]:
    """Model, corpus, synthesizer and sources of the mixture. Raises UserError for a source in the
    ratios that the config does not describe.
    """
    sources = used_sources(config.mixture)
    inputs = [_model("tokenizer" if config.architecture else "model", config.model)]
    if set(PIPELINE) & set(sources):
        inputs.append(_corpus(config.corpus))
    if "instruction" in sources:
        inputs += _synthesis(config)
        inputs.append(
            _checked(
                "templates", config.rendering.templates, lambda: check_rendering(config.rendering)
            )
        )
    for name in sources:
        if name not in PIPELINE:
            inputs.append(_source(name, config))
    return inputs


def _model(what: str, name: str) -> Input:
    if (
        not name.startswith("embedded:")
        and not Path(name).exists()
        and name.count("/") == 1
        and name[0] not in "./~"
    ):
        return Input(what, name, FETCHED)
    return _checked(what, name, lambda: check_model(name))


def _corpus(config: CorpusConfig) -> Input:
    if config.kind == "hub":
        return Input("corpus", config.dataset or "", FETCHED)
    where = config.path or "ontologies " + ", ".join(config.ontologies)
    return _url("corpus", where) or _checked("corpus", where, lambda: check_corpus(config))


def _synthesis(config: Config) -> list[Input]:
    if config.synthesis.format == RULE_BASED:
        return [_checked("synthesis", "rules, no model", lambda: check_synthesis_stage(config))]
    settings = _checked(
        "synthesis", f"engine {config.synthesis.engine}", lambda: check_synthesis_stage(config)
    )
    if config.synthesis.engine == "openai":
        return [settings]
    return [settings, _model("synthesizer", config.synthesis.model)]


def _source(name: str, config: Config) -> Input:
    source, what = named_source(name, config), f"source {name}"
    if source.kind in SOURCE_TEXTS and source.dataset and not source.path:
        return Input(what, source.dataset, FETCHED)
    if remote := _url(what, source.path):
        return remote
    if source.kind == STORE:
        return _store(what, source.path)
    return _checked(what, source.path, lambda: check_source(name, config))


def _store(what: str, path: str) -> Input:
    """A token store on this machine. Its tokenizer is not checked, as it may not be here yet."""
    from ipt.tokens.store import TokenStore

    found = _checked(what, path, lambda: TokenStore.open(path))
    return found._replace(tokens=TokenStore.open(path).n_tokens) if found.state == HERE else found


def _url(what: str, where: str) -> Input | None:
    return Input(what, where, FETCHED) if "://" in where else None


def _checked(what: str, where: str, check: Callable[[], object]) -> Input:
    try:
        check()
    except UserError as error:
        return Input(what, where, MISSING, str(error))
    return Input(what, where, HERE)
