"""A recipe from documents to report: one model for each arm and seed, at the same token budget,
beside the model they start from.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape

from ipt import distributed
from ipt.cli import DISK_FULL
from ipt.config import Config
from ipt.console import console
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.files import atomic, read_json, write_json
from ipt.mixture.schedule import used_sources
from ipt.models import model_identity
from ipt.pipeline.provenance import provenance, provenance_facts, write_manifest
from ipt.pipeline.records import Record, arm_record, write_record, write_records
from ipt.pipeline.stages import (
    PHASES,
    StageNotFinished,
    Stages,
    arm_config,
    main_scores_of,
    model_check,
)
from ipt.report.scores import Arm
from ipt.stage import MANIFEST, Stage, check_outputs
from ipt.sweeps.job import job_result, report_result
from ipt.synthesis.formats.base import RULE_BASED

START = "start"
SHOWN = (
    "synthesis",
    "filters",
    "rendering",
    "training",
    "evaluation",
)  # stages whose files the report reads


@dataclass
class ArmRun:
    """An arm on its way, for one seed; the start is one that is not trained."""

    name: str
    config: Config
    published: str = ""
    seed: int | None = None
    stages: Stages = field(init=False)
    training: Stage | None = None
    evaluation: Stage | None = None
    error: str = ""

    def __post_init__(self) -> None:
        self.stages = Stages(self.config)

    @property
    def label(self) -> str:
        return self.name if self.seed is None else f"{self.name} seed {self.seed}"

    @property
    def place(self) -> Path:
        """Its folder below the run's."""
        return Path("arms") / self.name / ("" if self.seed is None else f"seed-{self.seed}")


def reproduce(config: Config) -> None:
    """Run the recipe, or of it what `stages` and `only` name, and write its report to `output_dir`
    (default: outputs/<name>).

    Finished stages are reused. An arm that fails does not keep the others from being done; raises
    RuntimeError in the end.
    """
    started = time.monotonic()
    output = Path(config.output_dir or f"outputs/{config.name}")
    phases = config.stages or list(PHASES)
    runs = arm_runs(config)
    check = model_check(
        [run.config for run in runs if run.name != START] if "training" in phases else []
    )
    for run in runs:
        run.stages.before_work = check
        _attempt(run, phases)
    distributed.leave()
    if rank() > 0:
        return
    records = _place(output, runs)
    if "report" in phases and any(run.evaluation for run in runs):
        _report(config, output, runs, records, started)
    if failed := [run for run in runs if run.error]:
        raise UserError(_failures(failed))
    scores = {run.label: main_scores_of(run.evaluation.folder) for run in runs if run.evaluation}
    report_result(
        job_result(
            output,
            {
                f"{label} {name}": value
                for label, figures in scores.items()
                for name, value in figures.items()
            },
        )
    )


def arm_runs(config: Config) -> list[ArmRun]:
    """The start, unless all is trained from scratch, and the arms that `only` leaves, each once for
    each of `seeds`.

    Seeds vary the seed of the training alone.
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
    """Bring an arm as far as the last of `phases`, working on the stages of these and finding those
    of others finished.
    """
    stages = stages or run.stages
    stages.only = (
        {stage for phase in phases for stage in PHASES[phase]}
        if set(phases) < set(PHASES)
        else None
    )
    scored = {"evaluation", "report"} & set(phases)
    if run.name == START:
        if scored:
            run.evaluation = stages.evaluation(
                run.config.model, model_identity(run.config.model), "evaluation start"
            )
        return
    sources = used_sources(run.config.mixture)
    if "synthesis" in phases and "instruction" in sources:
        stages.pairs()
    if "tokens" in phases:
        for source in sources:
            stages.store(source)
    if scored or "training" in phases:
        run.training = stages.training(f"training {run.label}")
    if scored and run.training:
        export = str(run.training.folder / "export")
        run.evaluation = stages.evaluation(
            export, run.training.digest, f"evaluation {run.label}", trained=True
        )


def _attempt(run: ArmRun, phases: list[str]) -> None:
    """Note what goes wrong with the arm instead of ending, unless it would go wrong with all of
    them.
    """
    try:
        advance(run, phases)
    except StageNotFinished as missing:
        run.error = (
            f"{missing} is not finished: run stages=[{_phase_of(str(missing))}] first, with the "
            "same stages_dir"
        )
    except Exception as error:
        if "RANK" in os.environ or getattr(error, "errno", None) in DISK_FULL:
            raise
        run.error = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, UserError):
            console.print_exception()
    if run.error:
        console.print(
            f"[red]{escape(run.label)}:[/] {escape(run.error)}", highlight=False, soft_wrap=True
        )


def _phase_of(stage: str) -> str:
    return next(phase for phase, stages in PHASES.items() if stage in stages)


def _failures(failed: list[ArmRun]) -> str:
    """One line; arms that failed in the same way stand together."""
    reasons: dict[str, list[str]] = {}
    for run in failed:
        reasons.setdefault(run.error, []).append(run.label)
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"{len(failed)} not done: {told}"


def _place(output: Path, runs: list[ArmRun]) -> list[Record]:
    """Make links to the stages of each arm, write its record beside them, and return the records.

    `arms/<name>/training` and `arms/<name>/evaluation`, with seeds `arms/<name>/seed-<n>/…`, lead
    to the stages, wherever they are kept.
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
    """Write everything that a person reads, and last the manifest."""
    from ipt.report.html import write_report

    done = list(_distinct(runs))
    for label, stage in done:
        if stage.reused and label.split()[0] in SHOWN:
            check_outputs(stage)
    with atomic(output / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(asdict(config)), encoding="utf-8")
    rows = [_row(label, stage) for label, stage in done]
    write_json(output / "stages.json", rows)
    write_records(output, records)
    found = provenance("reproduce", config, done)
    texts = next(
        (stage.folder / "texts" for label, stage in done if label.startswith("rendering")), None
    )
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
    console.print(_scores_table(runs))
    seconds = round(time.monotonic() - started, 1)
    console.print(f"report: {output / 'report.html'}  ({seconds:.0f} s)", soft_wrap=True)
    failed = {run.label: run.error for run in runs if run.error}
    summary = {
        "seconds": seconds,
        **statistics,
        "not_done": failed,
        "records": [record.as_dict() for record in records],
    }
    write_json(output / "summary.json", summary)
    write_manifest(output, found, done, name=config.name, seconds=seconds, not_done=failed)


def _distinct(runs: list[ArmRun]) -> Iterator[tuple[str, Stage]]:
    """The stages of all arms, each once, those of the start at the end."""
    seen: set[Path] = set()
    for run in start_last(runs):
        for label, stage in run.stages.done:
            if stage.folder not in seen:
                seen.add(stage.folder)
                yield label, stage


def _pairs(done: list[tuple[str, Stage]]) -> tuple[Path | None, dict[str, Any]]:
    """The folder of pairs to show, those of the first arm that has any, and figures of their
    quality.
    """
    pairs, quality = None, dict[str, Any]()
    for label, stage in done:
        if label == "synthesis" and pairs is not None:
            break
        if label in ("synthesis", "filters"):
            pairs, quality = stage.folder / "pairs", quality | stage.stats
    return pairs, quality


def _folder(stage: Stage | None) -> Path | None:
    return stage.folder if stage else None


def _row(label: str, stage: Stage) -> dict[str, Any]:
    manifest = read_json(stage.folder / MANIFEST)
    return {
        "name": label,
        "folder": str(stage.folder),
        "seconds": stage.seconds,
        "reused": stage.reused,
        "key": manifest["key"],
        "digest": stage.digest,
        "stats": stage.stats,
    }


def _facts(config: Config, runs: list[ArmRun], found: dict[str, Any]) -> dict[str, Any]:
    machine = found["hardware"]
    failed = {run.label: run.error for run in runs if run.error}
    return {
        "command": found["command"],
        "model": config.model,
        "synthesizer": "rules" if config.synthesis.format == RULE_BASED else config.synthesis.model,
        "seed": config.seeds or config.seed,
        "token budget of each arm": config.trainer.max_steps
        * config.trainer.micro_batch_size
        * config.trainer.accumulate_grad_batches
        * config.trainer.devices
        * config.trainer.num_nodes
        * config.mixture.seq_len,
        "hardware": ", ".join(machine["gpus"])
        or f"{machine['cpus']} CPU cores ({machine['machine']})",
        **provenance_facts(found),
        **({"not done": failed} if failed else {}),
        "versions": found["versions"],
    }


def _scores_table(runs: list[ArmRun]) -> Any:
    from ipt.evaluation.tables import table

    return table({run.label: run.evaluation.folder for run in runs if run.evaluation})
