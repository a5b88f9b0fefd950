"""The way through the house: each stage takes the finished stages before it, and is skipped when
its key is known.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ipt import distributed
from ipt.config import Config, CorpusConfig, SourceConfig, to_config
from ipt.console import console
from ipt.corpus.overlap import Overlap
from ipt.distributed import rank
from ipt.files import hash_file, read_json
from ipt.mixture.schedule import schedule_points
from ipt.models import model_identity
from ipt.pipeline.records import arm_record
from ipt.pipeline.sources import SOURCE_TEXTS, source_corpus
from ipt.stage import Stage, check_outputs, find_stage, run_stage
from ipt.sweeps.job import job_result, report_result, report_training
from ipt.training.run_key import trainer_settings

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from ipt.corpus.documents import RowText
    from ipt.evaluation.callback import DuringTraining
    from ipt.evaluation.task import Task
    from ipt.synthesis.finetuning_data import Lengths
    from ipt.tokens.source import GivenStore

Json = dict[str, Any]
PHASES: dict[str, tuple[str, ...]] = {  # what `stages` may name -> stages that are worked on
    "synthesis": ("corpus", "synthesis", "filters"),
    "tokens": ("corpus", "texts", "rendering", "tokens"),
    "training": ("training",),
    "evaluation": ("corpus", "contamination", "evaluation"),
    "report": (),
}


class StageNotFinished(Exception):
    """There is work to do, and it was not to be done."""


@dataclass
class Stages:
    """Runs the stages of one config; remembers them, in order, for the report.

    `only`: names of the stages that may be worked on; of others that are not finished it raises
    Unfinished. None: all. `before_work` is called before a stage is worked on, and not at all where
    every stage is cached.
    """

    config: Config
    done: list[tuple[str, Stage]] = field(default_factory=list)
    only: Collection[str] | None = None
    before_work: Callable[[], None] = lambda: None
    _checked: set[Path] = field(default_factory=set)

    def _run(
        self,
        name: str,
        work: Callable[[Path], Json],
        config: Json,
        inputs: Mapping[str, str],
        folder: Path | None = None,
        label: str = "",
        collective: bool = False,
        seed: int | None = None,
    ) -> Stage:
        known = next((stage for known, stage in self.done if known == (label or name)), None)
        if known is not None:
            return known
        identity: Json = {
            "config": config,
            "inputs": inputs,
            "stages_dir": Path(self.config.stages_dir),
        }
        identity["seed"] = self.config.seed if seed is None else seed
        stage = self._stage(name, folder, identity, self._on_whole_inputs(work, inputs), collective)
        self.done.append((label or name, stage))
        return stage

    def _on_whole_inputs(
        self, work: Callable[[Path], Json], inputs: Mapping[str, str]
    ) -> Callable[[Path], Json]:
        """`work` that first makes sure of the stages it reads: what was finished before may have
        been damaged since.
        """

        def checked(output: Path) -> Json:
            if rank() == 0:
                self.check(stage for _, stage in self.done if stage.digest in inputs.values())
            return work(output)

        return checked

    def check(self, stages: Iterable[Stage]) -> None:
        """Raises UserError naming the files of reused `stages` that are not what was written; each
        stage is read once.
        """
        for stage in stages:
            if stage.reused and stage.folder not in self._checked:
                check_outputs(stage)
                self._checked.add(stage.folder)

    def _stage(
        self,
        name: str,
        folder: Path | None,
        identity: Json,
        work: Callable[[Path], Json],
        collective: bool,
    ) -> Stage:
        if self.only is None or name in self.only:
            if find_stage(name, folder, **identity) is None:
                self.before_work()
            return run_stage(name, folder, work, **identity, collective=collective)
        stage = find_stage(name, folder, **identity)
        if stage is None:
            raise StageNotFinished(name)
        return stage

    def corpus(self) -> Stage:
        return self._documents(self.config.corpus, "corpus")

    def synthesis(self, folder: Path | None = None) -> Stage:
        from ipt.synthesis.run import synthesis_inputs, synthesis_settings

        corpus, config = self.corpus(), self.config.synthesis

        def work(output: Path) -> Json:
            from ipt.synthesis.run import synthesize

            return synthesize(config, corpus.folder / "documents", output, self.config.seed)

        inputs = {"corpus": corpus.digest, **synthesis_inputs(config)}
        return self._run("synthesis", work, synthesis_settings(config), inputs, folder)

    def pairs(self, folder: Path | None = None) -> Stage:
        """What the filters leave of the synthesis, or the synthesis itself where there are none."""
        from ipt.synthesis.dataset_card import write_card
        from ipt.synthesis.quality.filters import filter_pairs, filter_settings, is_active
        from ipt.synthesis.run import synthesis_settings

        synthesis, config = self.synthesis(), self.config.filters
        if not is_active(config):
            return synthesis
        settings = filter_settings(config)

        def work(output: Path) -> Json:
            overlap = self._overlap(self.corpus().folder) if config.overlap else None
            stats = filter_pairs(
                config, synthesis.folder / "pairs", output, self.config.seed, overlap
            )
            write_card(
                output,
                stats,
                {**synthesis_settings(self.config.synthesis), "filters": settings},
                self.config.seed,
            )
            return stats

        inputs = {
            "synthesis": synthesis.digest,
            **(self._overlap_inputs() if config.overlap else {}),
        }
        return self._run("filters", work, settings, inputs, folder)

    def rendering(self) -> Stage:
        from ipt.rendering.pools import pools_digest

        pairs, config = self.pairs(), self.config.rendering

        def work(output: Path) -> Json:
            from ipt.rendering.run import render

            return render(config, pairs.folder / "pairs", output, self.config.seed)

        inputs = {"synthesis": pairs.digest, "templates": pools_digest(config.templates)}
        settings = asdict(config) | {"workers": None}  # it changes nothing
        return self._run(
            "rendering", work, settings, inputs, label=f"rendering {config.arrangement}"
        )

    def store(self, source: str) -> "Stage | GivenStore":
        """The token store of a source of the mixture: made of its texts, or the finished one that
        the source names.
        """
        from ipt.tokens.source import KIND, given_store
        from ipt.tokens.tokenize import store_settings

        config, model, given = (
            self.config.tokens,
            self.config.model,
            self.config.mixture.sources.get(source),
        )
        if given is not None and given.kind == KIND:
            return given_store(source, given, model, config.cache_gib)
        texts, digest = self._texts(source)

        def work(output: Path) -> Json:
            from ipt.tokens.tokenize import tokenize_texts

            return tokenize_texts(config, texts, model, output, source)

        inputs = {"texts": digest, "tokenizer": model_identity(model, tokenizer_only=True)}
        return self._run(
            "tokens", work, store_settings(config), inputs, label=f"tokens {self._label(source)}"
        )

    def training(self, name: str = "training", folder: Path | None = None) -> Stage:
        config = _with_own_seed(self.config)
        points = schedule_points(config.mixture)
        stores = {source: self.store(source) for source in points[0].ratios}
        loggers: list[Logger] = []
        tracking = ExitStack()

        def work(output: Path) -> Json:
            from ipt.pipeline.tracking.lineage import log_pairs
            from ipt.training.logger import open_loggers
            from ipt.training.train import train

            report_training(output)
            pairs = self.pairs().folder / "pairs" if "instruction" in stores else None
            folders = {source: store.folder for source, store in stores.items()}

            def make_loggers() -> "list[Logger]":
                loggers.extend(tracking.enter_context(open_loggers(config, name, output)))
                if pairs is not None:
                    log_pairs(loggers, pairs, config.seed)
                return loggers

            return train(config, folders, output, make_loggers, self._during_training(output))

        settings: Json = {"model": config.model, "architecture": config.architecture}
        settings |= {
            part: asdict(getattr(config, part))
            for part in ("mixture", "optimizer", "lr_scheduler", "lora")
        }
        settings["trainer"] = trainer_settings(config.trainer)
        # What the sources hold is in the inputs; ratios are kept as they were resolved.
        settings["mixture"] |= {
            "ratios": {},
            "schedule": [point._asdict() for point in points],
            "sources": {},
        }
        inputs = {source: store.digest for source, store in stores.items()} | {
            "model": model_identity(config.model)
        }
        with tracking:
            stage = self._run(
                "training",
                work,
                settings,
                inputs,
                folder,
                label=name,
                collective=True,
                seed=config.seed,
            )
            if loggers:
                from ipt.pipeline.tracking.lineage import log_training

                record = arm_record(name, config, self.done, stage)
                log_training(config, loggers, [made for _, made in self.done], stage, record)
        return stage

    def contamination(self, data: str, corpus: Stage | None) -> Stage:
        """Which items of the tasks are in the token store or the texts at the path `data`."""
        from ipt.evaluation.contamination import data_digest, find_contamination, is_looked_for
        from ipt.evaluation.task import load_tasks, task_digests
        from ipt.evaluation.task_types.registry import kind_of

        tasks = [
            task
            for task in load_tasks(self.config.tasks, self.config.data_dir)
            if is_looked_for(task)
        ]
        ngram = self.config.decontamination.ngram

        def work(output: Path) -> Json:
            items = {
                task.name: kind_of(task).read(task, corpus.folder if corpus else None)
                for task in tasks
            }
            return find_contamination(items, data, self.config.model, output, ngram)

        inputs = {
            "data": data_digest(data),
            **task_digests(tasks),
            **({"corpus": corpus.digest} if corpus else {}),
        }
        return self._run(
            "contamination", work, {"ngram": ngram}, inputs, label=f"contamination {data}"
        )

    def evaluation(
        self,
        model: str,
        identity: str,
        name: str = "evaluation",
        folder: Path | None = None,
        trained: bool = False,
    ) -> Stage:
        """`trained`: the model comes from this config's training, so its token stores are looked
        through for the tasks' items.
        """
        from ipt.evaluation.task import load_tasks, task_digests

        config, tasks = self.config.evaluation, load_tasks(self.config.tasks, self.config.data_dir)
        corpus = self.corpus() if any(task.needs_corpus for task in tasks) else None
        data = [*config.contamination, *(self._trained_on() if trained else ())]
        found = [self.contamination(path, corpus) for path in data]

        def work(output: Path) -> Json:
            from ipt.evaluation.contamination import load_contaminated
            from ipt.evaluation.run import evaluate

            folder = corpus.folder if corpus else None
            contaminated = (
                load_contaminated([stage.folder for stage in found], tasks) if found else None
            )
            return evaluate(
                config, model, self.config.tasks, folder, output, self.config.data_dir, contaminated
            )

        inputs = {
            "model": identity,
            **task_digests(tasks),
            **({"corpus": corpus.digest} if corpus else {}),
        }
        inputs |= {f"contamination {number}": stage.digest for number, stage in enumerate(found)}
        settings = {
            key: value
            for key, value in asdict(config).items()
            if key not in ("during_training", "contamination")
        }
        stage = self._run("evaluation", work, settings, inputs, folder, label=name, collective=True)
        logged = stage.reused and (stage.folder / ".wandb_id").exists()
        if self.config.loggers and not logged and rank() == 0:
            from ipt.pipeline.tracking.evaluation_log import log_evaluation

            log_evaluation(
                replace(_with_own_seed(self.config), model=model), stage.folder, identity, name
            )
        return stage

    def _during_training(self, output: Path) -> "DuringTraining | None":
        """What scores the model of a training while it goes on, if the config asks for that. It
        changes nothing in the training.
        """
        from ipt.evaluation.callback import DuringTraining, scored_tasks
        from ipt.evaluation.task import load_tasks

        if self.config.evaluation.during_training.every_n_train_steps is None:
            return None
        needs_corpus = any(
            task.needs_corpus
            for task in load_tasks(scored_tasks(self.config), self.config.data_dir)
        )
        return DuringTraining(self.config, self.corpus().folder if needs_corpus else None, output)

    def _trained_on(self) -> list[str]:
        """Where the token stores are that the training reads."""
        return [
            str(self.store(source).folder)
            for source in schedule_points(self.config.mixture)[0].ratios
        ]

    def _texts(self, source: str) -> tuple[Path, str]:
        """Folder of part-*.parquet with the texts of a source, and its digest."""
        if source == "raw":
            corpus = self.corpus()
            return corpus.folder / "documents", corpus.digest
        if source == "instruction":
            rendering = self.rendering()
            return rendering.folder / "texts", rendering.digest
        config = self.config.mixture.sources[source]
        if config.kind in SOURCE_TEXTS:
            corpus = self._documents(
                source_corpus(source, config), f"{config.kind} {source}", SOURCE_TEXTS[config.kind]
            )
            return corpus.folder / "documents", corpus.digest
        tuning = self._tuning_texts(source, config)
        return tuning.folder / "texts", tuning.digest

    def _documents(
        self, config: CorpusConfig, label: str, row_text: "RowText | None" = None
    ) -> Stage:
        from ipt.corpus.build import build_corpus

        def work(output: Path) -> Json:
            overlap = self._overlap(None) if config.overlap else None
            return build_corpus(
                config, self.config.seed, output, overlap, config.overlap == "remove", row_text
            )

        inputs = _corpus_inputs(config) | (self._overlap_inputs() if config.overlap else {})
        settings = asdict(config) | ({"row_text": row_text.__name__} if row_text else {})
        return self._run("corpus", work, settings, inputs, label=label)

    def _overlap(self, corpus: Path | None) -> Overlap:
        """Looks for the items of evaluation tasks; `corpus` is the finished corpus stage, which
        some tasks ask about.
        """
        from ipt.evaluation.task_types.registry import item_texts

        tasks = self._overlap_tasks()
        return Overlap(
            {task.name: item_texts(task, corpus) for task in tasks},
            self.config.decontamination.ngram,
        )

    def _overlap_inputs(self) -> dict[str, str]:
        from ipt.evaluation.task import task_digests

        return {
            **task_digests(self._overlap_tasks()),
            "ngram": str(self.config.decontamination.ngram),
        }

    def _overlap_tasks(self) -> "list[Task]":
        from ipt.evaluation.task import load_tasks

        return load_tasks(
            self.config.decontamination.tasks or self.config.tasks, self.config.data_dir
        )

    def _tuning_texts(self, source: str, config: SourceConfig) -> Stage:
        from ipt.synthesis.finetuning_data import build_tuning_texts, data_sets

        def work(output: Path) -> Json:
            return build_tuning_texts(
                config,
                source,
                output,
                self.config.seed,
                self._lengths() if config.max_tokens else None,
            )

        settings = asdict(config) | {
            "source": source,
            "path": "",
        }  # the files themselves are in the inputs
        inputs = {
            f"{name}/{file.name}": hash_file(file)
            for name, files in data_sets(source, config).items()
            for file in files
        }
        if config.max_tokens:
            inputs["tokenizer"] = model_identity(self.config.model, tokenizer_only=True)
        return self._run("texts", work, settings, inputs, label=f"texts {source}")

    def _lengths(self) -> "Lengths":
        """Counts the tokens of each text of a tuning set, as its token store will hold it."""
        from ipt.models import load_tokenizer
        from ipt.tokens.encode import Encoder, encoding_of

        encoder = Encoder(encoding_of(load_tokenizer(self.config.model), self.config.tokens))
        return lambda texts: [
            len(document.tokens)
            for document in encoder.encode({"examples": text} for text in texts)
        ]

    def _label(self, source: str) -> str:
        return (
            f"{source} {self.config.rendering.arrangement}" if source == "instruction" else source
        )


# Commands
# ----------------------------------------------------------------------------------------------


def synthesize(config: Config) -> None:
    result = _synthesized(Stages(config))
    console.print(f"pairs: {Path(result['folder']) / 'pairs'}", soft_wrap=True)
    report_result(result)


def train(config: Config) -> None:
    stages = Stages(config, before_work=model_check([config]))
    stage = stages.training(folder=_folder(config))
    distributed.leave()
    if rank() > 0:
        return
    console.print(f"model: {stage.folder / 'export'}", soft_wrap=True)
    report_result(_trained(stages))


def model_check(configs: Iterable[Config]) -> Callable[[], None]:
    """A function that raises UserError, at its first call, for a model that could only be trained
    wrongly.

    Called before any data are made for it. Later calls do nothing.
    """
    waiting = list(configs)

    def check() -> None:
        from ipt.training.probe import check_model

        while waiting:
            check_model(waiting[-1])
            waiting.pop()

    return check


def evaluate(config: Config) -> None:
    from ipt.evaluation.tables import table

    distributed.join()
    stages = Stages(config)
    _evaluation(stages)
    distributed.leave()
    if rank() > 0:
        return
    result = _evaluated(stages)
    folder = Path(result["folder"])
    console.print(table({config.model: folder}))
    console.print(f"results: {folder / 'results.md'}, {folder / 'results.json'}", soft_wrap=True)
    report_result(result)


def finished_result(command: str, config: Config) -> Json | None:
    """What the command would report of this config if all of its stages are finished; None if there
    is something to do.
    """
    results = {"synthesize": _synthesized, "train": _trained, "evaluate": _evaluated}
    if command not in results:
        return None
    try:
        return results[command](Stages(config, only=()))
    except (StageNotFinished, ValueError, OSError):  # what is wrong the command itself tells better
        return None


def _synthesized(stages: Stages) -> Json:
    folder = _folder(stages.config)
    stages.synthesis(folder)
    stage = stages.pairs(_below(folder, "filtered"))
    return job_result(
        stage.folder,
        {name: stage.stats[name] for name in ("documents", "pairs") if name in stage.stats},
    )


def _trained(stages: Stages) -> Json:
    """The training of a config and, where it has tasks, the scores of its model."""
    folder = _folder(stages.config)
    stage = stages.training(folder=folder)
    figures = {
        "steps": stage.stats["steps"],
        "tokens": stage.stats["tokens"],
        "final loss": stage.stats["final_loss"],
    }
    if not stages.config.tasks:
        return job_result(stage.folder, figures, training=stage.folder)
    export = str(stage.folder / "export")
    scores = stages.evaluation(
        export, stage.digest, folder=_below(folder, "evaluation"), trained=True
    ).folder
    return job_result(
        stage.folder, figures | _scores(scores), training=stage.folder, evaluation=scores
    )


def _evaluated(stages: Stages) -> Json:
    scores = _evaluation(stages).folder
    return job_result(scores, _scores(scores), evaluation=scores)


def _evaluation(stages: Stages) -> Stage:
    config = stages.config
    return stages.evaluation(config.model, model_identity(config.model), folder=_folder(config))


def arm_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config of an arm: the recipe's, with the arm's changes. Raises as a misspelt key does on
    the command line.
    """
    merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.create(dict(changes)))
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _with_own_seed(config: Config) -> Config:
    """The config as a training sees it: `trainer.seed`, where it is set, is the seed."""
    if config.trainer.seed is None:
        return config
    return replace(config, seed=config.trainer.seed, trainer=replace(config.trainer, seed=None))


def _corpus_inputs(config: CorpusConfig) -> dict[str, str]:
    """What a corpus is made of: the content of files, or the version of the package. A hub's data
    set has only its name.
    """
    from ipt.corpus.build import input_digests

    if config.kind == "ontology":
        return {"package": version("cellxgene-ontology-guide")}
    return input_digests(config)


def _folder(config: Config) -> Path | None:
    return Path(config.output_dir) if config.output_dir else None


def _below(folder: Path | None, name: str) -> Path | None:
    return folder / name if folder else None


def _scores(folder: Path) -> dict[str, float]:
    """All scores of an evaluation, the main one of each task first."""
    results = read_json(folder / "results.json")
    scores = {
        f"{task} {name}": metric["value"]
        for task, metrics in results.items()
        for name, metric in metrics.items()
    }
    return main_scores_of(folder) | scores


def main_scores_of(folder: Path) -> dict[str, float]:
    """One figure a task, for a sweep's table: the log-probability of the right answer, which tells
    small models apart, or what the task has instead.
    """
    results = read_json(folder / "results.json")
    scores = {}
    for task, metrics in results.items():
        name = next(
            metric
            for metric in ("logprob", "nll", "correct", "paper", *metrics)
            if metric in metrics
        )
        scores[f"{task} {name}"] = metrics[name]["value"]
    return scores
