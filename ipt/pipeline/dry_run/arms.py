"""The stages of a recipe with arms: which are finished, and what the others need."""

from dataclasses import asdict, dataclass, field

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.config import Config
from ipt.console import console
from ipt.errors import UserError
from ipt.files import hash_json
from ipt.pipeline.dry_run.training import Needs, training_needs
from ipt.pipeline.plan import FINISHED, MISSING, TO_DO, PlannedStage, PlannedStages
from ipt.pipeline.reproduce import advance, arm_runs, start_last
from ipt.pipeline.stages import PHASES
from ipt.stage import Stage, StageId
from ipt.synthesis.formats.base import RULE_BASED

# characters of English text per token, about
CHARACTERS = 4
COLOURS = {FINISHED: "green", TO_DO: "yellow", MISSING: "red"}


@dataclass
class Step:
    """A stage of one or several arms. Tokens, GPU hours and bytes are None if they are not known
    yet, or too small to count.
    """

    planned: PlannedStage
    arms: list[str] = field(default_factory=list)
    tokens: float | None = None
    gpu_hours: float | None = None
    disk: float | None = None

    @property
    def name(self) -> str:
        return self.planned.id.name

    @property
    def label(self) -> str:
        return str(self.planned.id)

    @property
    def state(self) -> str:
        return self.planned.state

    @property
    def problem(self) -> str:
        return self.planned.problem


def dry_run_arms(config: Config) -> None:
    """Print the stages of all arms that the keys `stages` and `only` select, in their order."""
    steps = plan_arms(config)
    console.print(_table(config, steps))
    for step in steps:
        if step.problem:
            line = f"[red]{escape(step.label)}:[/] {escape(step.problem)}"
            console.print(line, highlight=False, soft_wrap=True)


def plan_arms(config: Config) -> list[Step]:
    """The stages of all arms, each once."""
    steps: dict[str, Step] = {}
    needs: dict[str, Needs] = {}
    for run in start_last(arm_runs(config)):
        stages = PlannedStages(run.config)
        advance(run, config.stages or list(PHASES), stages)
        for identity in stages.done:
            planned = stages.planned[identity]
            step = steps.setdefault(str(planned.stage.folder), Step(planned))
            if run.label not in step.arms:
                step.arms.append(run.label)
            if step.planned is planned and step.state != FINISHED:
                _add_needs(step, run.config, stages.done.get(StageId("corpus")), needs)
    return list(steps.values())


def _add_needs(step: Step, config: Config, corpus: Stage | None, known: dict[str, Needs]) -> None:
    """Set what an unfinished stage needs, as far as that is known before it runs."""
    stats = corpus.stats if corpus else {}
    characters, documents = stats.get("characters"), stats.get("documents")
    if step.name == "training":
        parts = [asdict(config.trainer), asdict(config.optimizer), config.model]
        key = hash_json([*parts, config.architecture, config.mixture.seq_len])
        if key not in known:
            known[key] = training_needs(config)
        needs = known[key]
        step.tokens = needs.tokens
        if needs.seconds:
            devices = config.trainer.devices * config.trainer.num_nodes
            step.gpu_hours = needs.seconds / 3600 * devices
        # the last step is saved before the export
        step.disk = needs.export + needs.checkpoint * (1 + config.checkpoint.keep_last)
    elif step.name == "synthesis" and characters and documents:
        _add_synthesis_needs(step, config, characters / CHARACTERS, documents)
    elif step.planned.id == StageId("tokens", "raw") and characters:
        step.tokens = characters / CHARACTERS
        step.disk = step.tokens * 4


def _add_synthesis_needs(step: Step, config: Config, prompt_tokens: float, documents: int) -> None:
    """Prompts count once, because chains share prefixes through the cache; outputs count with their
    maximum length.
    """
    from ipt.training.metrics import named_peak

    if config.synthesis.format == RULE_BASED:
        return
    step.tokens = prompt_tokens + documents * config.synthesis.max_new_tokens
    parameters, peak = _parameters(config.synthesis.model), named_peak(config.dry_run_gpu)
    if parameters and peak and config.trainer.accelerator != "cpu":
        step.gpu_hours = 2 * parameters * step.tokens / (peak * config.dry_run_mfu) / 3600


def _parameters(model: str) -> int | None:
    """Parameters of a model; None if its shape is not known without the hub."""
    from ipt.training.model import meta_model

    try:
        return sum(parameter.numel() for parameter in meta_model(Config(model=model)).parameters())
    except UserError:
        return None


def _table(config: Config, steps: list[Step]) -> Table:
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="Stages of all arms; shared stages appear once",
    )
    for name in ("stage", "state"):
        table.add_column(name, no_wrap=name != "stage")
    for name in ("tokens", f"{config.dry_run_gpu} hours", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    left = []
    for step in steps:
        label = escape(step.label)
        if step.name not in ("training", "evaluation"):
            label += f" [dim]({escape(_arms(step.arms))})[/]"
        state = f"[{COLOURS[step.state]}]{step.state}[/]"
        table.add_row(label, state, *_figures(step.tokens, step.gpu_hours, step.disk))
        if step.state != FINISHED:
            left.append(step)
    table.add_section()
    tokens = sum(step.tokens or 0 for step in left)
    hours = sum(step.gpu_hours or 0 for step in left)
    disk = sum(step.disk or 0 for step in left)
    count = f"{len(left)} of {len(steps)} left"
    table.add_row("known sum", count, *_figures(tokens or None, hours or None, disk or None))
    table.caption = (
        "tokens: trained on, or read and written at most; hours: FLOPs at dry_run_mfu (generation "
        "takes longer), without evaluation"
    )
    table.title_justify = table.caption_justify = "left"
    return table


def _arms(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"


def _figures(tokens: float | None, hours: float | None, disk: float | None) -> tuple[str, str, str]:
    digits = 0 if tokens and tokens > 1e8 else 3
    return (
        f"{tokens / 1e6:,.{digits}f} M" if tokens else "–",
        f"{hours:,.2f}" if hours is not None else "–",
        f"{disk / (1 << 30):,.2f} GiB" if disk else "–",
    )
