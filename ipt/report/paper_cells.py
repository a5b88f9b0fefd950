"""Our figures beside the paper's, cell by cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

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
from ipt.report.scores import Run, measure_of
from ipt.report.seed_statistics import with_spread

METRIC = "paper"  # what follows the published rule
MEASURE = measure_of(METRIC)


@dataclass(frozen=True)
class Cell:
    """Our figure and the published one, both as shares; the interval is ours alone, the paper gives
    none.
    """

    ours: float
    paper: float
    low: float | None
    high: float | None

    @property
    def difference(self) -> float:
        return self.ours - self.paper

    @property
    def differs(self) -> bool | None:
        """Whether the interval of the difference leaves zero out; None without an interval."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high

    @property
    def ours_shown(self) -> str:
        return MEASURE.show(self.ours)

    @property
    def paper_shown(self) -> str:
        return MEASURE.show(self.paper)

    @property
    def difference_shown(self) -> str:
        return MEASURE.show(self.difference, signed=True)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        return f"{MEASURE.show(self.low, signed=True)} to {MEASURE.show(self.high, signed=True)}"


@dataclass(frozen=True)
class PaperTable:
    """`columns`: (arm, model of the paper); `rows`: (task, or group of which it is the average; is
    average; a cell for each column).
    """

    columns: list[tuple[str, str]]
    rows: list[tuple[str, bool, list[Cell | None]]]


def paper_table(runs: Sequence[Run]) -> PaperTable | None:
    """What arms that stand for a model of the paper scored by the published rule, beside what is
    published; None if there is nothing.

    Averages are those of groups of tasks, unweighted as in the paper, where an arm has all of the
    group's tasks.
    """
    standing = [
        run
        for run in runs
        if run.arm.published and any(METRIC in metrics for metrics in run.results.values())
    ]
    if not standing:
        return None
    tasks = dict.fromkeys(
        task for run in standing for task, metrics in run.results.items() if METRIC in metrics
    )
    published = {task: _published(task, standing) for task in tasks}
    rows = [
        (task, False, [_task_cell(run, task, published[task]) for run in standing])
        for task in tasks
    ]
    for group, members in groups_of(tasks).items():
        rows.append(
            (group, True, [_average_cell(run, group, members, published) for run in standing])
        )
    rows = [row for row in rows if any(row[2])]
    return PaperTable([(run.name, run.arm.published) for run in standing], rows) if rows else None


def _published(task: str, runs: Sequence[Run]) -> Mapping[str, Any]:
    """Model -> published figure of a task, as its predictions say it, else the task that ships."""
    evaluation = next(run.arm.evaluation for run in runs if task in run.results)
    if predictions_path(evaluation, task).exists():
        return read_task(evaluation, task).published
    try:
        return load_tasks([task])[0].published
    except UserError:  # a task of the user's own
        return {}


def _task_cell(run: Run, task: str, published: Mapping[str, Any]) -> Cell | None:
    entry = run.results.get(task, {}).get(METRIC)
    return _cell(entry, published.get(run.arm.published)) if entry else None


def _average_cell(
    run: Run, group: str, tasks: Sequence[str], published: Mapping[str, Mapping[str, Any]]
) -> Cell | None:
    if any(METRIC not in run.results.get(task, {}) for task in tasks):
        return None
    entry, model = group_average(run.results, tasks, METRIC), run.arm.published
    known = read_group(group)
    figures = [float(published[task][model]) for task in tasks if model in published[task]]
    paper = (
        fmean(figures)
        if len(figures) == len(tasks)
        else (known.published if known else {}).get(model)
    )
    return _cell({**entry, **_spread(run, tasks)}, paper) if entry else None


def _spread(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """The standard deviation over seeds of the average over tasks."""
    if len(run.arms) == 1:
        return {}
    results = [load_results(arm.evaluation) for arm in run.arms]
    return {
        "spread": stdev(
            fmean(result[task][METRIC]["value"] for task in tasks) for result in results
        ),
        "runs": len(run.arms),
    }


def _cell(entry: Mapping[str, Any], paper: Any) -> Cell | None:
    ours, published = finite(entry.get("value")), finite(paper)
    if ours is None or published is None:
        return None
    interval = with_spread(entry)
    bounds = (
        (interval.low - published / 100, interval.high - published / 100)
        if interval
        else (None, None)
    )
    return Cell(ours, published / 100, *bounds)
