"""The report of a run: one page that opens from disk without any server, its figures as PNG, and all scores as CSV.

Figures are drawn once. The PNG has a white ground; in the page the same drawing is inline SVG whose colours are CSS variables,
so that it follows the reader's light or dark setting.
"""

import base64
import csv
import hashlib
import heapq
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from ipt.stage import atomic, hash_json, read_parts
from ipt.synthesis.quality import examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_DOCUMENTS, SHOWN_TEXTS = 4, 2
SHOWN_CHARACTERS, FOLDED_CHARACTERS = 1200, 20_000  # of one text: in sight, and at most so many more behind a fold
SAMPLED_ROWS = 50_000  # rows among which the shown texts are drawn; keeps the report quick on large corpora

# Role -> colour on a light and on a dark page. Arms differ in lightness too, so that they stay apart under the three forms of colour
# blindness, and have a contrast of 4.5:1 against the ground, for their labels.
PALETTE = {
    "ink": ("#1b2330", "#e8ebf0"),
    "muted": ("#596273", "#a3adbb"),
    "rule": ("#d8dde5", "#363f4c"),
    "bar": ("#7d8ca3", "#8091ab"),
    "bar-pale": ("#d3dae4", "#3d4857"),
    "arm-0": ("#5a5f71", "#acadb6"),
    "arm-1": ("#026ee6", "#538dfd"),
    "arm-2": ("#b45c06", "#fc7508"),
    "arm-3": ("#01432f", "#96f8ac"),
    "arm-4": ("#520260", "#b078b1"),
    "arm-5": ("#575100", "#f0f23b"),
    "arm-6": ("#5523b7", "#e6bbfc"),
}
MARKERS = "oosD^vP"


@dataclass(frozen=True)
class Arm:
    """One model that was evaluated: `training` is its training stage's folder (None for the start), `evaluation` its evaluation stage's."""

    name: str
    training: Path | None
    evaluation: Path


def write_report(
    output: Path,
    *,
    title: str,
    config_yaml: str,
    arms: list[Arm],
    pairs: Path | None,
    texts: Path | None,
    stages: list[dict[str, Any]],
    quality: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write `report.html`, `results.csv` and `figures/*.png` to `output` and return counts for the stage's statistics.

    `pairs` and `texts` are the synthesis and rendering stages' folders, or None where there is nothing to show. `stages` holds
    one {"name", "folder", "seconds", "reused", "stats"} per stage; every field of `stages`, `quality` and `facts` is optional.
    Differences are measured against the arm called "vanilla", else against the first trained one.
    Raises FileNotFoundError if an arm has no results.json, ValueError if two arms have the same name.
    """
    runs = _load_runs(arms)
    baseline = next((run for run in runs if run.name == "vanilla"), next((run for run in runs if run.is_trained), None))
    scores = _scores(runs, baseline)
    figures = _draw_figures(runs, scores, stages)
    page = {
        "title": title,
        "facts": facts,
        "palette": PALETTE,
        **_findings(runs, scores, baseline),
        "figures": figures,
        "documents": _example_documents(pairs),
        "texts": _example_texts(texts),
        "quality": _quality_table(quality),
        "stages": stages,
        "config_yaml": config_yaml,
    }
    for name, figure in figures.items():
        with atomic(output / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(figure.png)
    _write_csv(output / "results.csv", scores, baseline)
    with atomic(output / "report.html") as temporary:
        temporary.write_text(_environment().get_template("report.html.jinja").render(page), encoding="utf-8")
    differences = (score.difference for row in page["verdict"] for score in row["differences"] if score is not None)
    readings = Counter(difference.reading for difference in differences if difference is not None)
    return {
        "arms": len(runs),
        "tasks": len({score.task for score in scores}),
        "scores": len(scores),
        "figures": list(figures),
        "main_differences": dict(sorted(readings.items())),
    }


# What was measured ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """How a metric is called and read. `better`: 1 where higher is better, -1 where lower is, 0 where nobody said."""

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
            return _minus(f"{value * 100:{sign}.1f}") + ("" if signed else "%")
        return _minus(f"{value:{sign},.3f}" if abs(value) < 100 else f"{value:{sign},.1f}")


MEASURES = {
    "accuracy": Measure("accuracy", 1, percent=True),
    "accuracy_sum": Measure("accuracy by sum", 1, percent=True, detail="options compared by their whole log-probability"),
    "logprob": Measure("log-probability", 1, unit="nats per token", detail="of the right answer"),
    "probability": Measure("probability", 1, percent=True, detail="of the right answer"),
    "bits_per_byte": Measure("bits per byte", -1),
    "nll": Measure("negative log-likelihood", -1, unit="nats per token"),
    "perplexity": Measure("perplexity", -1),
}
# The main measures of a task: from each line the first metric that the task has. The last line counts for tasks without an answer.
MAIN_ANSWER_METRICS = (("accuracy", "exact_match", "f1"), ("logprob", "probability"))
MAIN_TEXT_METRICS = ("bits_per_byte", "nll", "perplexity")

SPLITS = {
    "recall": "questions about what the training documents say, none of which stands there as it is asked",
    "generalisation": "questions about what was held out of all training documents",
}


def measure_of(metric: str) -> Measure:
    """The measure of a metric by its name; a name that is not known is read by its parts."""
    if metric in MEASURES:
        return MEASURES[metric]
    label = _words(metric)
    if any(part in metric for part in ("accuracy", "exact_match", "f1")):
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
        return {1: "better", -1: "worse"}[sign * self.better] if self.better else {1: "higher", -1: "lower"}[sign]

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
    def difference_shown(self) -> str:
        if self.difference is None:
            return ""
        return self.measure.show(self.difference.value, signed=True) + (" points" if self.measure.percent else "")

    @property
    def difference_interval(self) -> str:
        if self.difference is None or self.difference.low is None:
            return ""
        return " to ".join(self.measure.show(bound, signed=True) for bound in (self.difference.low, self.difference.high))


@dataclass(frozen=True)
class _Run:
    """An arm with its files read."""

    arm: Arm
    results: dict[str, dict[str, dict[str, Any]]]
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    colour: str
    marker: str

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def is_trained(self) -> bool:
        return self.arm.training is not None

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        return self.summary.get("sources") or {}

    @cached_property
    def chance(self) -> dict[str, float]:
        """Task -> accuracy of guessing, from the number of options of each item."""
        paths = {path.stem: path for path in (self.arm.evaluation / "predictions").glob("*.parquet")}
        levels = {task: _guessing(path) for task, path in paths.items()}
        return {task: level for task, level in levels.items() if level is not None and level < 1}


def _load_runs(arms: list[Arm]) -> list[_Run]:
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"report: two arms have the same name ({', '.join(names)}): give each its own")
    trained = 0
    runs = []
    for arm in arms:
        results = arm.evaluation / "results.json"
        if not results.exists():
            raise FileNotFoundError(f"report: arm {arm.name} has no {results}: evaluate it first")
        trained += arm.training is not None
        number = 0 if arm.training is None else 1 + (trained - 1) % 6
        steps, summary = _training_files(arm.training)
        runs.append(_Run(arm, json.loads(results.read_text()), summary, steps, f"arm-{number}", MARKERS[number]))
    return runs


def _training_files(folder: Path | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    if folder is None:
        return [], {}
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return steps, json.loads(summary.read_text()) if summary.exists() else {}


def _guessing(predictions: Path) -> float | None:
    if "options" not in pq.read_schema(predictions).names:
        return None
    counts = pc.list_value_length(pq.read_table(predictions, columns=["options"])["options"])
    options = [count for count in counts.to_pylist() if count]
    return statistics.fmean(1 / count for count in options) if options else None


def _scores(runs: list[_Run], baseline: _Run | None) -> list[Score]:
    """All scores in the order of tasks, metrics, arms."""
    paired = {run.name: _compare(baseline, run) for run in runs}
    names = dict.fromkeys((task, metric) for run in runs for task, metrics in run.results.items() for metric in metrics)
    order = {task: number for number, task in enumerate(dict.fromkeys(task for task, _ in names))}
    scores = []
    for task, metric in sorted(names, key=lambda name: order[name[0]]):
        for run in runs:
            if (entry := run.results.get(task, {}).get(metric)) is not None:
                reference = baseline.results.get(task, {}).get(metric) if baseline and run is not baseline else None
                comparison = paired[run.name].get(task, {}).get(metric)
                scores.append(_score(run.name, task, metric, entry, reference, comparison))
    return scores


def _score(
    arm: str, task: str, metric: str, entry: dict[str, Any], reference: dict[str, Any] | None, paired: dict[str, Any] | None
) -> Score:
    value, better = _number(entry.get("value")), measure_of(metric).better
    low, high = (_number(bound) for bound in entry.get("ci95") or (None, None))
    difference = None
    if paired is not None:
        below, above = (_number(bound) for bound in paired.get("ci95") or (None, None))
        difference = Difference(paired["difference"], below, above, _number(paired.get("p")), better)
    elif reference is not None and value is not None and (other := _number(reference.get("value"))) is not None:
        difference = Difference(value - other, None, None, None, better)
    return Score(arm, task, metric, value, _number(entry.get("stderr")), low, high, entry.get("n"), difference)


def _compare(baseline: _Run | None, run: _Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences `run` minus `baseline`, where both kept their predictions and share a task."""
    if baseline is None or run is baseline or not run.results.keys() & baseline.results.keys():
        return {}
    if not all((one.arm.evaluation / "predictions").is_dir() for one in (baseline, run)):
        return {}
    from ipt.evaluation.results import compare

    return compare(run.arm.evaluation, baseline.arm.evaluation)


def _write_csv(path: Path, scores: list[Score], baseline: _Run | None) -> None:
    names = ["arm", "task", "metric", "value", "stderr", "ci95_low", "ci95_high", "n"]
    names += ["baseline", "difference", "difference_ci95_low", "difference_ci95_high", "difference_p"]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for score in scores:
            row = [score.arm, score.task, score.metric, score.value, score.stderr, score.low, score.high, score.n]
            if (difference := score.difference) is not None and baseline is not None:
                row += [baseline.name, difference.value, difference.low, difference.high, difference.p]
            writer.writerow(row + [None] * (len(names) - len(row)))


# What it says --------------------------------------------------------------------------------------------------------


def _findings(runs: list[_Run], scores: list[Score], baseline: _Run | None) -> dict[str, Any]:
    """What the page says about the models."""
    return {
        "lead": _lead(runs, scores, baseline),
        "runs": runs,
        "baseline": baseline,
        "compared": _compared(runs, baseline),
        "sentences": _sentences(runs, scores, baseline),
        "verdict": _verdict(runs, scores, baseline),
        "notes": _notes(scores),
        "training": _training_table(runs),
        "scores": scores,
    }


def _main_metrics(metrics: Iterable[str]) -> list[str]:
    present = set(metrics)
    chosen = [next((name for name in names if name in present), None) for names in MAIN_ANSWER_METRICS]
    answers = [name for name in chosen if name]
    return answers or [name for name in MAIN_TEXT_METRICS if name in present][:1] or sorted(present)[:1]


def _main_scores(scores: list[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """(task, metric) -> arm -> score, for the main measures only."""
    metrics: dict[str, list[str]] = {}
    for score in scores:
        metrics.setdefault(score.task, []).append(score.metric)
    main = {task: _main_metrics(names) for task, names in metrics.items()}
    table: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        if score.metric in main[score.task]:
            table.setdefault((score.task, score.metric), {})[score.arm] = score
    return table


def _verdict(runs: list[_Run], scores: list[Score], baseline: _Run | None) -> list[dict[str, Any]]:
    """One row per main measure: the score of each arm, and the difference of each trained arm from the baseline."""
    rows = []
    for (task, metric), by_arm in _main_scores(scores).items():
        measure = measure_of(metric)
        chance = next((run.chance[task] for run in runs if task in run.chance), None) if "accuracy" in metric else None
        differences = [by_arm.get(run.name) for run in _compared(runs, baseline)]
        bounds = [score.difference.low for score in differences if score and score.difference]
        bounds += [score.difference.high for score in differences if score and score.difference]
        rows.append(
            {
                "task": task,
                "measure": measure,
                "n": max((score.n or 0 for score in by_arm.values()), default=0),
                "chance": None if chance is None else measure.show(chance),
                "values": [by_arm.get(run.name) for run in runs],
                "differences": differences,
                "reach": max((abs(bound) for bound in bounds if bound is not None), default=0.0),
            }
        )
    return rows


def _compared(runs: list[_Run], baseline: _Run | None) -> list[_Run]:
    """The trained arms that are measured against the baseline."""
    return [run for run in runs if baseline is not None and run is not baseline and run.is_trained]


def _sentences(runs: list[_Run], scores: list[Score], baseline: _Run | None) -> list[dict[str, Any]]:
    """What the main measures say of each pair of models: lists of differences by their reading."""
    if baseline is None:
        return []
    main = [score for by_arm in _main_scores(scores).values() for score in by_arm.values() if score.difference]
    compared = [(run.name, baseline.name, run.name, False) for run in _compared(runs, baseline)]
    compared += [(baseline.name, run.name, run.name, True) for run in runs if run is not baseline and not run.is_trained]
    sentences = []
    for subject, reference, arm, turned in compared:
        readings: dict[str, list[Score]] = {}
        for score in main:
            if score.arm == arm and score.difference is not None:
                difference = score.difference.negated() if turned else score.difference
                readings.setdefault(difference.reading, []).append(replace(score, difference=difference))
        if readings:
            counts = {reading: len(found) for reading, found in readings.items()}
            details = {reading: _spelled_out(found) for reading, found in readings.items()}
            sentences.append({"subject": subject, "reference": reference, "counts": counts, "details": details})
    return sentences


def _spelled_out(scores: list[Score]) -> str:
    """definition to term, recall (accuracy +8.1 points, log-probability +1.213); …"""
    by_task: dict[str, list[str]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(f"{score.measure.label} {score.difference_shown}")
    return "; ".join(f"{_task_label(task)} ({', '.join(found)})" for task, found in by_task.items())


def _lead(runs: list[_Run], scores: list[Score], baseline: _Run | None) -> str:
    trained = [run.name for run in runs if run.is_trained]
    others = [run.name for run in runs if not run.is_trained]
    scored = f"scored on {_plural(len({score.task for score in scores}), 'task')}"
    if not trained:
        return f"{_plural(len(others), 'model')}, {_listed(others)}, {'was' if len(others) == 1 else 'were'} {scored}; nothing was trained."
    budgets = {run.summary.get("tokens") for run in runs if run.is_trained}
    budget = ""
    if len(budgets) == 1 and None not in budgets:
        budget = f" on {budgets.pop():,} tokens{' each' if len(trained) > 1 else ''}"
    lead = f"{_plural(len(trained), 'model')}, {_listed(trained)}, {'was' if len(trained) == 1 else 'were'} trained{budget} and {scored}"
    lead += f" beside {_listed(others)}, not trained here." if others else "."
    return lead + (f" Every difference is measured against {baseline.name}." if baseline and len(runs) > 1 else "")


def _notes(scores: list[Score]) -> list[str]:
    """What a reader must keep in mind before believing the table."""
    main = [score for by_arm in _main_scores(scores).values() for score in by_arm.values()]
    tested = sum(score.difference is not None and score.difference.low is not None for score in main)
    notes = [
        "Intervals are 95% and cover the choice of questions and documents. They do not cover the training seed: "
        "one training run stands behind each arm."
    ]
    if tested:
        notes.append(
            f"The intervals are not corrected for the number of comparisons: of {_plural(tested, 'difference')} in the main measures, "
            f"about {max(tested * 0.05, 0.1):.1f} would exclude zero by chance alone if no model differed from another."
        )
    if any(score.n is not None and score.n < 30 for score in main):
        notes.append("Some tasks have fewer than 30 items; their intervals are rough.")
    splits = {suffix for suffix in SPLITS if any(score.task.endswith(f"_{suffix}") for score in scores)}
    return [f"{suffix.capitalize()}: {SPLITS[suffix]}." for suffix in SPLITS if suffix in splits] + notes


def _training_table(runs: list[_Run]) -> list[tuple[str, list[tuple[str, float | None, str]]]]:
    """Columns of (heading, [(arm, value, value for readers)]); a column that no arm can fill is left out."""
    trained = [run for run in runs if run.steps or run.summary]
    columns: list[tuple[str, Callable[[_Run], float | None], Callable[[float], str]]] = [
        ("parameters", lambda run: run.summary.get("parameters"), _count),
        ("tokens", lambda run: run.summary.get("tokens"), _count),
        ("steps", lambda run: run.summary.get("steps", len(run.steps) or None), _count),
        ("loss, first step", lambda run: next(iter(_column(run.steps, "loss")[1]), None), "{:.3f}".format),
        ("loss, last step", lambda run: run.summary.get("final_loss"), "{:.3f}".format),
        ("skipped steps", lambda run: sum(_column(run.steps, "skipped")[1]) if run.steps else None, _count),
        ("tokens per second, median", lambda run: _median(run.steps, "tokens_per_second"), _count),
        ("MFU, median", lambda run: _median(run.steps, "mfu"), "{:.1%}".format),
        ("training FLOPs", lambda run: run.summary.get("flops"), "{:.2e}".format),
        ("time", lambda run: run.summary.get("seconds"), duration),
    ]
    table = []
    for heading, read, show in columns:
        values = [(run.name, _number(read(run))) for run in trained]
        if any(value is not None for _, value in values):
            table.append((heading, [(name, value, "–" if value is None else show(value)) for name, value in values]))
    return table


QUALITY = {  # statistic of the synthesis stage -> what it is called and what it means
    "documents": ("documents", "that went into synthesis"),
    "documents_with_pairs": ("documents with pairs", "at least one pair from one of their pieces"),
    "documents_without_pairs": ("documents without pairs", "generated, but nothing could be read from it"),
    "dropped": ("documents dropped", "never generated, by reason"),
    "long_documents": ("long documents", "split into pieces or truncated to fit the context window"),
    "rows": ("generations", "one for each document or piece"),
    "joined": ("joined generations", "continue the text of the one before them in a chain"),
    "pairs": ("pairs", ""),
    "pairs_per_row": ("pairs per generation", ""),
    "well_formed_rate": ("well-formed generations", "not cut, gave a pair, and the parser rejected nothing but repeated questions"),
    "distinct_question_rate": ("distinct questions", "of all questions of all documents"),
    "repeated_question_rate": ("repeated questions", "of all questions written, those dropped because their document had them before"),
    "grounded_rate": ("grounded answers", "at least four fifths of their words occur in the document"),
    "what_is_share": ("questions that begin with What is or What are", ""),
    "stock_question_share": ("stock questions", "have one of the ten most frequent frames"),
    "frames": ("most frequent frames", "_ stands for words taken from the document"),
    "question_words": ("words per question", "mean"),
    "answer_words": ("words per answer", "mean"),
    "prompt_tokens": ("prompt tokens", ""),
    "cached_tokens": ("prompt tokens from the prefix cache", ""),
    "generated_tokens": ("generated tokens", ""),
    "rejected": ("rejected pieces", "of generations, by reason"),
    "finish_reasons": ("why generations ended", ""),
    "session": ("last session", "generation only; a resumed stage has several"),
}


def _quality_table(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, meaning) for readers; a statistic that is not known here comes last and is shown by its key."""
    rows = []
    for key in [known for known in QUALITY if known in quality] + [other for other in quality if other not in QUALITY]:
        value = quality[key]
        name, meaning = QUALITY.get(key, (_words(key), ""))
        is_share = key.endswith(("_rate", "_share")) and _number(value) is not None
        rows.append((name, f"{value:.1%}" if is_share else _plain(value), meaning))
    return rows


# Examples ------------------------------------------------------------------------------------------------------------


def _example_documents(pairs: Path | None) -> dict[str, Any] | None:
    """A few documents with their pairs, drawn at random: nobody chose them for their looks."""
    if pairs is None:
        return None
    folder = _parts(pairs, "pairs")
    shown = examples(folder, SHOWN_DOCUMENTS, seed=0)
    return {"rows": [{**row, **_folded(row["text"])} for row in shown], "total": _count_rows(folder)}


def _example_texts(texts: Path | None) -> dict[str, Any] | None:
    """A few texts that hold pairs, those whose ids have the smallest hashes."""
    if texts is None:
        return None
    folder = _parts(texts, "texts")
    rows = islice(read_parts(folder, ["id", "text", "n_shots", "n_pairs", "layout"]), SAMPLED_ROWS)
    shown = heapq.nsmallest(SHOWN_TEXTS, (row for row in rows if row["n_pairs"]), key=lambda row: hash_json(row["id"]))
    return {"rows": [{**row, **_folded(row["text"])} for row in shown], "total": _count_rows(folder)}


def _parts(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _count_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("part-*.parquet"))


def _folded(text: str) -> dict[str, Any]:
    """`text` in two, cut between words: what is in sight and what is folded, and how many characters are left out of both."""
    if len(text) <= SHOWN_CHARACTERS:
        return {"text": text, "folded": "", "left_out": 0}
    cut = text.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)
    cut = cut if cut > 0 else SHOWN_CHARACTERS
    end = cut + FOLDED_CHARACTERS
    return {"text": text[:cut], "folded": text[cut:end], "left_out": max(0, len(text) - end)}


# Figures -------------------------------------------------------------------------------------------------------------


STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": PALETTE["ink"][0],
    "text.parse_math": False,
    "axes.edgecolor": PALETTE["rule"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.7,
    "xtick.color": PALETTE["rule"][0],
    "ytick.color": PALETTE["rule"][0],
    "xtick.labelcolor": PALETTE["muted"][0],
    "ytick.labelcolor": PALETTE["ink"][0],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}
CURVE_POINTS = 1000  # at most so many points of a curve are drawn


@dataclass(frozen=True)
class _Drawing:
    svg: Markup
    png: bytes


def _draw_figures(runs: list[_Run], scores: list[Score], stages: list[dict[str, Any]]) -> dict[str, _Drawing]:
    """Name -> drawing, for each figure that has something to show."""
    import matplotlib

    drawings = {}
    with matplotlib.rc_context(STYLE):
        drawn = {
            "losses": _loss_figure(runs),
            "scores": _score_figure(runs, scores),
            "sources": _source_figure(runs),
            "stages": _stage_figure(stages),
        }
        for name, found in drawn.items():
            if found is not None:
                figure, description = found
                with matplotlib.rc_context({"svg.hashsalt": name}):  # ids are the same in every run, and no two figures share one
                    svg = _inline_svg(figure, description)
                figure.set_layout_engine("none")  # it is laid out now, and the PNG is the same drawing
                drawings[name] = _Drawing(svg, _png(figure))
    return drawings


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _inline_svg(figure: "Figure", description: str) -> Markup:
    """The figure as an SVG element for the page: colours by role, the page's font, nothing that HTML does not need."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    opening, drawing = svg[svg.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing).replace("xlink:href", "href")
    drawing = re.sub(r" font-family: [^;\"]*;?", "", drawing)
    for role, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{role})")
    label = Markup.escape(description)
    return Markup(f'<svg role="img" aria-label="{label}" {view.group()}>{drawing}')  # matplotlib has escaped what it drew


def _colour(role: str) -> str:
    return PALETTE[role][0]


def _loss_figure(runs: list[_Run]) -> "tuple[Figure, str] | None":
    """Loss against trained tokens: of all tokens, and of each source alone."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    trained = [run for run in runs if run.steps]
    sources = dict.fromkeys(name for run in trained for step in run.steps for name in step if name.startswith("loss/"))
    names = ["loss", *sources] if len(sources) > 1 else ["loss"]
    if not trained:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(10, 0.4 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        ends = [end for run in trained if (end := _draw_loss(axes, run, name)) is not None]
        axes.set_title("all trained tokens" if name == "loss" else f"source: {name.removeprefix('loss/')}")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(length=0, labelleft=True)
        axes.set_xlabel("trained tokens")
        axes.margins(x=0)
        axes.set_xlim(left=0)
        _label_ends(axes, ends)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("loss, nats per token")
    last = [f"{run.name} {_column(run.steps, 'loss')[1][-1]:.3f}" for run in trained if _column(run.steps, "loss")[1]]
    return figure, f"Training loss against trained tokens. Loss of the last step: {', '.join(last)}."


def _draw_loss(axes: "Axes", run: _Run, name: str) -> tuple[float, str, str] | None:
    """Draw one curve, single steps pale and their trailing mean in full colour; return where it ends."""
    import numpy as np

    tokens, losses = _column(run.steps, name)
    if not losses:
        return None
    colour, window = _colour(run.colour), max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    stride = math.ceil(len(losses) / CURVE_POINTS)  # counted from the end, so that the last step is always drawn
    if window > 1:
        axes.plot(tokens[::-stride], losses[::-stride], color=colour, alpha=0.22, linewidth=0.9)
    axes.plot(tokens[window - 1 :][::-stride], smooth[::-stride], color=colour)
    return float(smooth[-1]), run.name, colour


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name beside its end, kept apart where curves meet."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.065
    heights: list[float] = []
    for height, name, colour in sorted(ends):
        heights.append(max(height, heights[-1] + gap) if heights else height)
        axes.text(1.02, heights[-1], name, color=colour, transform=axes.get_yaxis_transform(), va="center", fontweight="bold", fontsize=8.5)


def _score_figure(runs: list[_Run], scores: list[Score]) -> "tuple[Figure, str] | None":
    """One panel per main metric, one row per task, one mark with its interval per arm."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: dict[str, dict[str, dict[str, Score]]] = {}
    for (task, metric), by_arm in _main_scores(scores).items():
        panels.setdefault(metric, {})[task] = by_arm
    if not panels:
        return None
    bands = [list(panels.items())[start : start + 2] for start in range(0, len(panels), 2)]
    heights = [0.85 + max(len(tasks) for _, tasks in band) * (0.16 + 0.15 * len(runs)) for band in bands]
    figure = Figure(figsize=(10, 0.4 + sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.05))
    grid = figure.subplots(len(bands), len(bands[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, band in zip(grid, bands, strict=True):
        for axes, (metric, tasks) in zip(row, band, strict=False):
            _draw_scores(axes, metric, tasks, runs)
        if len(band) == 2 and list(band[0][1]) == list(band[1][1]):
            row[1].tick_params(labelleft=False)  # the same tasks as beside it
        for axes in row[len(band) :]:
            axes.remove()
    marks = {label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    style: dict[str, Any] = {"frameon": False, "labelcolor": "linecolor", "handletextpad": 0.3, "prop": {"weight": "bold"}}
    figure.legend(marks.values(), marks, loc="outside upper left", ncols=len(marks), **style)
    shown = ", ".join(dict.fromkeys(measure_of(metric).label for metric in panels))
    return figure, f"Scores with 95% intervals of {_listed([run.name for run in runs])}: {shown}. The tables hold the same figures."


def _draw_scores(axes: "Axes", metric: str, tasks: dict[str, dict[str, Score]], runs: list[_Run]) -> None:
    from matplotlib.ticker import PercentFormatter

    measure = measure_of(metric)
    for number, run in enumerate(runs):
        shift = (number - (len(runs) - 1) / 2) * 0.64 / max(len(runs), 2)
        _draw_arm(axes, run, [(row + shift, by_arm[run.name]) for row, by_arm in enumerate(tasks.values()) if run.name in by_arm])
    levels = next((run.chance for run in runs if run.chance), {}) if "accuracy" in metric else {}
    for row, task in enumerate(tasks):
        if task in levels:
            axes.plot([levels[task]] * 2, [row - 0.4, row + 0.4], color=_colour("muted"), linewidth=1, linestyle=(0, (2, 2)))
    axes.set_title(f"{measure.label} {measure.detail}")
    axes.set_xlabel("; ".join(filter(None, [measure.unit, measure.direction, "dotted: guessing" if levels else ""])))
    axes.set_yticks(range(len(tasks)), [_task_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if measure.percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_arm(axes: "Axes", run: _Run, placed: list[tuple[float, Score]]) -> None:
    """A mark with its interval at each height; an interval that is not known is not drawn."""
    known = [(height, score, score.value) for height, score in placed if score.value is not None]
    if known:
        below = [0.0 if score.low is None else max(0.0, value - score.low) for _, score, value in known]
        above = [0.0 if score.high is None else max(0.0, score.high - value) for _, score, value in known]
        style: dict[str, Any] = {"color": _colour(run.colour), "fmt": run.marker, "markersize": 5.5, "elinewidth": 1.8}
        axes.errorbar([value for *_, value in known], [height for height, *_ in known], xerr=[below, above], label=run.name, **style)


def _source_figure(runs: list[_Run]) -> "tuple[Figure, str] | None":
    """Tokens of each source as a bar, and a tick where the request was."""
    from matplotlib.figure import Figure

    rows = [(run, source, row) for run in runs for source, row in run.sources.items() if _number(row.get("tokens")) is not None]
    if not rows:
        return None
    figure = Figure(figsize=(10, 0.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(row["tokens"], _requested_tokens(run, row) or 0) for run, _, row in rows)
    for place, (run, _, row) in enumerate(rows):
        axes.barh(place, row["tokens"], height=0.5, color=_colour(run.colour))
        requested = _requested_tokens(run, row)
        if requested is not None:
            axes.plot([requested] * 2, [place - 0.38, place + 0.38], color=_colour("ink"), linewidth=1.6, solid_capstyle="butt")
        realised = "" if row.get("realised") is None else f", {row['realised']:.2%} of the run"
        asked = "" if row.get("requested") is None else f" (requested {row['requested']:.2%})"
        end = max(row["tokens"], requested or 0) + widest * 0.012
        axes.text(end, place, f"{row['tokens']:,} tokens{realised}{asked}", va="center")
    _plain_bars(axes, [f"{run.name}: {source}" for run, source, _ in rows])
    axes.set_xlim(0, widest * 1.5)
    parts = [f"{run.name} {source} {row['tokens']:,} tokens" for run, source, row in rows]
    return figure, f"Tokens of each source requested (tick) and realised (bar): {', '.join(parts)}."


def _requested_tokens(run: _Run, row: Mapping[str, Any]) -> float | None:
    total = run.summary.get("tokens")
    return None if total is None or row.get("requested") is None else row["requested"] * total


def _stage_figure(stages: list[dict[str, Any]]) -> "tuple[Figure, str] | None":
    """Time of each stage; those reused from an earlier run are pale."""
    from matplotlib.figure import Figure

    timed = [stage for stage in stages if _number(stage.get("seconds")) is not None]
    if not timed:
        return None
    figure = Figure(figsize=(10, 0.3 + 0.32 * len(timed)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(stage["seconds"] for stage in timed), 1e-3)
    for place, stage in enumerate(timed):
        reused = bool(stage.get("reused"))
        axes.barh(place, stage["seconds"], height=0.5, color=_colour("bar-pale" if reused else "bar"))
        note = f"{duration(stage['seconds'])}{', reused' if reused else ''}"
        axes.text(stage["seconds"] + widest * 0.012, place, note, va="center")
    _plain_bars(axes, [str(stage.get("name", "")) for stage in timed])
    axes.set_xlim(0, widest * 1.18)
    return figure, "Time per stage: " + ", ".join(f"{stage.get('name')} {duration(stage['seconds'])}" for stage in timed) + "."


def _plain_bars(axes: "Axes", labels: list[str]) -> None:
    """Bars say their value themselves: no scale, no grid."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


# Numbers and words ---------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time span as people say it: 0.4 s, 42 s, 3 min 12 s, 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds else "0"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # model output and file content are shown as text, whatever they hold
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "words": _words,
        "task": _task_label,
        "plain": _plain,
        "capital": lambda text: text[:1].upper() + text[1:],
        "exact": lambda value: "" if value is None else repr(value),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
        "sha256": lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode(),
    }
    return environment


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _column(steps: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Trained tokens and values of one metric at the steps that have it."""
    numbers = ((step.get("tokens", step.get("step", place)), _number(step.get(name))) for place, step in enumerate(steps))
    known = [(tokens, value) for tokens, value in numbers if value is not None]
    return [tokens for tokens, _ in known], [value for _, value in known]


def _median(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _column(steps, name)[1]
    return statistics.median(values) if values else None


def _plain(value: Any) -> str:
    """A leaf of statistics for readers."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _count(value)
    if isinstance(value, float):
        return _minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value) or "none"
    return str(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _task_label(task: str) -> str:
    """definition_to_term_recall -> definition to term, recall."""
    return _words(re.sub(rf"_({'|'.join(SPLITS)})$", r", \1", task).replace("is_a", "is-a").replace("held_out", "held-out"))


def _words(name: str) -> str:
    return name.replace("/", ", ").replace(".", ", ").replace("_", " ")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
