"""Results of finished evaluations: read, compare two models, average several."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ipt.errors import MissingFileError, UserError
from ipt.evaluation.metrics.statistics import Z95, Metric, difference, standard_error
from ipt.evaluation.task import Task, load_tasks, read_group, task_names
from ipt.evaluation.task_types.registry import kind_of
from ipt.files import read_json, reading_parquet

RESULTS, PREDICTIONS = "results.json", "predictions"
SCORES = "scores"  # in a training run: a finished evaluation in each step-NUMBER
Results = dict[str, dict[str, dict[str, Any]]]  # task -> metric -> value, stderr, ci95, n
# The main metrics of a task are the first one that it has of each line.
MAIN_METRICS = (
    ("correct", "accuracy", "acc_norm", "acc", "exact_match", "f1", "perplexity"),
    ("logprob", "bits_per_byte"),
)


def predictions_path(folder: Path, task: str) -> Path:
    return folder / PREDICTIONS / f"{task}.parquet"


def read_predictions(folder: Path, task: str) -> list[dict[str, Any]]:
    path = predictions_path(folder, task)
    with reading_parquet(path):
        return pq.read_table(path).to_pylist()


def read_task(folder: Path, task: str) -> Task:
    """The task at the time of its predictions."""
    path = predictions_path(folder, task)
    with reading_parquet(path):
        metadata = pq.read_schema(path).metadata or {}
    if b"task" not in metadata:
        raise UserError(f"{path} was not written by ipt (its metadata has no task): evaluate again")
    return Task.from_definition(json.loads(metadata[b"task"]))


def load_results(folder: Path) -> Results:
    """results.json of a finished evaluation stage."""
    try:
        return read_json(folder / RESULTS)
    except FileNotFoundError:
        raise MissingFileError(
            f"{folder} is not a finished evaluation: it has no {RESULTS}"
        ) from None


def main_metrics(metrics: Iterable[str]) -> list[str]:
    """The main metrics of a task: `paper` and those in MAIN_METRICS, as far as it has them."""
    present = dict.fromkeys(metrics)
    chosen = [next((name for name in names if name in present), None) for names in MAIN_METRICS]
    return [name for name in ("paper", *chosen) if name in present] or list(present)[:1]


def compare(a: Path, b: Path) -> Results:
    """Model `a` minus model `b`, paired over common items: task -> metric -> difference, stderr,
    ci95, p, n.

    `a` and `b` are folders of finished evaluations, of which common tasks are compared. p is
    two-sided: exact (McNemar) for accuracies, else from the normal approximation. nll and
    perplexity are comparable only between models with the same tokenizer. Raises UserError if there
    is no common task or item, or if two different items have the same id.
    """
    return {task: compare_task(a, b, task) for task in _common_tasks([a, b])}


def compare_task(a: Path, b: Path, task: str) -> dict[str, dict[str, Any]]:
    """As `compare`, for one common task."""
    ours, theirs = paired_metrics(task, [a, b])
    return {name: difference(ours[name], theirs[name]).as_dict() for name in ours if name in theirs}


def average(folders: Sequence[Path], last: int = 5) -> Results:
    """Scores averaged over models: task -> metric -> value, stderr, ci95, n, spread, runs.

    A folder is a finished evaluation, or a training run, whose `last` scores are averaged first.
    `stderr` is the standard error of the average over the n common items: the influence of an item
    is the mean of its influences. `spread` is the standard deviation over the folders, or over the
    scores of a single training run; null for one model. Raises the errors of `compare`.
    """
    members = [late_scores(folder, last) for folder in folders]
    everything = [folder for member in members for folder in member]
    averaged: Results = {}
    for task in _common_tasks(everything):
        metrics = iter(paired_metrics(task, everything))
        of_members = [[next(metrics) for _ in member] for member in members]
        averaged[task] = {
            name: _average([[found[name] for found in member] for member in of_members])
            for name in of_members[0][0]
        }
    return averaged


def late_scores(folder: Path, last: int) -> list[Path]:
    """The newest `last` evaluations of a training run, oldest first; [folder] for an evaluation."""
    steps = sorted(path.parent for path in (folder / SCORES).glob(f"step-*/{RESULTS}"))
    return steps[-last:] or [folder]


def groups_of(
    tasks: Iterable[str], names: Iterable[str] = (), data_dir: str | Path = "data"
) -> dict[str, list[str]]:
    """Name -> tasks of the groups among `names` and the shipped ones that have an average and two
    or more tasks, all of them in `tasks`.
    """
    known, groups = set(tasks), {}
    for name in dict.fromkeys([*names, *task_names()]):
        members = [task.name for task in load_tasks([name], data_dir)]
        group = read_group(name)
        if len(members) > 1 and known.issuperset(members) and (group is None or group.average):
            groups[Path(name).stem] = members
    return groups


def group_average(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], tasks: Sequence[str], metric: str
) -> dict[str, Any] | None:
    """The unweighted mean of a metric over independent tasks, as an entry of results.json; None if
    a task lacks the metric.
    """
    entries = [results[task].get(metric, {}) for task in tasks]
    values = [float(entry["value"]) for entry in entries if entry.get("value") is not None]
    if len(values) < len(tasks):
        return None
    errors = [math.nan if entry["stderr"] is None else entry["stderr"] for entry in entries]
    return _entry(
        statistics.fmean(values),
        math.hypot(*errors) / len(tasks),
        sum(entry["n"] for entry in entries),
    )


def _common_tasks(folders: Sequence[Path]) -> list[str]:
    results = [load_results(folder) for folder in folders]
    tasks = [task for task in results[0] if all(task in result for result in results)]
    if not tasks:
        named = " and ".join(map(str, folders))
        raise UserError(f"{named} have no task in common: evaluate all models on the same tasks")
    return tasks


def paired_metrics(task: str, folders: Sequence[Path]) -> list[dict[str, Metric]]:
    """The metrics of each folder over the common items, which are in the same order."""
    rows = [{row["id"]: row for row in read_predictions(folder, task)} for folder in folders]
    common = [name for name in rows[0] if all(name in others for others in rows)]
    if not common:
        named = " and ".join(map(str, folders))
        raise UserError(
            f"task {task}: {named} have no item in common: use the same data and limit for all"
        )
    for folder, others in zip(folders, rows, strict=True):
        for name in common:
            if rows[0][name]["prompt_hash"] != others[name]["prompt_hash"]:
                raise UserError(
                    f"task {task}: item {name} differs between {folders[0]} and {folder}: use the "
                    "same data for all"
                )
    definition = read_task(folders[0], task)
    return [
        kind_of(definition).metrics(definition, [others[name] for name in common])
        for others in rows
    ]


def _average(members: Sequence[Sequence[Metric]]) -> dict[str, Any]:
    """The average of a metric, first over the scores of each model, then over models."""
    values = [statistics.fmean(metric.value for metric in member) for member in members]
    influence = np.mean(
        [np.mean([metric.influence for metric in member], axis=0) for member in members], axis=0
    )
    spread_over = values if len(values) > 1 else [metric.value for metric in members[0]]
    spread = statistics.stdev(spread_over) if len(spread_over) > 1 else None
    return {
        **_entry(statistics.fmean(values), standard_error(influence), len(influence)),
        "spread": spread,
        "runs": len(spread_over),
    }


def _entry(value: float, stderr: float, n: int) -> dict[str, Any]:
    return Metric(
        value, stderr, (value - Z95 * stderr, value + Z95 * stderr), n, np.empty(0)
    ).as_dict()
