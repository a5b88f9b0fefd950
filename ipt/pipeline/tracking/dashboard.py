"""`python -m ipt dashboard project=…`: a workspace and a report on Weights & Biases with the views
that matter.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.cli import exit_on_user_error
from ipt.errors import UserError
from ipt.files import write_json
from ipt.training.wandb_mode import ONLINE, has_key, wandb_mode

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

USAGE = (
    "usage: python -m ipt dashboard project=NAME [entity=NAME] [scores=TASK/METRIC,...] "
    "[output=FILE]"
)
RATIO = "mixture.ratios.instruction"
QUALITY = (
    "pairs",
    "grounded_rate",
    "judge/accuracy",
    "judge/relevance",
)  # of `synthesis/...` in a run's summary


def main() -> None:
    """Read the command line and make the views; a user's mistake is one line and exit code 1."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        return print(USAGE)
    with exit_on_user_error():
        given = _arguments(sys.argv[1:])
        scores = [score for score in given["scores"].split(",") if score]
        print(dashboard(given["project"], given["entity"], scores, Path(given["output"])))


def dashboard(project: str, entity: str, scores: Sequence[str], output: Path) -> str:
    """Make the workspace and the report of a project and return what to say of them.

    Without a key the workspace is written to `output` as JSON. `scores` are names of figures of
    evaluations, TASK/METRIC, that are put against the ratio beside the loss. Raises UserError where
    the extra is not installed.
    """
    space = workspace(project, entity, scores)
    if not has_key() or wandb_mode(None).mode != ONLINE:
        write_json(
            output, json.loads(space._to_model().model_dump_json(by_alias=True, exclude_none=True))
        )
        advice = (
            "run `wandb login`, or unset WANDB_MODE, then this command again, to have it on W&B"
        )
        return f"workspace: {output} (no key is configured, or W&B is offline: {advice})"
    space.save()
    report = _report(project, entity, scores)
    report.save()
    return f"workspace: {space.url}\nreport: {report.url}"


def workspace(project: str, entity: str, scores: Sequence[str] = ()) -> "ws.Workspace":
    """The views of a project, one section for each question. Raises UserError where the extra is
    not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "a dashboard needs wandb-workspaces: pip install 'ipt[dashboard]'"
        ) from None
    sections = [
        ws.Section(name=name, panels=panels, is_open=True)
        for name, panels in _views(scores).items()
    ]
    return ws.Workspace(
        entity=entity, project=project, name="Instruction pre-training", sections=sections
    )


def _views(scores: Sequence[str]) -> dict[str, list[Any]]:
    import wandb_workspaces.reports.v2 as wr

    def curve(title: str, *metrics: str) -> Any:
        return wr.LinePlot(title=title, x="tokens", y=list(metrics))

    against = [
        wr.ScatterPlot(
            title=f"{name} against the share of instructions",
            x=wr.Config(RATIO),
            y=wr.SummaryMetric(name),
        )
        for name in ("loss", *scores)
    ]
    return {
        "Which ratio?": against,
        "Loss": [
            curve("loss", "loss"),
            wr.LinePlot(title="loss by source", x="tokens", metric_regex="loss/.*"),
        ],
        "Throughput": [
            curve("tokens/s of each device", "tokens_per_second"),
            curve("MFU", "mfu"),
            curve("share of time waiting for data", "data_wait"),
        ],
        "Stability": [
            curve("skipped steps", "skipped"),
            curve("gradient norm", "grad_norm"),
            curve("learning rate", "lr"),
        ],
        "Synthesis": [
            *(
                wr.BarPlot(title=name, metrics=[wr.SummaryMetric(f"synthesis/{name}")])
                for name in QUALITY
            ),
            wr.WeavePanelSummaryTable(table_name="pairs"),
        ],
        "Evaluation": [
            wr.WeavePanelSummaryTable(table_name=name) for name in ("results", "predictions")
        ],
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
            raise UserError(f"{word} is none of {', '.join(f'{known}=…' for known in given)}")
        given[name] = value
    if not given["project"]:
        raise UserError(f"which project? {USAGE}")
    return given
