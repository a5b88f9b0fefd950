"""`python -m ipt dashboard project=…`: a W&B workspace and a W&B report with the views of an
experiment.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.cli import exit_on_user_error
from ipt.errors import UserError
from ipt.files import write_json

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

USAGE = (
    "usage: python -m ipt dashboard project=NAME [entity=NAME] [scores=TASK/METRIC,...] "
    "[output=FILE]"
)
RATIO = "mixture.ratios.instruction"
# of `synthesis/...` in the summary of a run
QUALITY = ("pairs", "grounded_rate", "judge/accuracy", "judge/relevance")


def main() -> None:
    """Read the command line and make the views."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        return print(USAGE)
    with exit_on_user_error():
        given = _arguments(sys.argv[1:])
        scores = [score for score in given["scores"].split(",") if score]
        print(dashboard(given["project"], given["entity"], scores, Path(given["output"])))


def dashboard(project: str, entity: str, scores: Sequence[str], output: Path) -> str:
    """Make the workspace and the report of a project, and return where they are.

    Without an API key the workspace is written to `output` as JSON. `scores` are scores of
    evaluations, TASK/METRIC, to plot against the mixture ratio. Raises UserError if the extra
    `dashboard` is not installed.
    """
    from ipt.training.logger import has_wandb_key

    space = workspace(project, entity, scores)
    if not has_wandb_key():
        written = space._to_model().model_dump_json(by_alias=True, exclude_none=True)
        write_json(output, json.loads(written))
        advice = (
            "run `wandb login`, or unset WANDB_MODE, and run this command again to save it there"
        )
        return f"workspace: {output} (W&B is offline or has no API key: {advice})"
    space.save()
    report = _report(project, entity, scores)
    report.save()
    return f"workspace: {space.url}\nreport: {report.url}"


def workspace(project: str, entity: str, scores: Sequence[str] = ()) -> "ws.Workspace":
    """The views of a project, one section per question. Raises UserError if the extra `dashboard`
    is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "a dashboard needs wandb-workspaces: pip install 'ipt[dashboard]'"
        ) from None
    sections = []
    for name, panels in _views(scores).items():
        sections.append(ws.Section(name=name, panels=panels, is_open=True))
    return ws.Workspace(
        entity=entity, project=project, name="Instruction pre-training", sections=sections
    )


def _views(scores: Sequence[str]) -> dict[str, list[Any]]:
    import wandb_workspaces.reports.v2 as wr

    def curve(title: str, *metrics: str) -> Any:
        return wr.LinePlot(title=title, x="tokens", y=list(metrics))

    def against_ratio(name: str) -> Any:
        title = f"{name} against the proportion of instructions"
        return wr.ScatterPlot(title=title, x=wr.Config(RATIO), y=wr.SummaryMetric(name))

    def bars(name: str) -> Any:
        return wr.BarPlot(title=name, metrics=[wr.SummaryMetric(f"synthesis/{name}")])

    def table(name: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=name)

    return {
        "Which ratio?": [against_ratio(name) for name in ("loss", *scores)],
        "Loss": [
            curve("loss", "loss"),
            wr.LinePlot(title="loss by source", x="tokens", metric_regex="loss/.*"),
        ],
        "Throughput": [
            curve("tokens/s per device", "tokens_per_second"),
            curve("MFU", "mfu"),
            curve("fraction of time waiting for data", "data_wait"),
        ],
        "Stability": [
            curve("skipped steps", "skipped"),
            curve("gradient norm", "grad_norm"),
            curve("learning rate", "lr"),
        ],
        "Synthesis": [*map(bars, QUALITY), table("pairs")],
        "Evaluation": [table("results"), table("predictions")],
    }


def _report(project: str, entity: str, scores: Sequence[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for name, panels in _views(scores).items():
        blocks += [
            wr.H2(name),
            wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=panels),
        ]
    return wr.Report(
        entity=entity, project=project, title="Instruction pre-training", blocks=blocks
    )


def _arguments(words: Sequence[str]) -> dict[str, str]:
    """Raises UserError for a word that is not KEY=VALUE of a known key, and without a project."""
    given = {"project": "", "entity": "", "scores": "", "output": "outputs/workspace.json"}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in given:
            known = ", ".join(f"{key}=…" for key in given)
            raise UserError(f"{word} is none of {known}")
        given[name] = value
    if not given["project"]:
        raise UserError(f"which project? {USAGE}")
    return given
