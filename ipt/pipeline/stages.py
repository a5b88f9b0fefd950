"""The stages of one config in dependency order. Finished stages are cached."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from omegaconf import DictConfig, OmegaConf

from ipt.config import Config, CorpusConfig, SourceConfig, key_settings, to_config
from ipt.corpus.decontaminate import Overlap
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import hash_file
from ipt.mixture.schedule import schedule_points
from ipt.models import model_identity
from ipt.pipeline.provenance import arm_record
from ipt.rendering.instructions import instruction_text
from ipt.stage import Stage, StageId, check_outputs, find_stage, run_stage
from ipt.sweeps.job import report_training
from ipt.training.run_key import trainer_settings

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from ipt.corpus.documents import RowText
    from ipt.evaluation.callback import DuringTraining
    from ipt.evaluation.task import Task
    from ipt.synthesis.finetuning_data import Lengths
    from ipt.tokens.source import GivenStore

Json = dict[str, Any]
Work = Callable[[Path], Json]
# what the key `stages` may name -> names of the stages that are run
PHASES: dict[str, tuple[str, ...]] = {
    "synthesis": ("corpus", "synthesis", "filters"),
    "tokens": ("corpus", "texts", "rendering", "tokens"),
    "training": ("training",),
    "evaluation": ("corpus", "contamination", "evaluation"),
    "report": (),
}
# kind of a source that is read as a corpus -> what makes the text of a row
SOURCE_TEXTS: "dict[str, RowText | None]" = {"texts": None, "instructions": instruction_text}
# name of a stage -> what users read
TITLES = {
    "corpus": "build corpus",
    "texts": "build texts",
    "synthesis": "synthesize pairs",
    "filters": "filter pairs",
    "rendering": "render texts",
    "tokens": "tokenize",
    "training": "train",
    "contamination": "search for task items in",
    "evaluation": "evaluate",
}

log = logging.getLogger(__name__)


class StageNotFinished(Exception):
    """A stage is not finished, and this command may not run it."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


# Results of the stages
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus(Stage):
    @property
    def texts(self) -> Path:
        """Folder of part-*.parquet with the documents."""
        return self.folder / "documents"


@dataclass(frozen=True)
class Pairs(Stage):
    """Result of the synthesis and of the filters."""

    @property
    def pairs(self) -> Path:
        """Folder of part-*.parquet with the documents and their pairs."""
        return self.folder / "pairs"


@dataclass(frozen=True)
class Texts(Stage):
    """Result of rendering, and of sources that tune a synthesizer."""

    @property
    def texts(self) -> Path:
        """Folder of part-*.parquet with the pre-training texts."""
        return self.folder / "texts"


@dataclass(frozen=True)
class Tokens(Stage):
    """A token store."""


@dataclass(frozen=True)
class Training(Stage):
    @property
    def export(self) -> Path:
        """Folder of the trained model in Hugging Face format."""
        return self.folder / "export"


@dataclass(frozen=True)
class Contamination(Stage):
    """Which items of the tasks occur in a token store or in texts."""


@dataclass(frozen=True)
class Evaluation(Stage):
    """Scores of a model: results.json and predictions."""


Result = TypeVar("Result", bound=Stage)


class Key(NamedTuple):
    """What the cache key of a stage depends on, with the folder of cached stages."""

    config: Json
    inputs: Mapping[str, str]
    seed: int
    stages_dir: Path


# Log lines
# ----------------------------------------------------------------------------------------------


def title(stage: StageId) -> str:
    """What users read, such as "train vanilla"."""
    return f"{TITLES[stage.name]} {stage.variant}".rstrip()


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


@dataclass
class JobLog:
    """Logs each stage of a job once, with its number. `planned`: the expected number of stages."""

    planned: int = 0
    folders: set[Path] = field(default_factory=set)
    begun: int = 0

    def begin(self, stage: StageId, details: str) -> str:
        """Log the start of a stage. Returns the title for `end`."""
        heading = self._heading(stage)
        log.info(f"{heading}: {details}" if details else heading)
        return heading

    def end(self, heading: str, stage: Stage) -> None:
        self.folders.add(stage.folder)
        outcome = (
            "done by another process" if stage.reused else f"done in {duration(stage.seconds)}"
        )
        log.info(f"{heading}: {outcome}, {stage.folder}")

    def cached(self, stage: StageId, found: Stage) -> None:
        if found.folder not in self.folders:
            self.folders.add(found.folder)
            log.info(f"{self._heading(stage)}: cached, {found.folder}", extra={"style": "dim"})

    def _heading(self, stage: StageId) -> str:
        self.begun += 1
        return f"[{self.begun}/{max(self.begun, self.planned)}] {title(stage)}"


# Stages
# ----------------------------------------------------------------------------------------------


@dataclass
class Stages:
    """Runs the stages of one config, and keeps their results in `done`, in order.

    `only`: names of the stages that may run; other stages raise StageNotFinished unless they are
    cached. None: all may run. `before_work` is called before a stage runs, and not if every stage
    is cached. `log`: where stages are announced; None: nowhere.
    """

    config: Config
    done: dict[StageId, Stage] = field(default_factory=dict)
    only: Collection[str] | None = None
    before_work: Callable[[], None] = lambda: None
    log: JobLog | None = None
    _checked: set[Path] = field(default_factory=set)

    def _run(
        self,
        kind: type[Result],
        stage: StageId,
        work: Work,
        settings: Json,
        inputs: Mapping[str, str],
        *,
        folder: Path | None = None,
        collective: bool = False,
        details: str = "",
        seed: int | None = None,
    ) -> Result:
        known = self.done.get(stage)
        if known is None:
            seed = self.config.seed if seed is None else seed
            key = Key(settings, inputs, seed, Path(self.config.stages_dir))

            def checked_work(output: Path) -> Json:
                if rank() == 0:
                    self.check(
                        made for made in self.done.values() if made.digest in inputs.values()
                    )
                return work(output)

            found = self._stage(stage, folder, key, checked_work, collective, details)
            known = self.done[stage] = kind(**vars(found))
        assert isinstance(known, kind)
        return known

    def check(self, stages: Iterable[Stage]) -> None:
        """Raises UserError if a file of reused `stages` was changed. Each stage is read once."""
        for stage in stages:
            if stage.reused and stage.folder not in self._checked:
                check_outputs(stage)
                self._checked.add(stage.folder)

    def _stage(
        self,
        stage: StageId,
        folder: Path | None,
        key: Key,
        work: Work,
        collective: bool,
        details: str,
    ) -> Stage:
        finished = find_stage(stage.name, folder, **key._asdict())
        if finished is not None:
            if self.log:
                self.log.cached(stage, finished)
            return finished
        if self.only is not None and stage.name not in self.only:
            raise StageNotFinished(stage.name)
        self.before_work()
        heading = self.log.begin(stage, details) if self.log else ""
        made = run_stage(stage.name, folder, work, **key._asdict(), collective=collective)
        if self.log:
            self.log.end(heading, made)
        return made

    def corpus(self) -> Corpus:
        return self._documents(self.config.corpus, StageId("corpus"))

    def synthesis(self, folder: Path | None = None) -> Pairs:
        from ipt.synthesis.formats.base import RULE_BASED
        from ipt.synthesis.run import synthesis_inputs, synthesis_settings

        corpus, config = self.corpus(), self.config.synthesis

        def work(output: Path) -> Json:
            from ipt.synthesis.run import synthesize

            return synthesize(config, corpus.texts, output, self.config.seed)

        inputs = {"corpus": corpus.digest, **synthesis_inputs(config)}
        rules = config.format == RULE_BASED
        return self._run(
            Pairs,
            StageId("synthesis"),
            work,
            synthesis_settings(config),
            inputs,
            folder=folder,
            details="rules, no model" if rules else f"{config.model}, engine {config.engine}",
        )

    def pairs(self, folder: Path | None = None) -> Pairs:
        """The pairs that pass the filters; without filters the result of the synthesis."""
        from ipt.synthesis.dataset_card import write_card
        from ipt.synthesis.quality.filters import filter_pairs, filter_settings, is_active
        from ipt.synthesis.run import synthesis_settings

        synthesis, config, seed = self.synthesis(), self.config.filters, self.config.seed
        if not is_active(config):
            return synthesis
        settings = filter_settings(config)

        def work(output: Path) -> Json:
            overlap = self._overlap(self.corpus().folder) if config.overlap else None
            stats = filter_pairs(config, synthesis.pairs, output, seed, overlap)
            shown = {**synthesis_settings(self.config.synthesis), "filters": settings}
            write_card(output, stats, shown, seed)
            return stats

        inputs = {"synthesis": synthesis.digest}
        if config.overlap:
            inputs |= self._overlap_inputs()
        return self._run(Pairs, StageId("filters"), work, settings, inputs, folder=folder)

    def rendering(self) -> Texts:
        from ipt.rendering.pools import pools_digest

        pairs, config = self.pairs(), self.config.rendering

        def work(output: Path) -> Json:
            from ipt.rendering.run import render

            return render(config, pairs.pairs, output, self.config.seed)

        inputs = {"synthesis": pairs.digest, "templates": pools_digest(config.templates)}
        stage = StageId("rendering", config.arrangement)
        return self._run(Texts, stage, work, key_settings(config), inputs)

    def store(self, source: str) -> "Tokens | GivenStore":
        """The token store of a source of the mixture. For a source of kind=store it is the store
        that the config names.
        """
        from ipt.tokens.source import KIND, given_store
        from ipt.tokens.tokenize import store_settings

        config, model = self.config.tokens, self.config.model
        given = self.config.mixture.sources.get(source)
        if given is not None and given.kind == KIND:
            return given_store(source, given, model, config.cache_gib)
        texts = self._texts(source)

        def work(output: Path) -> Json:
            from ipt.tokens.tokenize import tokenize_texts

            return tokenize_texts(config, texts.texts, model, output, source)

        inputs = {"texts": texts.digest, "tokenizer": model_identity(model, tokenizer_only=True)}
        return self._run(Tokens, self._tokens_id(source), work, store_settings(config), inputs)

    def training(self, variant: str = "", folder: Path | None = None) -> Training:
        config = _with_own_seed(self.config)
        stage = StageId("training", variant)
        points = schedule_points(config.mixture)
        stores = {source: self.store(source) for source in points[0].ratios}
        loggers: list[Logger] = []
        tracking = ExitStack()

        def work(output: Path) -> Json:
            from ipt.export.folder import check_export
            from ipt.export.huggingface import export
            from ipt.pipeline.tracking.lineage import log_pairs
            from ipt.training.logger import open_loggers
            from ipt.training.train import train

            report_training(output)
            check_export(config)
            pairs = self.pairs().pairs if "instruction" in stores else None
            folders = {source: store.folder for source, store in stores.items()}

            def make_loggers() -> "list[Logger]":
                loggers.extend(tracking.enter_context(open_loggers(config, str(stage), output)))
                if pairs is not None:
                    log_pairs(loggers, pairs, config.seed)
                return loggers

            score = self._during_training(output)
            return train(config, folders, output, make_loggers, score, export)

        settings: Json = {"model": config.model, "architecture": config.architecture}
        for part in ("mixture", "optimizer", "lr_scheduler", "lora"):
            settings[part] = key_settings(getattr(config, part))
        settings["trainer"] = trainer_settings(config.trainer)
        settings["mixture"]["schedule"] = [point._asdict() for point in points]
        inputs = {source: store.digest for source, store in stores.items()}
        inputs["model"] = model_identity(config.model)
        steps = config.trainer.max_steps
        tokens = steps * config.trainer.global_batch_size * config.mixture.seq_len
        with tracking:
            result = self._run(
                Training,
                stage,
                work,
                settings,
                inputs,
                folder=folder,
                collective=True,
                details=f"{steps:,} steps, {tokens:,} tokens",
                seed=config.seed,
            )
            if loggers:
                from ipt.pipeline.tracking.lineage import log_training

                record = arm_record(str(stage), config, self.done, result)
                log_training(config, loggers, list(self.done.values()), result, record)
        return result

    def contamination(self, source: str, data: str, corpus: Corpus | None) -> Contamination:
        """Search the token store or the texts at the path `data` for items of the tasks. `source`
        is its name in logs and reports.
        """
        from ipt.evaluation.contamination import data_digest, find_contamination, is_looked_for
        from ipt.evaluation.task import load_tasks, task_digests
        from ipt.evaluation.task_types.registry import kind_of

        tasks = load_tasks(self.config.tasks, self.config.data_dir)
        tasks = [task for task in tasks if is_looked_for(task)]
        ngram = self.config.decontamination.ngram

        def work(output: Path) -> Json:
            folder = corpus.folder if corpus else None
            items = {task.name: kind_of(task).read(task, folder) for task in tasks}
            return find_contamination(items, data, self.config.model, output, ngram)

        inputs = {"data": data_digest(data), **task_digests(tasks)}
        if corpus:
            inputs["corpus"] = corpus.digest
        stage = StageId("contamination", source)
        return self._run(Contamination, stage, work, {"ngram": ngram}, inputs)

    def evaluation(
        self,
        model: str,
        identity: str,
        variant: str = "",
        folder: Path | None = None,
        trained: bool = False,
    ) -> Evaluation:
        """Score `model`. `trained`: this config trains the model, so the token stores of the
        training are searched for items of the tasks.
        """
        from ipt.evaluation.task import load_tasks, task_digests

        config, tasks = self.config.evaluation, load_tasks(self.config.tasks, self.config.data_dir)
        corpus = self.corpus() if any(task.needs_corpus for task in tasks) else None
        data = {path: path for path in config.contamination}
        if trained:
            for source in schedule_points(self.config.mixture)[0].ratios:
                data[f"tokens {source}"] = str(self.store(source).folder)
        found = [self.contamination(name, path, corpus) for name, path in data.items()]

        def work(output: Path) -> Json:
            from ipt.evaluation.contamination import load_contaminated
            from ipt.evaluation.run import evaluate

            folders = [stage.folder for stage in found]
            contaminated = load_contaminated(folders, tasks) if found else None
            source = corpus.folder if corpus else None
            names, data_dir = self.config.tasks, self.config.data_dir
            return evaluate(config, model, names, source, output, data_dir, contaminated)

        inputs = {"model": identity, **task_digests(tasks)}
        if corpus:
            inputs["corpus"] = corpus.digest
        inputs |= {f"contamination {number}": stage.digest for number, stage in enumerate(found)}
        stage = StageId("evaluation", variant)
        result = self._run(
            Evaluation,
            stage,
            work,
            key_settings(config),
            inputs,
            folder=folder,
            collective=True,
            details=f"{len(tasks)} tasks",
        )
        logged = result.reused and (result.folder / ".wandb_id").exists()
        if self.config.loggers and not logged and rank() == 0:
            from ipt.pipeline.tracking.evaluation_log import log_evaluation

            scored = replace(_with_own_seed(self.config), model=model)
            log_evaluation(scored, result.folder, identity, str(stage))
        return result

    def _during_training(self, output: Path) -> "DuringTraining | None":
        """What scores the model during training, or None. It does not change the training."""
        from ipt.evaluation.callback import DuringTraining, scored_tasks
        from ipt.evaluation.task import load_tasks

        if self.config.evaluation.during_training.every_n_train_steps is None:
            return None
        tasks = load_tasks(scored_tasks(self.config), self.config.data_dir)
        needs_corpus = any(task.needs_corpus for task in tasks)
        return DuringTraining(self.config, self.corpus().folder if needs_corpus else None, output)

    def _texts(self, source: str) -> Corpus | Texts:
        """The texts of a source."""
        if source == "raw":
            return self.corpus()
        if source == "instruction":
            return self.rendering()
        config = self.config.mixture.sources[source]
        if config.kind in SOURCE_TEXTS:
            stage = StageId("corpus", source)
            return self._documents(source_corpus(source, config), stage, SOURCE_TEXTS[config.kind])
        return self._tuning_texts(source, config)

    def _documents(
        self, config: CorpusConfig, stage: StageId, row_text: "RowText | None" = None
    ) -> Corpus:
        from ipt.corpus.build import build_corpus

        known = self.done.get(stage)
        if isinstance(known, Corpus):  # the digests of large files take long
            return known

        def work(output: Path) -> Json:
            overlap = self._overlap(None) if config.overlap else None
            remove = config.overlap == "remove"
            return build_corpus(config, self.config.seed, output, overlap, remove, row_text)

        inputs = _corpus_inputs(config)
        if config.overlap:
            inputs |= self._overlap_inputs()
        settings = key_settings(config)
        if row_text:
            settings["row_text"] = row_text.__name__
        where = config.path or config.dataset or "ontologies " + ", ".join(config.ontologies)
        return self._run(Corpus, stage, work, settings, inputs, details=where)

    def _overlap(self, corpus: Path | None) -> Overlap:
        """Searches for items of evaluation tasks; `corpus` is the folder of the corpus stage, which
        some tasks are made from.
        """
        from ipt.evaluation.task_types.registry import item_texts

        texts = {task.name: item_texts(task, corpus) for task in self._overlap_tasks()}
        return Overlap(texts, self.config.decontamination.ngram)

    def _overlap_inputs(self) -> dict[str, str]:
        from ipt.evaluation.task import task_digests

        ngram = str(self.config.decontamination.ngram)
        return {**task_digests(self._overlap_tasks()), "ngram": ngram}

    def _overlap_tasks(self) -> "list[Task]":
        from ipt.evaluation.task import load_tasks

        names = self.config.decontamination.tasks or self.config.tasks
        return load_tasks(names, self.config.data_dir)

    def _tuning_texts(self, source: str, config: SourceConfig) -> Texts:
        from ipt.synthesis.finetuning_data import build_tuning_texts, data_sets

        def work(output: Path) -> Json:
            lengths = self._lengths() if config.max_tokens else None
            return build_tuning_texts(config, source, output, self.config.seed, lengths)

        settings = key_settings(config) | {"source": source}
        inputs: dict[str, str] = {}
        for name, files in data_sets(source, config).items():
            inputs |= {f"{name}/{file.name}": hash_file(file) for file in files}
        if config.max_tokens:
            inputs["tokenizer"] = model_identity(self.config.model, tokenizer_only=True)
        return self._run(Texts, StageId("texts", source), work, settings, inputs)

    def _lengths(self) -> "Lengths":
        """Counts the tokens of each tuning text, as in its token store."""
        from ipt.models import load_tokenizer
        from ipt.tokens.encode import Encoder, encoding_of

        encoder = Encoder(encoding_of(load_tokenizer(self.config.model), self.config.tokens))

        def lengths(texts: Iterable[list[dict[str, str]]]) -> list[int]:
            documents = encoder.encode({"examples": text} for text in texts)
            return [len(document.tokens) for document in documents]

        return lengths

    def _tokens_id(self, source: str) -> StageId:
        if source == "instruction":
            return StageId("tokens", f"{source} {self.config.rendering.arrangement}")
        return StageId("tokens", source)


def source_corpus(source: str, config: SourceConfig) -> CorpusConfig:
    """The corpus of a source of texts, without held-out documents. Raises UserError unless the
    source has either a path or a dataset.
    """
    if bool(config.path) == bool(config.dataset):
        raise UserError(
            f"mixture.sources.{source}: set either path (files) or dataset (a dataset of the hub)"
        )
    return CorpusConfig(
        kind="files" if config.path else "hub",
        path=config.path or None,
        dataset=config.dataset,
        subset=config.subset,
        split=config.split,
        text_field=config.text_field,
        template=config.template,
        held_out_fraction=0.0,
    )


def arm_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config of an arm: that of the recipe with the arm's changes. Raises the same errors as
    the command line.
    """
    merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.create(dict(changes)))
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _with_own_seed(config: Config) -> Config:
    """The config of a training: its seed is `trainer.seed`, if that is set."""
    if config.trainer.seed is None:
        return config
    return replace(config, seed=config.trainer.seed, trainer=replace(config.trainer, seed=None))


def _corpus_inputs(config: CorpusConfig) -> dict[str, str]:
    """Digests of the files of a corpus, or the version of the ontology package. Datasets of the hub
    have none.
    """
    from ipt.corpus.build import input_digests

    if config.kind == "ontology":
        return {"package": version("cellxgene-ontology-guide")}
    return input_digests(config)
