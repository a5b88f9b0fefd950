"""What a recipe with arms would do: the stages of all arms, shared ones once, which are finished,
and what the others need.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.config import Config, CorpusConfig, SourceConfig
from ipt.console import console
from ipt.errors import UserError
from ipt.files import hash_json
from ipt.pipeline.dry_run import Needs, training_needs
from ipt.pipeline.reproduce import advance, arm_runs, start_last
from ipt.pipeline.stages import PHASES, Json, Stages
from ipt.stage import Stage, find_stage
from ipt.synthesis.formats.base import RULE_BASED

if TYPE_CHECKING:
    from ipt.corpus.documents import RowText
    from ipt.tokens.source import GivenStore

Found = TypeVar("Found")
CHARACTERS = 4  # of English text in a token, about
FINISHED, TO_DO, MISSING = "finished", "to do", "input missing"
COLOURS = {FINISHED: "green", TO_DO: "yellow", MISSING: "red"}


@dataclass
class Step:
    """A stage of one or several arms. Of tokens, hours and bytes None is: not known yet, or too
    little to count.
    """

    name: str
    label: str
    stage: Stage
    state: str
    problem: str = ""
    arms: list[str] = field(default_factory=list)
    tokens: float | None = None
    gpu_hours: float | None = None
    disk: float | None = None


@dataclass
class ArmsDryRun(Stages):
    """Walks through the stages of an arm and works on none: what is not finished is taken to be
    what its settings would make of it.
    """

    known: dict[Path, tuple[str, str, str]] = field(
        default_factory=dict
    )  # folder -> name of the stage, state, problem

    def steps(self) -> list[Step]:
        found = ((label, stage, *self.known[stage.folder]) for label, stage in self.done)
        return [
            Step(name, label, stage, state, problem) for label, stage, name, state, problem in found
        ]

    def _stage(
        self,
        name: str,
        folder: Path | None,
        identity: Json,
        work: Callable[[Path], Json],
        collective: bool,
    ) -> Stage:
        stage = find_stage(name, folder, **identity)
        if stage is None:
            return self._planned(name, identity)
        self.known[stage.folder] = (name, FINISHED, "")
        return stage

    def _planned(self, name: str, identity: Json, problem: str = "") -> Stage:
        digest = hash_json([name, identity])
        stage = Stage(
            Path(self.config.stages_dir) / f"{name}-planned-{digest[:12]}",
            digest,
            {},
            0.0,
            reused=False,
        )
        self.known[stage.folder] = (name, MISSING if problem else TO_DO, problem)
        return stage

    def _found(
        self, name: str, label: str, settings: Json, find: Callable[[], Found]
    ) -> Found | Stage:
        """What `find` finds, or a stage that stands for it where a file or model that it reads is
        not here.
        """
        stage = next((stage for known, stage in self.done if known == label), None)
        if stage is not None:
            return stage
        try:
            return find()
        except (UserError, OSError) as error:
            stage = self._planned(name, settings, str(error).splitlines()[0])
            self.done.append((label, stage))
            return stage

    def _documents(
        self, config: CorpusConfig, label: str, row_text: "RowText | None" = None
    ) -> Stage:
        return self._found(
            "corpus",
            label,
            asdict(config),
            lambda: super(ArmsDryRun, self)._documents(config, label, row_text),
        )

    def _tuning_texts(self, source: str, config: SourceConfig) -> Stage:
        return self._found(
            "texts",
            f"texts {source}",
            asdict(config),
            lambda: super(ArmsDryRun, self)._tuning_texts(source, config),
        )

    def synthesis(self, folder: Path | None = None) -> Stage:
        return self._found(
            "synthesis",
            "synthesis",
            asdict(self.config.synthesis),
            lambda: super(ArmsDryRun, self).synthesis(folder),
        )

    def rendering(self) -> Stage:
        label = f"rendering {self.config.rendering.arrangement}"
        return self._found("rendering", label, asdict(self.config.rendering), super().rendering)

    def store(self, source: str) -> "Stage | GivenStore":
        return self._found(
            "tokens",
            f"tokens {self._label(source)}",
            {"source": source},
            lambda: super(ArmsDryRun, self).store(source),
        )

    def training(self, name: str = "training", folder: Path | None = None) -> Stage:
        return self._found(
            "training",
            name,
            asdict(self.config),
            lambda: super(ArmsDryRun, self).training(name, folder),
        )

    def contamination(self, data: str, corpus: Stage | None) -> Stage:
        label, settings = f"contamination {data}", {"data": data, "tasks": self.config.tasks}
        if "://" in data or Path(data).exists():
            return self._found(
                "contamination",
                label,
                settings,
                lambda: super(ArmsDryRun, self).contamination(data, corpus),
            )
        stage = self._planned(
            "contamination", settings
        )  # the data are a token store that is still to be made
        self.done.append((label, stage))
        return stage

    def evaluation(
        self,
        model: str,
        identity: str,
        name: str = "evaluation",
        folder: Path | None = None,
        trained: bool = False,
    ) -> Stage:
        settings = {"model": identity, "tasks": self.config.tasks}
        return self._found(
            "evaluation",
            name,
            settings,
            lambda: super(ArmsDryRun, self).evaluation(model, identity, name, folder, trained),
        )


def dry_run_arms(config: Config) -> None:
    """Print the stages of all arms that `stages` and `only` leave, in the order in which they would
    be done.
    """
    steps = plan_arms(config)
    console.print(_table(config, steps))
    for step in steps:
        if step.problem:
            console.print(
                f"[red]{escape(step.label)}:[/] {escape(step.problem)}",
                highlight=False,
                soft_wrap=True,
            )


def plan_arms(config: Config) -> list[Step]:
    """The steps of all arms, each once."""
    steps: dict[Path, Step] = {}
    needs: dict[str, Needs] = {}
    for run in start_last(arm_runs(config)):
        plan = ArmsDryRun(run.config)
        advance(run, config.stages or list(PHASES), plan)
        for step in plan.steps():
            known = steps.setdefault(step.stage.folder, step)
            known.arms += [name for name in (run.label,) if name not in known.arms]
            if known is step and step.state != FINISHED:
                _reckon(step, run.config, dict(plan.done).get("corpus"), needs)
    return list(steps.values())


def _reckon(step: Step, config: Config, corpus: Stage | None, known: dict[str, Needs]) -> None:
    """Fill in what an unfinished step needs, as far as that is known before it is done."""
    characters, documents = (
        (corpus.stats.get(name) for name in ("characters", "documents")) if corpus else (None, None)
    )
    if step.name == "training":
        key = hash_json(
            [
                asdict(config.trainer),
                asdict(config.optimizer),
                config.model,
                config.architecture,
                config.mixture.seq_len,
            ]
        )
        needs = known[key] = known.get(key) or training_needs(config)
        trainer = config.trainer
        step.tokens = needs.tokens
        step.gpu_hours = (
            needs.seconds / 3600 * trainer.devices * trainer.num_nodes if needs.seconds else None
        )
        step.disk = needs.export + needs.checkpoint * (
            1 + config.checkpoint.keep_last
        )  # the last step is saved before the export
    elif step.name == "synthesis" and characters and documents:
        _reckon_synthesis(step, config, characters / CHARACTERS, documents)
    elif step.label == "tokens raw" and characters:
        step.tokens, step.disk = characters / CHARACTERS, characters / CHARACTERS * 4


def _reckon_synthesis(step: Step, config: Config, prompt_tokens: float, documents: int) -> None:
    """Prompts once, since chains find what they share in the cache, and outputs as long as they may
    be.
    """
    from ipt.training.metrics import named_peak

    if config.synthesis.format == RULE_BASED:
        return
    step.tokens = prompt_tokens + documents * config.synthesis.max_new_tokens
    parameters, peak = _parameters(config.synthesis.model), named_peak(config.dry_run_gpu)
    if parameters and peak and config.trainer.accelerator != "cpu":
        step.gpu_hours = 2 * parameters * step.tokens / (peak * config.dry_run_mfu) / 3600


def _parameters(model: str) -> int | None:
    """Of a model whose shape is known without asking a hub."""
    from ipt.training.model import meta_model

    try:
        return sum(parameter.numel() for parameter in meta_model(Config(model=model)).parameters())
    except UserError:
        return None


# What is printed
# ----------------------------------------------------------------------------------------------


def _table(config: Config, steps: list[Step]) -> Table:
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="Stages of all arms, those that they share once",
    )
    for name in ("stage", "state", "tokens", f"{config.dry_run_gpu} hours", "disk"):
        table.add_column(
            name, justify="left" if name in ("stage", "state") else "right", no_wrap=name != "stage"
        )
    for step in steps:
        label = step.name if step.name == "contamination" else step.label  # which has a path in it
        shared = (
            ""
            if step.name in ("training", "evaluation")
            else f" [dim]({escape(_arms(step.arms))})[/]"
        )
        state = f"[{COLOURS[step.state]}]{step.state}[/]"
        table.add_row(
            escape(label) + shared, state, *_figures(step.tokens, step.gpu_hours, step.disk)
        )
    table.add_section()
    left = [step for step in steps if step.state != FINISHED]
    sums = (
        sum(value for step in left if (value := getattr(step, name)))
        for name in ("tokens", "gpu_hours", "disk")
    )
    table.add_row(
        "what is known of them",
        f"{len(left)} of {len(steps)} left",
        *_figures(*(value or None for value in sums)),
    )
    table.caption = (
        "tokens: trained on, or read and written at most; hours: by FLOPs at dry_run_mfu, "
        "generation takes longer; without scores"
    )
    table.title_justify = table.caption_justify = "left"
    return table


def _arms(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"


def _figures(tokens: float | None, hours: float | None, disk: float | None) -> tuple[str, str, str]:
    return (
        f"{tokens / 1e6:,.{0 if tokens > 1e8 else 3}f} M" if tokens else "–",
        f"{hours:,.2f}" if hours is not None else "–",
        f"{disk / (1 << 30):,.2f} GiB" if disk else "–",
    )
