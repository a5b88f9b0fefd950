"""The scores of each model, and their differences from the baseline."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipt.errors import MissingFileError, UserError
from ipt.evaluation.results import Results, average, compare_task, load_results
from ipt.files import read_json, read_json_lines
from ipt.report.formatting import finite
from ipt.report.measures import Measure, main_metrics, measure_of
from ipt.report.seed_statistics import compare_seeds, compare_within_seeds, plain_average

BASELINE = "vanilla"
MARKERS = "oosD^vP"  # of matplotlib; untrained models and the first trained one are circles


@dataclass(frozen=True)
class Arm:
    """One evaluated model. Arms of one name are runs of one recipe with different seeds."""

    name: str
    training: Path | None  # folder of its training stage; None: not trained, as the base model
    evaluation: Path  # folder of its evaluation stage
    seed: int = 0
    published: str = ""  # the model of the paper that it reproduces


# Scores
# ----------------------------------------------------------------------------------------------


class Reading(StrEnum):
    """What the 95% interval of a difference supports."""

    BETTER = "better"
    WORSE = "worse"
    HIGHER = "higher"
    LOWER = "lower"
    UNCLEAR = "not significant"
    NO_INTERVAL = "no interval"


@dataclass(frozen=True)
class Difference:
    """A score minus the baseline's; without an interval if the items could not be paired."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    better: int

    @property
    def reading(self) -> Reading:
        if self.low is None or self.high is None:
            return Reading.NO_INTERVAL
        if self.low <= 0 <= self.high:
            return Reading.UNCLEAR
        if not self.better:
            return Reading.HIGHER if self.low > 0 else Reading.LOWER
        return Reading.BETTER if (self.low > 0) == (self.better > 0) else Reading.WORSE

    def negated(self) -> "Difference":
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Difference(-self.value, low, high, self.p, self.better)


@dataclass(frozen=True)
class Score:
    """One metric of one task for one model: a row of results.csv."""

    arm: str
    task: str
    metric: str
    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int | None
    difference: Difference | None
    spread: float | None = None  # standard deviation over the model's seeds
    seeds: int = 1

    @property
    def measure(self) -> Measure:
        return measure_of(self.metric)

    @property
    def shown(self) -> str:
        return self.measure.show(self.value)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"{self.measure.show(self.low)} to {self.measure.show(self.high)}"

    @property
    def spread_shown(self) -> str:
        """The spread in the unit of differences."""
        return self.measure.show(self.spread, signed=True).removeprefix("+")

    @property
    def difference_shown(self) -> str:
        if self.difference is None:
            return ""
        unit = " points" if self.measure.percent else ""
        return self.measure.show(self.difference.value, signed=True) + unit

    @property
    def difference_interval(self) -> str:
        found = self.difference
        if found is None or found.low is None:
            return ""
        show = self.measure.show
        return f"{show(found.low, signed=True)} to {show(found.high, signed=True)}"


# Runs
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All arms of one name, with their files read. `results` and `summary` are means over seeds."""

    arms: tuple[Arm, ...]
    results: Results
    summary: dict[str, Any]
    curves: tuple[list[dict[str, Any]], ...]  # of each seed the records of metrics.jsonl
    colour: str
    marker: str

    @property
    def name(self) -> str:
        return self.arms[0].name

    @property
    def is_trained(self) -> bool:
        return self.arms[0].training is not None

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        return self.summary.get("sources") or {}

    @property
    def evaluations(self) -> dict[int, Path]:
        """Seed -> folder of its evaluation."""
        return {arm.seed: arm.evaluation for arm in self.arms}

    @property
    def has_predictions(self) -> bool:
        return all((arm.evaluation / "predictions").is_dir() for arm in self.arms)

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The mean record of each step that all seeds have."""
        if len(self.curves) == 1:
            return self.curves[0]
        return [_mean_record(records) for records in zip(*self.curves, strict=False)]

    @cached_property
    def chance(self) -> dict[str, float]:
        """Task -> accuracy of random guessing, from the number of options of each item."""
        levels = {}
        for path in (self.arms[0].evaluation / "predictions").glob("*.parquet"):
            level = _chance(path)
            if level is not None and level < 1:
                levels[path.stem] = level
        return levels


def load_runs(arms: Sequence[Arm]) -> list[Run]:
    """One run per name, in the order of the arms.

    Raises UserError for two arms of the same name and seed, MissingFileError for an arm without
    scores.
    """
    members: dict[str, list[Arm]] = {}
    for arm in arms:
        seeds = [other.seed for other in members.setdefault(arm.name, [])]
        if arm.seed in seeds:
            raise UserError(
                f"report: two arms have the same name and seed ({arm.name}, seed {arm.seed}): give "
                "each its own name, or its seed"
            )
        members[arm.name].append(arm)
    runs: list[Run] = []
    for found in members.values():
        trained = found[0].training is not None
        before = sum(run.is_trained == trained for run in runs)
        # Trained models get arm-1 to arm-6; the others arm-0 (grey), then the last colours.
        number = 1 + before % 6 if trained else -before % 7
        runs.append(_load_run(found, f"arm-{number}", MARKERS[number]))
    return runs


def baseline_of(runs: Sequence[Run]) -> Run | None:
    """The run that others are compared with: `vanilla`, else the first trained one."""
    trained = [run for run in runs if run.is_trained]
    named = [run for run in runs if run.name == BASELINE]
    return next(iter(named + trained), None)


def compared_runs(runs: Sequence[Run], baseline: Run | None) -> list[Run]:
    """The trained runs that are compared with the baseline."""
    return [run for run in runs if baseline is not None and run is not baseline and run.is_trained]


def _load_run(arms: list[Arm], colour: str, marker: str) -> Run:
    curves, summaries = [], []
    for arm in arms:
        steps, summary = _training_files(arm.training)
        curves.append(steps)
        summaries.append(summary)
    return Run(
        tuple(arms), _load_results(arms), _mean_record(summaries), tuple(curves), colour, marker
    )


def _training_files(folder: Path | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of metrics.jsonl and summary.json, empty where there is no such file."""
    if folder is None:
        return [], {}
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    steps = read_json_lines(metrics) if metrics.exists() else []
    return steps, read_json(summary) if summary.exists() else {}


def _load_results(arms: Sequence[Arm]) -> Results:
    """The results of one arm, or their mean over the seeds of several."""
    for arm in arms:
        path = arm.evaluation / "results.json"
        if not path.exists():
            raise MissingFileError(f"report: arm {arm.name} has no {path}: evaluate it first")
    folders = [arm.evaluation for arm in arms]
    if len(folders) == 1:
        return load_results(folders[0])
    try:
        return average(folders)
    except (UserError, FileNotFoundError):  # different items for each seed, or no predictions
        return plain_average(folders)


def _mean_record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers averaged over seeds (dropped if a seed lacks one); anything else from the first."""
    means = dict(records[0])
    for name in list(means):
        if all(record.get(name) == means[name] for record in records):
            continue
        values = [finite(record.get(name)) for record in records]
        known = [value for value in values if value is not None]
        if len(known) == len(records):
            means[name] = statistics.fmean(known)
        elif known:
            del means[name]
    return means


def _chance(predictions: Path) -> float | None:
    if "options" not in pq.read_schema(predictions).names:
        return None
    counts = pc.list_value_length(pq.read_table(predictions, columns=["options"])["options"])
    chances = [1 / count for count in counts.to_pylist() if count]
    return statistics.fmean(chances) if chances else None


# All scores
# ----------------------------------------------------------------------------------------------


def all_scores(
    runs: Sequence[Run], baseline: Run | None, unpaired: list[str] | None = None
) -> list[Score]:
    """All scores in the order of tasks, metrics, runs.

    Adds to `unpaired` a sentence for each task whose items could not be paired.
    """
    differences: dict[str, Results] = {}
    for run in runs:
        differences[run.name] = _compare(run, baseline, [] if unpaired is None else unpaired)
    scores = []
    for task in dict.fromkeys(task for run in runs for task in run.results):
        entries = [(run, run.results.get(task, {})) for run in runs]
        for metric in dict.fromkeys(metric for _, metrics in entries for metric in metrics):
            for run, metrics in entries:
                if metric in metrics:
                    paired = differences[run.name].get(task, {}).get(metric)
                    found = _difference(run, baseline, task, metric, paired)
                    scores.append(_score(run.name, task, metric, metrics[metric], found))
    return scores


def _score(
    arm: str, task: str, metric: str, entry: Mapping[str, Any], difference: Difference | None
) -> Score:
    low, high = map(finite, entry.get("ci95") or (None, None))
    if measure_of(metric).percent and low is not None and high is not None:
        low = max(low, 0.0)  # the normal interval of a mean over seeds may exceed 0 to 1
        high = min(high, 1.0)
    return Score(
        arm,
        task,
        metric,
        finite(entry.get("value")),
        finite(entry.get("stderr")),
        low,
        high,
        entry.get("n"),
        difference,
        finite(entry.get("spread")),
        entry.get("runs", 1),
    )


def _difference(
    run: Run, baseline: Run | None, task: str, metric: str, paired: Mapping[str, Any] | None
) -> Difference | None:
    """The paired difference, else that of the two values; None for the baseline itself."""
    better = measure_of(metric).better
    if paired is not None:
        low, high = map(finite, paired.get("ci95") or (None, None))
        return Difference(paired["difference"], low, high, finite(paired.get("p")), better)
    if baseline is None or run is baseline:
        return None
    value = finite(run.results[task][metric].get("value"))
    other = finite(baseline.results.get(task, {}).get(metric, {}).get("value"))
    if value is None or other is None:
        return None
    return Difference(value - other, None, None, None, better)


def _compare(run: Run, baseline: Run | None, unpaired: list[str]) -> Results:
    """Paired differences of the tasks that both have, if both kept their predictions."""
    if baseline is None or run is baseline:
        return {}
    if not (run.has_predictions and baseline.has_predictions):
        return {}
    compared: Results = {}
    for task in run.results:
        if task in baseline.results:
            try:
                compared[task] = _compare_task(run, baseline, task)
            except UserError as error:
                unpaired.append(f"{run.name} and {baseline.name}: {error}.")
    return compared


def _compare_task(run: Run, baseline: Run, task: str) -> dict[str, dict[str, Any]]:
    if len(run.arms) == len(baseline.arms) == 1:
        return compare_task(run.arms[0].evaluation, baseline.arms[0].evaluation, task)
    fixed = not (run.is_trained and baseline.is_trained)
    try:
        return compare_seeds(run.evaluations, baseline.evaluations, task, fixed)
    except UserError:
        return compare_within_seeds(run.evaluations, baseline.evaluations, task)


def main_scores(scores: Iterable[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """(task, metric) -> name of the run -> score, for the main measures only."""
    by_task: dict[str, dict[str, dict[str, Score]]] = {}
    for score in scores:
        by_task.setdefault(score.task, {}).setdefault(score.metric, {})[score.arm] = score
    table = {}
    for task, metrics in by_task.items():
        if _values(metrics.get("accuracy")) == _values(metrics.get("correct")):
            metrics.pop("correct", None)  # the same numbers under a better-known name
        for metric in main_metrics(metrics):
            table[task, metric] = metrics[metric]
    return table


def _values(scores: Mapping[str, Score] | None) -> list[float | None]:
    return [score.value for score in (scores or {}).values()]


# Training metrics
# ----------------------------------------------------------------------------------------------


def column(steps: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Trained tokens and values of one metric at the steps that have it."""
    known = list(_points(steps, name))
    return [tokens for tokens, _ in known], [value for _, value in known]


def _points(steps: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    for place, step in enumerate(steps):
        value = finite(step.get(name))
        if value is not None:
            yield step.get("tokens", step.get("step", place)), value


def median(steps: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = column(steps, name)[1]
    return statistics.median(values) if values else None
