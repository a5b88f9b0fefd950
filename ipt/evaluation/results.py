"""What finished evaluations say: predictions and results of a folder, two models compared, a table of several."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.evaluation.kinds import kind_of
from ipt.evaluation.statistics import difference
from ipt.evaluation.task import Task

RESULTS, PREDICTIONS = "results.json", "predictions"
Results = dict[str, dict[str, dict[str, Any]]]  # task -> metric -> value, stderr, ci95, n

# What the table shows of each metric: how a value and its standard error read, and whether more is better.
COLUMNS = {
    "accuracy": ("{:.1%} ±{:.1%}", "↑"),
    "logprob": ("{:.3f} ±{:.3f}", "↑"),
    "probability": ("{:.3f} ±{:.3f}", "↑"),
    "nll": ("{:.3f} ±{:.3f}", "↓"),
    "perplexity": ("{:.2f} ±{:.2f}", "↓"),
}


def predictions_path(folder: Path, task: str) -> Path:
    return folder / PREDICTIONS / f"{task}.parquet"


def read_predictions(folder: Path, task: str) -> list[dict[str, Any]]:
    return pq.read_table(predictions_path(folder, task)).to_pylist()


def load_results(folder: Path) -> Results:
    """results.json of a finished evaluation stage."""
    try:
        return json.loads((folder / RESULTS).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no {RESULTS}: it is no finished evaluation") from None


def compare(a: Path, b: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Model `a` minus model `b`: task -> metric -> difference, stderr, ci95, p, n, paired over the items that both answered.

    Both are folders of finished evaluations; tasks that only one has are left out. p is two-sided: exact (McNemar) for
    accuracies, else by normal approximation. nll and perplexity compare only between models of one tokenizer.
    Raises ValueError if there is no common task, no common item, or one id stands for two different items.
    """
    tasks = [task for task in load_results(a) if task in load_results(b)]
    if not tasks:
        raise ValueError(f"{a} and {b} have no task in common: evaluate both models on the same tasks")
    return {task: _compare_task(task, a, b) for task in tasks}


def table(results: Mapping[str, Path]) -> Table:
    """Tasks and metrics down, models across (their names -> folders of finished evaluations), for the terminal."""
    loaded = {model: load_results(folder) for model, folder in results.items()}
    tasks = list(dict.fromkeys(task for result in loaded.values() for task in result))
    view = Table(box=SIMPLE, pad_edge=False, caption="± one standard error, n items; ↑ more is better, ↓ less", caption_justify="left")
    view.add_column("task", no_wrap=True)
    for model in loaded:
        view.add_column(escape(model), justify="right")
    for task in tasks:
        scores = [result.get(task, {}) for result in loaded.values()]
        view.add_row(f"[bold]{task}[/]", *(f"[dim]n = {_items(score)}[/]" for score in scores))
        for metric, (form, arrow) in COLUMNS.items():
            if any(metric in score for score in scores):
                view.add_row(f"  {metric} {arrow}", *(_cell(score.get(metric), form) for score in scores))
        view.add_section()
    return view


def _compare_task(task: str, a: Path, b: Path) -> dict[str, dict[str, Any]]:
    first, second = ({row["id"]: row for row in read_predictions(folder, task)} for folder in (a, b))
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(f"task {task}: {a} and {b} have no item in common: evaluate both with the same data and limit")
    changed = next((name for name in common if first[name]["prompt_hash"] != second[name]["prompt_hash"]), None)
    if changed is not None:
        raise ValueError(f"task {task}: item {changed} is another one in {a} than in {b}: evaluate both with the same data")
    definition = Task(**json.loads(pq.read_schema(predictions_path(a, task)).metadata[b"task"]))
    ours, theirs = (kind_of(definition).metrics(definition, [rows[name] for name in common]) for rows in (first, second))
    return {name: difference(ours[name], theirs[name]).as_dict() for name in ours}


def _items(score: Mapping[str, Mapping[str, Any]]) -> str:
    return next((str(entry["n"]) for entry in score.values()), "0")


def _cell(entry: Mapping[str, Any] | None, form: str) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    if entry["value"] >= 1000:  # perplexity of an untrained model
        form = "{:.0f} ±{:.0f}"
    if entry["stderr"] is None:
        return form.split(" ±")[0].format(entry["value"])
    return form.format(entry["value"], entry["stderr"])
