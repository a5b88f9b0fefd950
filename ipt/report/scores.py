"""What was measured: the scores of each arm, and what their differences from the baseline allow to
say.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ipt.errors import MissingFileError, UserError
from ipt.files import read_json, read_json_lines
from ipt.report.formatting import finite, minus, spaced

MARKERS = "oosD^vP"


@dataclass(frozen=True)
class Arm:
    """One model that was evaluated: `training` is its training stage's folder (None for the start),
    `evaluation` its evaluation stage's.

    Arms of one name are runs of one recipe with other seeds.
    """

    name: str
    training: Path | None
    evaluation: Path
    seed: int = 0
    published: str = ""  # the model of the paper that it stands for


@dataclass(frozen=True)
class Measure:
    """How a metric is called and read. `better`: 1 where higher is better, -1 where lower is, 0
    where nobody said.
    """

    label: str
    better: int = 0
    percent: bool = False
    unit: str = ""
    detail: str = ""  # what the label leaves out

    @property
    def direction(self) -> str:
        return {1: "higher is better", -1: "lower is better", 0: ""}[self.better]

    def show(self, value: float | None, signed: bool = False) -> str:
        """`value` for readers: 40.0%, −3.061; a difference with its sign, of percentages in points."""
        if value is None:
            return "–"
        sign = "+" if signed else ""
        if self.percent:
            return minus(f"{value * 100:{sign}.1f}") + ("" if signed else "%")
        return minus(f"{value:{sign},.3f}" if abs(value) < 100 else f"{value:{sign},.1f}")


MEASURES = {
    "correct": Measure("score", 1, percent=True, detail="accuracy or F1, as is right for the task"),
    "paper": Measure("score by the published rule", 1, percent=True),
    "accuracy": Measure("accuracy", 1, percent=True),
    "accuracy_sum": Measure(
        "accuracy by sum", 1, percent=True, detail="options compared by their whole log-probability"
    ),
    "accuracy_bytes": Measure(
        "accuracy by bytes",
        1,
        percent=True,
        detail="options compared by their log-probability per byte",
    ),
    "logprob": Measure("log-probability", 1, unit="nats per token", detail="of the right answer"),
    "probability": Measure("probability", 1, percent=True, detail="of the right answer"),
    "bits_per_byte": Measure("bits per byte", -1),
    "nll": Measure("negative log-likelihood", -1, unit="nats per token"),
    "perplexity": Measure("perplexity", -1),
    "contaminated": Measure(
        "contaminated", percent=True, detail="items that are in the training data"
    ),
}
# The main measures of a task: from each line the first metric that the task has. The last line
# counts for tasks without an answer.
MAIN_ANSWER_METRICS = (("correct", "accuracy", "exact_match", "f1"), ("logprob", "probability"))
MAIN_TEXT_METRICS = ("bits_per_byte", "nll", "perplexity")


def measure_of(metric: str) -> Measure:
    """The measure of a metric by its name; a name that is not known is read by its parts."""
    if metric in MEASURES:
        return MEASURES[metric]
    label = spaced(metric)
    if any(part in metric for part in ("accuracy", "exact_match", "f1", "correct", "paper")):
        return Measure(label, 1, percent=True)
    if any(part in metric for part in ("log_prob", "logprob", "log_likelihood")):
        return Measure(label, 1)
    if any(part in metric for part in ("perplexity", "bits_per", "nll", "loss")):
        return Measure(label, -1)
    return Measure(label)


@dataclass(frozen=True)
class Difference:
    """A score minus the baseline's; without an interval where the items could not be paired."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    better: int

    @property
    def reading(self) -> str:
        """What the 95% interval allows to say, and no more."""
        if self.low is None or self.high is None:
            return "no interval"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        sign = 1 if self.low > 0 else -1
        return (
            {1: "better", -1: "worse"}[sign * self.better]
            if self.better
            else {1: "higher", -1: "lower"}[sign]
        )

    def negated(self) -> "Difference":
        low, high = (None if bound is None else -bound for bound in (self.high, self.low))
        return Difference(-self.value, low, high, self.p, self.better)


@dataclass(frozen=True)
class Score:
    """One metric of one task for one arm: a row of results.csv."""

    arm: str
    task: str
    metric: str
    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int | None
    difference: Difference | None
    spread: float | None = None  # standard deviation over the arm's seeds
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
        """SD of 3 seeds 0.8; empty for one seed."""
        if self.spread is None:
            return ""
        return f"SD of {self.seeds} seeds {self.spread_alone}"

    @property
    def spread_alone(self) -> str:
        return (
            "–"
            if self.spread is None
            else self.measure.show(self.spread, signed=True).removeprefix("+")
        )

    @property
    def difference_shown(self) -> str:
        if self.difference is None:
            return ""
        return self.measure.show(self.difference.value, signed=True) + (
            " points" if self.measure.percent else ""
        )

    @property
    def difference_interval(self) -> str:
        if self.difference is None or self.difference.low is None:
            return ""
        return " to ".join(
            self.measure.show(bound, signed=True)
            for bound in (self.difference.low, self.difference.high)
        )


@dataclass(frozen=True)
class Run:
    """An arm with its files read; with several seeds, all arms of its name. `results`, `summary`
    and `steps` are means over seeds.
    """

    arms: tuple[Arm, ...]
    results: dict[str, dict[str, dict[str, Any]]]
    summary: dict[str, Any]
    courses: tuple[list[dict[str, Any]], ...]  # the records of each seed's steps
    colour: str
    marker: str

    @property
    def arm(self) -> Arm:
        return self.arms[0]

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def is_trained(self) -> bool:
        return self.arm.training is not None

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        return self.summary.get("sources") or {}

    @property
    def evaluations(self) -> dict[int, Path]:
        """Seed -> folder of its evaluation."""
        return {arm.seed: arm.evaluation for arm in self.arms}

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """A record for each step that all seeds have."""
        if len(self.courses) == 1:
            return self.courses[0]
        return [_mean_record(records) for records in zip(*self.courses, strict=False)]

    @cached_property
    def chance(self) -> dict[str, float]:
        """Task -> accuracy of guessing, from the number of options of each item."""
        paths = {
            path.stem: path for path in (self.arm.evaluation / "predictions").glob("*.parquet")
        }
        levels = {task: _guessing(path) for task, path in paths.items()}
        return {task: level for task, level in levels.items() if level is not None and level < 1}


def load_runs(arms: list[Arm]) -> list[Run]:
    """Each name's arms as one run. Raises UserError for two arms of one name and seed,
    MissingFileError for one without scores.
    """
    twice = next(
        (arm for arm, count in Counter((arm.name, arm.seed) for arm in arms).items() if count > 1),
        None,
    )
    if twice:
        names = ", ".join(arm.name for arm in arms)
        raise UserError(
            f"report: two arms have the same name and seed ({names}): give each its own name, or "
            "its seed"
        )
    runs: list[Run] = []
    numbers = {True: 0, False: 0}  # of trained arms and of others
    for name in dict.fromkeys(arm.name for arm in arms):
        members = tuple(arm for arm in arms if arm.name == name)
        trained = members[0].training is not None
        number = (
            1 + numbers[True] % 6 if trained else -numbers[False] % 7
        )  # others in the order from the end: the first is grey
        numbers[trained] += 1
        files = [_training_files(arm.training) for arm in members]
        summary = _mean_record([summary for _, summary in files])
        courses = tuple(steps for steps, _ in files)
        runs.append(
            Run(members, _results(members), summary, courses, f"arm-{number}", MARKERS[number])
        )
    return runs


def _results(arms: Sequence[Arm]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of one evaluation its results, of several their mean over seeds with the items' standard
    error and the spread apart.
    """
    from ipt.evaluation.results import average, load_results
    from ipt.report.seed_statistics import plain_average

    for arm in arms:
        if not (arm.evaluation / "results.json").exists():
            raise MissingFileError(
                f"report: arm {arm.name} has no {arm.evaluation / 'results.json'}: evaluate it "
                "first"
            )
    folders = [arm.evaluation for arm in arms]
    if len(folders) == 1:
        return load_results(folders[0])
    try:
        return average(folders)
    except (
        UserError,
        FileNotFoundError,
    ):  # each seed has items of its own, or no predictions were kept
        return plain_average(folders)


def _mean_record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers that differ as means over seeds, without those that not all have; anything else as
    the first has it.
    """
    means = dict(records[0])
    for name in [
        name for name in means if any(record.get(name) != means[name] for record in records)
    ]:
        values = [finite(record.get(name)) for record in records]
        known = [value for value in values if value is not None]
        if len(known) == len(records):
            means[name] = statistics.fmean(known)
        elif known:
            del means[name]
    return means


def _training_files(folder: Path | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    if folder is None:
        return [], {}
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    steps = read_json_lines(metrics) if metrics.exists() else []
    return steps, read_json(summary) if summary.exists() else {}


def _guessing(predictions: Path) -> float | None:
    if "options" not in pq.read_schema(predictions).names:
        return None
    counts = pc.list_value_length(pq.read_table(predictions, columns=["options"])["options"])
    options = [count for count in counts.to_pylist() if count]
    return statistics.fmean(1 / count for count in options) if options else None


def all_scores(
    runs: list[Run], baseline: Run | None, tell: Callable[[str], None] = lambda text: None
) -> list[Score]:
    """All scores in the order of tasks, metrics, arms. `tell` hears why a task could not be paired."""
    paired = {run.name: _compare(baseline, run, tell) for run in runs}
    names = dict.fromkeys(
        (task, metric)
        for run in runs
        for task, metrics in run.results.items()
        for metric in metrics
    )
    order = {task: number for number, task in enumerate(dict.fromkeys(task for task, _ in names))}
    scores = []
    for task, metric in sorted(names, key=lambda name: order[name[0]]):
        for run in runs:
            if (entry := run.results.get(task, {}).get(metric)) is not None:
                reference = (
                    baseline.results.get(task, {}).get(metric)
                    if baseline and run is not baseline
                    else None
                )
                comparison = paired[run.name].get(task, {}).get(metric)
                scores.append(_score(run.name, task, metric, entry, reference, comparison))
    return scores


def _score(
    arm: str,
    task: str,
    metric: str,
    entry: dict[str, Any],
    reference: dict[str, Any] | None,
    paired: dict[str, Any] | None,
) -> Score:
    value, better = finite(entry.get("value")), measure_of(metric).better
    low, high = (finite(bound) for bound in entry.get("ci95") or (None, None))
    if measure_of(metric).percent and low is not None and high is not None:
        low, high = (
            max(low, 0.0),
            min(high, 1.0),
        )  # the normal interval of a mean over seeds may go beyond
    difference = None
    if paired is not None:
        below, above = (finite(bound) for bound in paired.get("ci95") or (None, None))
        difference = Difference(paired["difference"], below, above, finite(paired.get("p")), better)
    elif (
        reference is not None
        and value is not None
        and (other := finite(reference.get("value"))) is not None
    ):
        difference = Difference(value - other, None, None, None, better)
    spread, seeds = finite(entry.get("spread")), entry.get("runs", 1)
    return Score(
        arm,
        task,
        metric,
        value,
        finite(entry.get("stderr")),
        low,
        high,
        entry.get("n"),
        difference,
        spread,
        seeds,
    )


def _compare(
    baseline: Run | None, run: Run, tell: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences `run` minus `baseline`, where both kept their predictions and share a
    task.
    """
    if baseline is None or run is baseline:
        return {}
    if not all(
        (arm.evaluation / "predictions").is_dir() for one in (baseline, run) for arm in one.arms
    ):
        return {}
    compared = {}
    for task in [task for task in run.results if task in baseline.results]:
        try:
            compared[task] = _compare_task(baseline, run, task)
        except UserError as error:
            tell(f"{run.name} and {baseline.name} could not be paired: {error}.")
    return compared


def _compare_task(baseline: Run, run: Run, task: str) -> dict[str, dict[str, Any]]:
    from ipt.evaluation.results import compare_task
    from ipt.report.seed_statistics import compare_seeds, compare_within_seeds

    if len(run.arms) == len(baseline.arms) == 1:
        return compare_task(run.arm.evaluation, baseline.arm.evaluation, task)
    try:
        return compare_seeds(
            run.evaluations,
            baseline.evaluations,
            task,
            fixed=not (run.is_trained and baseline.is_trained),
        )
    except UserError:
        return compare_within_seeds(run.evaluations, baseline.evaluations, task)


def main_metrics(metrics: Iterable[str]) -> list[str]:
    present = set(metrics)
    chosen = [
        next((name for name in names if name in present), None) for names in MAIN_ANSWER_METRICS
    ]
    answers = [name for name in chosen if name]
    return (
        answers
        or [name for name in MAIN_TEXT_METRICS if name in present][:1]
        or sorted(present)[:1]
    )


def main_scores(scores: list[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """(task, metric) -> arm -> score, for the main measures only."""
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for score in scores:
        metrics.setdefault(score.task, {}).setdefault(score.metric, []).append(score.value)
    for values in metrics.values():
        if values.get("accuracy") == values.get("correct"):
            values.pop("correct", None)  # the same by its better-known name
    main = {task: main_metrics(values) for task, values in metrics.items()}
    table: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        if score.metric in main[score.task]:
            table.setdefault((score.task, score.metric), {})[score.arm] = score
    return table


def against_baseline(runs: list[Run], baseline: Run | None) -> list[Run]:
    """The trained arms that are measured against the baseline."""
    return [run for run in runs if baseline is not None and run is not baseline and run.is_trained]


def column(steps: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Trained tokens and values of one metric at the steps that have it."""
    numbers = (
        (step.get("tokens", step.get("step", place)), finite(step.get(name)))
        for place, step in enumerate(steps)
    )
    known = [(tokens, value) for tokens, value in numbers if value is not None]
    return [tokens for tokens, _ in known], [value for _, value in known]


def median(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = column(steps, name)[1]
    return statistics.median(values) if values else None
