"""The plan of a job: which stages are cached, which are left, and about how long they take."""

import logging
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ipt.config import Config, CorpusConfig, SourceConfig
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import hash_json, read_json
from ipt.pipeline.stages import (
    Contamination,
    Corpus,
    Evaluation,
    JobLog,
    Key,
    Pairs,
    Result,
    Stages,
    Texts,
    Tokens,
    Training,
    Work,
    duration,
    title,
)
from ipt.stage import MANIFEST, Stage, StageId, find_stage

if TYPE_CHECKING:
    from ipt.corpus.documents import RowText
    from ipt.tokens.source import GivenStore

Found = TypeVar("Found")
FINISHED, TO_DO, MISSING = "finished", "to do", "input missing"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedStage:
    id: StageId
    stage: Stage
    state: str  # FINISHED | TO_DO | MISSING
    problem: str = ""  # what is missing
    key: Key | None = None  # None if an input is missing


@dataclass
class PlannedStages(Stages):
    """Visits the stages of a config without running them.

    The folder of an unfinished stage does not exist, and its digest depends on its settings.
    """

    planned: dict[StageId, PlannedStage] = field(default_factory=dict)

    def _stage(
        self,
        stage: StageId,
        folder: Path | None,
        key: Key,
        work: Work,
        collective: bool,
        details: str,
    ) -> Stage:
        found = find_stage(stage.name, folder, **key._asdict())
        if found is None:
            return self._unfinished(stage, key._asdict(), TO_DO, key=key)
        self.planned[stage] = PlannedStage(stage, found, FINISHED)
        return found

    def _unfinished(
        self,
        stage: StageId,
        settings: dict[str, Any],
        state: str,
        problem: str = "",
        key: Key | None = None,
    ) -> Stage:
        digest = hash_json([stage.name, {name: str(value) for name, value in settings.items()}])
        folder = Path(self.config.stages_dir) / f"{stage.name}-planned-{digest[:12]}"
        made = Stage(folder, digest, {}, 0.0, reused=False)
        self.planned[stage] = PlannedStage(stage, made, state, problem, key)
        return made

    def _find(
        self, kind: type[Result], stage: StageId, settings: Any, find: Callable[[], Found]
    ) -> Found | Result:
        """The result of `find`, or an unfinished stage if a file or model is missing."""
        known = self.done.get(stage)
        if isinstance(known, kind):
            return known
        try:
            return find()
        except (UserError, OSError) as error:
            problem = str(error).splitlines()[0]
            made = self._unfinished(stage, {"settings": settings}, MISSING, problem)
            result = kind(**vars(made))
            self.done[stage] = result
            return result

    def _documents(
        self, config: CorpusConfig, stage: StageId, row_text: "RowText | None" = None
    ) -> Corpus:
        find = super()._documents
        return self._find(Corpus, stage, config, lambda: find(config, stage, row_text))

    def _tuning_texts(self, source: str, config: SourceConfig) -> Texts:
        find = super()._tuning_texts
        return self._find(Texts, StageId("texts", source), config, lambda: find(source, config))

    def synthesis(self, folder: Path | None = None) -> Pairs:
        find, config = super().synthesis, self.config.synthesis
        return self._find(Pairs, StageId("synthesis"), config, lambda: find(folder))

    def rendering(self) -> Texts:
        config = self.config.rendering
        stage = StageId("rendering", config.arrangement)
        return self._find(Texts, stage, config, super().rendering)

    def store(self, source: str) -> "Tokens | GivenStore":
        find = super().store
        return self._find(Tokens, self._tokens_id(source), source, lambda: find(source))

    def training(self, variant: str = "", folder: Path | None = None) -> Training:
        find, stage = super().training, StageId("training", variant)
        return self._find(Training, stage, self.config, lambda: find(variant, folder))

    def contamination(self, source: str, data: str, corpus: Corpus | None) -> Contamination:
        find, stage = super().contamination, StageId("contamination", source)
        if "://" in data or Path(data).exists():
            settings = [data, self.config.tasks]
            return self._find(Contamination, stage, settings, lambda: find(source, data, corpus))
        # a token store that is not finished yet
        made = self._unfinished(stage, {"data": data, "tasks": self.config.tasks}, TO_DO)
        result = Contamination(**vars(made))
        self.done[stage] = result
        return result

    def evaluation(
        self,
        model: str,
        identity: str,
        variant: str = "",
        folder: Path | None = None,
        trained: bool = False,
    ) -> Evaluation:
        find = super().evaluation
        return self._find(
            Evaluation,
            StageId("evaluation", variant),
            [identity, self.config.tasks],
            lambda: find(model, identity, variant, folder, trained),
        )


def start_job(jobs: Iterable[tuple[Config, Callable[[Stages], object]]]) -> JobLog:
    """Log which stages a job consists of. Each config comes with a function that visits its stages.

    An error in a visit is only logged at debug level, because the job raises it, too.
    """
    if rank() > 0:
        return JobLog()
    found: dict[Path, PlannedStage] = {}
    for config, visit in jobs:
        stages = PlannedStages(config)
        try:
            visit(stages)
        except Exception:
            log.debug("the stages cannot be planned", exc_info=True)
        for planned in stages.planned.values():
            may_run = stages.only is None or planned.id.name in stages.only
            if planned.state == FINISHED or may_run:
                found.setdefault(planned.stage.folder, planned)
    _log_plan(list(found.values()))
    return JobLog(len(found))


def _log_plan(found: list[PlannedStage]) -> None:
    left = [planned for planned in found if planned.state != FINISHED]
    if found and not left:
        log.info(f"plan: all {len(found)} stages are cached")
        return
    line = f"plan: {len(found)} stages, {len(found) - len(left)} cached"
    seconds = _estimate(left)
    if seconds is not None:
        line += f", about {duration(seconds)} left, judging by earlier runs"
    log.info(line)
    log.info(f"to do: {', '.join(title(planned.id) for planned in left)}")


def _estimate(left: list[PlannedStage]) -> float | None:
    """Seconds of these stages, from manifests of earlier runs; None if one has no earlier run."""
    known: dict[Path, list[dict[str, Any]]] = {}
    total = 0.0
    for planned in left:
        if planned.key is None:
            return None
        folder = planned.key.stages_dir
        if folder not in known:
            known[folder] = _manifests(folder)
        rates = []
        for manifest in known[folder]:
            if _is_similar(manifest, planned.id, planned.key):
                rates.append(manifest["seconds"] / _amount(manifest["config"]))
        if not rates:
            return None
        total += statistics.median(rates) * _amount(planned.key.config)
    return total


def _manifests(stages_dir: Path) -> list[dict[str, Any]]:
    found = []
    for path in stages_dir.glob(f"*/{MANIFEST}"):
        try:
            manifest = read_json(path)
        except (UserError, OSError):
            continue
        if {"stage", "seconds", "config", "inputs"} <= manifest.keys():
            found.append(manifest)
    return found


def _is_similar(manifest: dict[str, Any], stage: StageId, key: Key) -> bool:
    """Whether a finished stage takes about as long as `stage`. Every evaluation has a model of its
    own, so all evaluations are similar.
    """
    if manifest["stage"] != stage.name:
        return False
    same_model = manifest["inputs"].get("model") == key.inputs.get("model")
    return same_model or stage.name == "evaluation"


def _amount(settings: dict[str, Any]) -> float:
    """Trained tokens of a training. Other stages count as 1, because their size is not known."""
    if "trainer" not in settings:
        return 1.0
    trainer = settings["trainer"]
    sequences = trainer.get("global_batch", 1) * trainer.get("max_steps", 1)
    return float(sequences * settings["mixture"].get("seq_len", 1))
