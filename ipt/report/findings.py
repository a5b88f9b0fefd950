"""What the report says about the models: summary, main table, and notes for reading it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ipt.report.formatting import SPLITS, capital, count_of, in_words, listed, task_label
from ipt.report.measures import Measure, measure_of
from ipt.report.scores import Reading, Run, Score, compared_runs, main_scores

FEW_ITEMS = 30
NAMED = 6  # models that the first paragraph names at most
START = "start"  # the model before training, as `reproduce` names it


@dataclass(frozen=True)
class MainRow:
    """One main measure of one task: a score for each run, a difference for each compared run."""

    task: str
    measure: Measure
    n: int
    chance: str | None
    scores: list[Score | None]
    differences: list[Score | None]

    @property
    def notes(self) -> str:
        chance = f"chance: {self.chance}" if self.chance else ""
        parts = (self.measure.detail, self.measure.unit, self.measure.direction, chance)
        return "; ".join(filter(None, parts))

    @property
    def reach(self) -> float:
        """The largest absolute bound of the intervals, to which they are drawn."""
        found = [score.difference for score in self.differences if score and score.difference]
        bounds = [difference.low for difference in found] + [one.high for one in found]
        return max((abs(bound) for bound in bounds if bound is not None), default=0.0)


@dataclass(frozen=True)
class Comparison:
    """What the main measures show for one pair of models."""

    subject: str
    reference: str
    scores: dict[Reading, list[Score]]

    @property
    def total(self) -> int:
        return sum(map(len, self.scores.values()))

    @property
    def summary(self) -> str:
        """better on 3, no significant difference on 6"""
        parts = []
        for reading in Reading:
            count = len(self.scores.get(reading, []))
            if reading == Reading.UNCLEAR and count:
                parts.append(f"no significant difference on {count}")
            elif reading == Reading.NO_INTERVAL and count:
                parts.append(f"no paired interval for {count}")
            elif count:
                parts.append(f"{reading} on {count}")
        return ", ".join(parts)

    @property
    def details(self) -> list[str]:
        """Better: definition to term, recall (accuracy +8.1 points, log-probability +1.213)."""
        sentences = []
        for reading in (Reading.BETTER, Reading.WORSE, Reading.HIGHER, Reading.LOWER):
            by_task: dict[str, list[str]] = {}
            for score in self.scores.get(reading, []):
                text = f"{score.measure.label} {score.difference_shown}"
                by_task.setdefault(score.task, []).append(text)
            tasks = [f"{task_label(task)} ({', '.join(found)})" for task, found in by_task.items()]
            if tasks:
                sentences.append(f"{capital(reading)}: {'; '.join(tasks)}.")
        return sentences


def lead(runs: Sequence[Run], scores: Iterable[Score], baseline: Run | None) -> str:
    """The first paragraph: which models, trained on how much, evaluated on how many tasks."""
    trained = [run for run in runs if run.is_trained]
    others = [run.name for run in runs if not run.is_trained]
    tasks = f"on {count_of(len({score.task for score in scores}), 'task')}"
    if not trained:
        models = f"{_models(others)} {_were(others)}"
        return f"{models} evaluated {tasks}. No model was trained in this run."
    names = [run.name for run in trained]
    text = f"{_models(names)} {_were(names)} trained"
    budgets = {run.summary.get("tokens") for run in trained}
    if len(budgets) == 1 and None not in budgets:
        text += f" on {budgets.pop():,} tokens{' each' if len(trained) > 1 else ''}"
    seeds = {len(run.arms) for run in trained}
    if max(seeds) > 1:
        shown = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        text += f" ({shown} seeds per model)"
    if others == [START]:
        text += f" and compared with the base model ({START}) {tasks}."
    elif others:
        which = "which was" if len(others) == 1 else "which were"
        text += f" and compared {tasks} with {listed(others)}, {which} not trained in this run."
    else:
        text += f" and evaluated {tasks}."
    if baseline is not None and len(runs) > 1:
        text += f" Differences are relative to {baseline.name}."
    return text


def _models(names: Sequence[str]) -> str:
    """Two models (vanilla, instruct)"""
    count = capital(in_words(len(names), "model"))
    return f"{count} ({', '.join(names)})" if len(names) <= NAMED else count


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def main_table(runs: Sequence[Run], scores: Sequence[Score], baseline: Run | None) -> list[MainRow]:
    rows = []
    compared = compared_runs(runs, baseline)
    for (task, metric), by_run in main_scores(scores).items():
        measure = measure_of(metric)
        levels = [run.chance[task] for run in runs if "accuracy" in metric and task in run.chance]
        rows.append(
            MainRow(
                task,
                measure,
                n=max(score.n or 0 for score in by_run.values()),
                chance=measure.show(levels[0]) if levels else None,
                scores=[by_run.get(run.name) for run in runs],
                differences=[by_run.get(run.name) for run in compared],
            )
        )
    return rows


def comparisons(
    runs: Sequence[Run], scores: Sequence[Score], baseline: Run | None
) -> list[Comparison]:
    """Each trained run against the baseline, then the baseline against each untrained one."""
    if baseline is None:
        return []
    found = [
        _compare(run, baseline.name, run.name, scores) for run in compared_runs(runs, baseline)
    ]
    for run in runs:
        if run is not baseline and not run.is_trained:
            found.append(_compare(run, run.name, baseline.name, scores))
    return [comparison for comparison in found if comparison.scores]


def _compare(run: Run, reference: str, subject: str, scores: Sequence[Score]) -> Comparison:
    """`subject` against `reference`, from the differences of `run` from the baseline."""
    readings: dict[Reading, list[Score]] = {}
    for by_run in main_scores(scores).values():
        score = by_run.get(run.name)
        if score is not None and score.difference is not None:
            difference = score.difference
            if run.name == reference:
                difference = difference.negated()
            readings.setdefault(difference.reading, []).append(
                replace(score, difference=difference)
            )
    return Comparison(subject, reference, readings)


# Notes
# ----------------------------------------------------------------------------------------------


def reading_notes(runs: Sequence[Run], scores: Sequence[Score]) -> list[str]:
    """What a reader has to know to interpret the main table."""
    notes = []
    for split, meaning in SPLITS.items():
        if any(score.task.endswith(f"_{split}") for score in scores):
            notes.append(f"{capital(split)} tasks: {meaning}.")
    notes += _interval_notes(runs)
    main = [score for by_run in main_scores(scores).values() for score in by_run.values()]
    tested = sum(
        score.difference is not None and score.difference.low is not None for score in main
    )
    if tested:
        notes.append(
            "Intervals are not corrected for multiple comparisons: if no model differed from "
            f"another, about {max(tested * 0.05, 0.1):.1f} of the "
            f"{count_of(tested, 'difference')} in the main measures would still appear significant "
            "by chance."
        )
    if any(score.n is not None and score.n < FEW_ITEMS for score in main):
        notes.append(f"Some tasks have fewer than {FEW_ITEMS} items; their intervals are rough.")
    return notes


def _interval_notes(runs: Sequence[Run]) -> list[str]:
    """What the intervals cover, which depends on the number of seeds."""
    several = [run.name for run in runs if len(run.arms) > 1]
    if not several:
        return [
            "Intervals are 95% confidence intervals over test items. They do not cover variation "
            "between training seeds, because each model was trained once."
        ]
    single = [run.name for run in runs if run.is_trained and len(run.arms) == 1]
    which = f"Scores of {listed(several)}" if single else "Scores of trained models"
    notes = [
        f"{which} are means over training seeds. Their 95% intervals cover test items only; SD is "
        "the standard deviation between seeds.",
        "Intervals of differences cover both items and seeds (crossed random effects). Items are "
        "paired, and so are seeds if both models have the same ones. With two or three seeds these "
        "intervals are wide.",
    ]
    if single:
        notes.append(
            f"{listed(single)}: one seed; comparisons assume the seed variance of the other models."
        )
    return notes
