"""Our scores next to the published ones, for arms that name the model of the paper they reproduce
(`published`, as in conf/experiment/table1.yaml).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ipt.errors import UserError
from ipt.evaluation.results import (
    group_average,
    groups_of,
    load_results,
    predictions_path,
    read_task,
)
from ipt.evaluation.task import load_tasks, read_group
from ipt.report.formatting import finite
from ipt.report.measures import measure_of
from ipt.report.scores import Difference, Run, Score
from ipt.report.seed_statistics import with_spread

METRIC = "paper"  # the metric that the paper reports


class Cell(NamedTuple):
    """Our score, whose difference is taken from the published one. Both are fractions of 1."""

    score: Score
    paper: float

    @property
    def paper_shown(self) -> str:
        return self.score.measure.show(self.paper)


class Row(NamedTuple):
    """A task, or the average over a group of tasks, with a cell for each run."""

    name: str
    is_average: bool
    cells: list[Cell | None]


@dataclass(frozen=True)
class PaperTable:
    runs: list[Run]
    rows: list[Row]


def paper_table(runs: Sequence[Run]) -> PaperTable | None:
    """The scores of runs that reproduce a model of the paper; None if nothing can be compared.

    Groups of tasks are averaged without weights, as in the paper, if a run has all their tasks.
    """
    published = [run for run in runs if run.arms[0].published]
    tasks: dict[str, Mapping[str, Any]] = {}  # task -> model of the paper -> score in percent
    for run in published:
        for task, metrics in run.results.items():
            if METRIC in metrics and task not in tasks:
                tasks[task] = _published(run, task)
    rows = []
    for task, scores in tasks.items():
        cells = [_task_cell(run, task, scores) for run in published]
        rows.append(Row(task, False, cells))
    for group, members in groups_of(tasks).items():
        cells = [_average_cell(run, group, members, tasks) for run in published]
        rows.append(Row(group, True, cells))
    rows = [row for row in rows if any(row.cells)]
    return PaperTable(published, rows) if rows else None


def _published(run: Run, task: str) -> Mapping[str, Any]:
    """The published scores of a task, from its predictions, else from the task that ships."""
    evaluation = run.arms[0].evaluation
    if predictions_path(evaluation, task).exists():
        return read_task(evaluation, task).published
    try:
        return load_tasks([task])[0].published
    except UserError:  # a task of the user's own
        return {}


def _task_cell(run: Run, task: str, published: Mapping[str, Any]) -> Cell | None:
    entry = run.results.get(task, {}).get(METRIC, {})
    return _cell(run, task, entry, published.get(run.arms[0].published))


def _average_cell(
    run: Run, group: str, tasks: Sequence[str], published: Mapping[str, Mapping[str, Any]]
) -> Cell | None:
    if any(METRIC not in run.results.get(task, {}) for task in tasks):
        return None
    model = run.arms[0].published
    scores = [float(published[task][model]) for task in tasks if model in published[task]]
    known = read_group(group)
    paper = known.published.get(model) if known else None
    if len(scores) == len(tasks):
        paper = fmean(scores)
    entry = group_average(run.results, tasks, METRIC) or {}
    return _cell(run, group, entry | _spread(run, tasks), paper)


def _spread(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """The standard deviation over seeds of the average over tasks."""
    averages = []
    for arm in run.arms:
        results = load_results(arm.evaluation)
        averages.append(fmean(results[task][METRIC]["value"] for task in tasks))
    return {"spread": stdev(averages), "runs": len(averages)} if len(averages) > 1 else {}


def _cell(run: Run, name: str, entry: Mapping[str, Any], percent: Any) -> Cell | None:
    ours, published = finite(entry.get("value")), finite(percent)
    if ours is None or published is None:
        return None
    paper = published / 100
    interval = with_spread(entry)
    low = interval.low - paper if interval else None
    high = interval.high - paper if interval else None
    difference = Difference(ours - paper, low, high, None, measure_of(METRIC).better)
    return Cell(Score(run.name, name, METRIC, ours, None, None, None, None, difference), paper)
