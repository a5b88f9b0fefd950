"""Runs a recipe from documents to report: one model per arm and seed, at the same token budget,
compared with the base model.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ipt import distributed
from ipt.cli import DISK_FULL
from ipt.config import Config
from ipt.console import console
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import atomic, read_json, write_json
from ipt.mixture.schedule import used_sources
from ipt.models import model_identity
from ipt.pipeline.commands import main_scores_of, model_check
from ipt.pipeline.plan import start_job
from ipt.pipeline.provenance import (
    Record,
    arm_record,
    provenance,
    provenance_facts,
    write_manifest,
    write_record,
    write_records,
)
from ipt.pipeline.stages import (
    PHASES,
    Evaluation,
    StageNotFinished,
    Stages,
    Training,
    arm_config,
    duration,
)
from ipt.report.scores import Arm
from ipt.stage import MANIFEST, Stage, StageId, check_outputs
from ipt.sweeps.job import job_result, report_result
from ipt.synthesis.formats.base import RULE_BASED

START = "start"
# stages whose files the report reads
SHOWN = {"synthesis", "filters", "rendering", "training", "evaluation"}

log = logging.getLogger(__name__)


@dataclass
class ArmRun:
    """An arm with one seed, and its results so far. The base model is the arm START."""

    name: str
    config: Config
    published: str = ""
    seed: int | None = None
    stages: Stages = field(init=False)
    training: Training | None = None
    evaluation: Evaluation | None = None
    error: str = ""

    def __post_init__(self) -> None:
        self.stages = Stages(self.config)

    @property
    def label(self) -> str:
        return self.name if self.seed is None else f"{self.name} seed {self.seed}"

    @property
    def place(self) -> Path:
        """The folder of the arm, relative to that of the run."""
        return Path("arms") / self.name / ("" if self.seed is None else f"seed-{self.seed}")


def reproduce(config: Config) -> None:
    """Run the stages and arms that the keys `stages` and `only` select, and write the report to
    `output_dir` (default: outputs/<name>).

    If an arm fails, the other arms still run; raises UserError at the end.
    """
    started = time.monotonic()
    output = Path(config.output_dir or f"outputs/{config.name}")
    phases = config.stages or list(PHASES)
    runs = arm_runs(config)
    check = model_check(
        [run.config for run in runs if run.name != START] if "training" in phases else []
    )
    job = start_job([(run.config, _visit(run, phases)) for run in arm_runs(config)])
    for run in runs:
        run.stages.before_work = check
        run.stages.log = job
        _attempt(run, phases)
    distributed.leave()
    if rank() > 0:
        return
    records = _place(output, runs)
    if "report" in phases and any(run.evaluation for run in runs):
        _report(config, output, runs, records, started)
    if failed := [run for run in runs if run.error]:
        raise UserError(_failures(failed))
    figures = {}
    for run in runs:
        if run.evaluation:
            for name, value in main_scores_of(run.evaluation.folder).items():
                figures[f"{run.label} {name}"] = value
    report_result(job_result(output, figures))


def arm_runs(config: Config) -> list[ArmRun]:
    """The base model, unless arms train from scratch, and the arms that `only` selects, once per
    seed. Only the training depends on the seed.
    """
    runs = [] if config.architecture else [ArmRun(START, config, config.published)]
    for name in config.only or config.arms:
        arm = arm_config(config, config.arms[name])
        published = config.arms[name].get("published", "")
        for seed in config.seeds if config.seeds else (None,):
            own = arm if seed is None else replace(arm, trainer=replace(arm.trainer, seed=seed))
            runs.append(ArmRun(name, own, published, seed))
    return runs


def start_last(runs: list[ArmRun]) -> list[ArmRun]:
    return sorted(runs, key=lambda run: run.name == START)


def advance(run: ArmRun, phases: list[str], stages: Stages | None = None) -> None:
    """Run the stages of `phases` for an arm. Stages of other phases must be cached."""
    stages = stages or run.stages
    stages.only = None
    if set(phases) < set(PHASES):
        stages.only = {stage for phase in phases for stage in PHASES[phase]}
    scored = {"evaluation", "report"} & set(phases)
    if run.name == START:
        if scored:
            model = run.config.model
            run.evaluation = stages.evaluation(model, model_identity(model), START)
        return
    sources = used_sources(run.config.mixture)
    if "synthesis" in phases and "instruction" in sources:
        stages.pairs()
    if "tokens" in phases:
        for source in sources:
            stages.store(source)
    if scored or "training" in phases:
        run.training = stages.training(run.label)
    if scored and run.training:
        export, digest = str(run.training.export), run.training.digest
        run.evaluation = stages.evaluation(export, digest, run.label, trained=True)


def _visit(run: ArmRun, phases: list[str]) -> Callable[[Stages], None]:
    return lambda stages: advance(run, phases, stages)


def _attempt(run: ArmRun, phases: list[str]) -> None:
    """Advance an arm. An error is kept in `run.error`, unless all arms would fail."""
    try:
        advance(run, phases)
    except StageNotFinished as missing:
        phase = next(phase for phase, stages in PHASES.items() if missing.stage in stages)
        run.error = (
            f"{missing} is not finished: run stages=[{phase}] first, with the same stages_dir"
        )
    except Exception as error:
        if "RANK" in os.environ or getattr(error, "errno", None) in DISK_FULL:
            raise
        run.error = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, UserError):
            console.print_exception()
    if run.error:
        log.error(f"{run.label}: {run.error}")


def _failures(failed: list[ArmRun]) -> str:
    """One line that groups arms by their error."""
    reasons: dict[str, list[str]] = {}
    for run in failed:
        reasons.setdefault(run.error, []).append(run.label)
    parts = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return f"{len(failed)} not done: {'; '.join(parts)}"


def _place(output: Path, runs: list[ArmRun]) -> list[Record]:
    """Write the record of each arm and links to its stages, and return the records.

    The links are `arms/<name>/training` and `arms/<name>/evaluation`, with seeds
    `arms/<name>/seed-<n>/…`.
    """
    records = []
    for run in runs:
        for name, stage in (("training", run.training), ("evaluation", run.evaluation)):
            if stage is not None:
                _link(output / run.place / name, stage.folder)
        if run.training is not None:
            records.append(arm_record(run.name, run.config, run.stages.done, run.training))
            write_record(output / run.place, records[-1])
    return records


def _link(link: Path, folder: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


# The report
# ----------------------------------------------------------------------------------------------


def _report(
    config: Config, output: Path, runs: list[ArmRun], records: list[Record], started: float
) -> None:
    """Write the report, and last the manifest."""
    from ipt.evaluation.tables import table
    from ipt.report.html import write_report

    done = list(_distinct(runs))
    for identity, stage in done:
        if stage.reused and identity.name in SHOWN:
            check_outputs(stage)
    with atomic(output / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(asdict(config)), encoding="utf-8")
    rows = [_row(identity, stage) for identity, stage in done]
    write_json(output / "stages.json", rows)
    write_records(output, records)
    found = provenance("reproduce", config, done)
    rendered = (stage for identity, stage in done if identity.name == "rendering")
    texts = next((stage.folder / "texts" for stage in rendered), None)
    pairs, quality = _pairs(done)
    arms = [
        Arm(run.name, _folder(run.training), run.evaluation.folder, run.seed or 0, run.published)
        for run in runs
        if run.evaluation
    ]
    statistics = write_report(
        output,
        title=config.title or config.name,
        config_yaml=(output / "config.yaml").read_text(encoding="utf-8"),
        arms=arms,
        pairs=pairs,
        texts=texts,
        stages=rows,
        quality=quality,
        facts=_facts(config, runs, found),
        records=records,
    )
    scored = {run.label: run.evaluation.folder for run in runs if run.evaluation}
    console.print(table(scored))
    seconds = round(time.monotonic() - started, 1)
    log.info(f"report: {output / 'report.html'} ({duration(seconds)})")
    failed = {run.label: run.error for run in runs if run.error}
    summary = {
        "seconds": seconds,
        **statistics,
        "not_done": failed,
        "records": [record.as_dict() for record in records],
    }
    write_json(output / "summary.json", summary)
    write_manifest(output, found, done, name=config.name, seconds=seconds, not_done=failed)


def _distinct(runs: list[ArmRun]) -> Iterator[tuple[StageId, Stage]]:
    """The stages of all arms, each once. Those of the base model come last."""
    seen: set[Path] = set()
    for run in start_last(runs):
        for identity, stage in run.stages.done.items():
            if stage.folder not in seen:
                seen.add(stage.folder)
                yield identity, stage


def _pairs(done: list[tuple[StageId, Stage]]) -> tuple[Path | None, dict[str, Any]]:
    """The folder of pairs of the first arm that has pairs, and statistics of their quality."""
    pairs: Path | None = None
    quality: dict[str, Any] = {}
    for identity, stage in done:
        if identity.name == "synthesis" and pairs is not None:
            break
        if identity.name in ("synthesis", "filters"):
            pairs = stage.folder / "pairs"
            quality |= stage.stats
    return pairs, quality


def _folder(stage: Stage | None) -> Path | None:
    return stage.folder if stage else None


def _row(identity: StageId, stage: Stage) -> dict[str, Any]:
    manifest = read_json(stage.folder / MANIFEST)
    return {
        "name": str(identity),
        "folder": str(stage.folder),
        "seconds": stage.seconds,
        "reused": stage.reused,
        "key": manifest["key"],
        "digest": stage.digest,
        "stats": stage.stats,
    }


def _facts(config: Config, runs: list[ArmRun], found: dict[str, Any]) -> dict[str, Any]:
    machine = found["hardware"]
    cpus = f"{machine['cpus']} CPU cores ({machine['machine']})"
    sequences = config.trainer.max_steps * config.trainer.global_batch_size
    failed = {run.label: run.error for run in runs if run.error}
    return {
        "command": found["command"],
        "model": config.model,
        "synthesizer": "rules" if config.synthesis.format == RULE_BASED else config.synthesis.model,
        "seed": config.seeds or config.seed,
        "token budget of each arm": sequences * config.mixture.seq_len,
        "hardware": ", ".join(machine["gpus"]) or cpus,
        **provenance_facts(found),
        **({"not done": failed} if failed else {}),
        "versions": found["versions"],
    }
