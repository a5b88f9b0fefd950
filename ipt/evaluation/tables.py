"""Tables of finished evaluations: for the terminal, and results.md with the published figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.evaluation.odd_rows import LEFT_OUT
from ipt.evaluation.results import (
    Results,
    group_average,
    groups_of,
    load_results,
    main_metrics,
    read_task,
)
from ipt.evaluation.task import Task
from ipt.files import atomic

MARKDOWN = "results.md"
# Metrics that begin with these names are shown in percent.
SHARES = (
    "paper",
    "correct",
    "acc",
    "exact_match",
    "f1",
    "contain",
    "contam",
    "precision",
    "recall",
)
FEWER_IS_BETTER = ("nll", "perplexity", "bits_per_byte", "contaminated", LEFT_OUT)
CAPTION = (
    "Proportions are in percent, ± is one standard error. `paper` follows the published rule, "
    "`correct` the right one."
)
BOTH = ("paper", "correct")  # metrics with group averages


def table(results: Mapping[str, Path]) -> Table:
    """The main metrics of each task, a column for each model. `results`: name of a model -> folder
    of its finished evaluation.
    """
    return scores_table({model: load_results(folder) for model, folder in results.items()})


def scores_table(models: Mapping[str, Results]) -> Table:
    """As `table`, for what `load_results` or `average` returned."""
    caption = "± one standard error; n items; ↑ higher is better, ↓ lower is better"
    if any("spread" in entry for _, entry in _entries(models.values())):
        caption += "; in parentheses: standard deviation over checkpoints or seeds"
    view = _empty_table(caption, models)
    for task in dict.fromkeys(task for result in models.values() for task in result):
        _add_rows(view, task, [result.get(task, {}) for result in models.values()])
    groups = groups_of(set.intersection(*(set(result) for result in models.values())))
    for group, tasks in groups.items():
        averages = [
            {name: group_average(result, tasks, name) for name in BOTH}
            for result in models.values()
        ]
        _add_rows(
            view,
            f"average of {group}",
            [{name: entry for name, entry in score.items() if entry} for score in averages],
        )
    return view


def differences_table(differences: Results) -> Table:
    """The main metrics of what `compare` returned."""
    view = _empty_table(
        "± one standard error of the paired difference; n items; p two-sided",
        ["difference", "95% interval", "p"],
    )
    for task, metrics in differences.items():
        for number, name in enumerate(_shown_metrics([metrics], "difference")):
            entry = metrics[name]
            shown = _number(entry["difference"], name, signed=True) + _error(entry["stderr"], name)
            p = "–" if entry["p"] is None else f"{entry['p']:.3g}"
            view.add_row(
                *_labels(task, name, entry["n"], first=number == 0),
                shown,
                _interval(entry, name, signed=True),
                p,
            )
    return view


def write_markdown(
    folder: Path, title: str, names: Iterable[str] = (), data_dir: str | Path = "data"
) -> None:
    """Write results.md of a finished evaluation. `names`: tasks and groups; groups get averages."""
    with atomic(folder / MARKDOWN) as temporary:
        temporary.write_text(markdown(folder, title, names, data_dir), encoding="utf-8")


def markdown(
    folder: Path, title: str, names: Iterable[str] = (), data_dir: str | Path = "data"
) -> str:
    """Scores with standard errors and published figures, averages of groups, then all metrics."""
    results = load_results(folder)
    tasks = {name: read_task(folder, name) for name in results}
    groups = groups_of(results, names, data_dir)
    lines = [f"# {title}", "", CAPTION]
    for models in dict.fromkeys(tuple(sorted(task.published)) for task in tasks.values()):
        members = {
            name: task for name, task in tasks.items() if tuple(sorted(task.published)) == models
        }
        if models or any(set(BOTH) & set(results[name]) for name in members):
            lines += ["", *_score_lines(results, members, models, groups)]
    lines += [
        "",
        "## All metrics",
        "",
        "| task | metric | value | 95% interval | n |",
        "|---|---|---:|---:|---:|",
    ]
    for name, metrics in results.items():
        for metric, entry in metrics.items():
            lines.append(
                _row([name, metric, _cell(entry, metric), _interval(entry, metric), entry["n"]])
            )
    return "\n".join([*lines, ""])


def _score_lines(
    results: Results,
    tasks: Mapping[str, Task],
    models: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> list[str]:
    """A table of tasks with published figures of the same models."""
    metrics = list(BOTH)
    if any("contaminated" in results[name] for name in tasks):
        metrics.append("contaminated")
    header = ["task", "n", *metrics, *(f"{model} (published)" for model in models)]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for name, task in tasks.items():
        n = max(entry["n"] for metric, entry in results[name].items() if metric != LEFT_OUT)
        ours = [_cell(results[name].get(metric), metric) for metric in metrics]
        lines.append(_row([name, n, *ours, *(f"{task.published[model]:.1f}" for model in models)]))
    for group, members in groups.items():
        if not tasks.keys() >= set(members):
            continue
        averages = {metric: group_average(results, members, metric) for metric in BOTH}
        if any(averages.values()):
            row = [f"**average of {group}**", f"{len(members)} tasks"]
            row += [_cell(averages.get(metric), metric) for metric in metrics]
            for model in models:
                row.append(f"{fmean(tasks[member].published[model] for member in members):.1f}")
            lines.append(_row(row))
    return lines


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


# The terminal
# ----------------------------------------------------------------------------------------------


def _empty_table(caption: str, columns: Iterable[str]) -> Table:
    view = Table(
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=caption,
        caption_justify="left",
    )
    view.add_column("task", overflow="fold", min_width=10)
    view.add_column("n", justify="right", no_wrap=True, style="dim")
    view.add_column("", no_wrap=True)
    for column in columns:
        view.add_column(escape(column), justify="right", overflow="fold")
    return view


def _add_rows(view: Table, task: str, scores: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    for number, name in enumerate(_shown_metrics(scores, "value")):
        n = max(score[name]["n"] for score in scores if name in score)
        view.add_row(
            *_labels(task, name, n, first=number == 0),
            *(_cell(score.get(name), name) for score in scores),
        )


def _labels(task: str, metric: str, n: int, first: bool) -> tuple[str, str, str]:
    return (
        f"[bold]{escape(task)}[/]" if first else "",
        str(n) if first else "",
        f"{metric.replace('_per_', '/')} {'↓' if metric in FEWER_IS_BETTER else '↑'}",
    )


def _shown_metrics(scores: Sequence[Mapping[str, Mapping[str, Any]]], figure: str) -> list[str]:
    """Main metrics and the number of rows left out; `paper` only if it differs from `correct`."""
    names = list(dict.fromkeys(name for score in scores for name in main_metrics(score)))
    names += [LEFT_OUT] if any(LEFT_OUT in score for score in scores) else []
    if all(
        "paper" not in score
        or ("correct" in score and score["paper"][figure] == score["correct"][figure])
        for score in scores
    ):
        return [name for name in names if name != "paper"]
    return names


def _entries(models: Iterable[Results]) -> Iterable[tuple[str, dict[str, Any]]]:
    return (item for result in models for metrics in result.values() for item in metrics.items())


# Figures
# ----------------------------------------------------------------------------------------------


def _cell(entry: Mapping[str, Any] | None, metric: str) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    spread = f" ({_number(entry['spread'], metric)})" if entry.get("spread") is not None else ""
    return _number(entry["value"], metric) + _error(entry["stderr"], metric) + spread


def _interval(entry: Mapping[str, Any], metric: str, signed: bool = False) -> str:
    if None in entry["ci95"]:
        return "–"
    return " to ".join(_number(bound, metric, signed) for bound in entry["ci95"])


def _error(stderr: float | None, metric: str) -> str:
    return "" if stderr is None else f" ±{_number(stderr, metric)}"


def _number(value: float | None, metric: str, signed: bool = False) -> str:
    if value is None:
        return "–"
    if metric == LEFT_OUT:
        return str(value)
    sign = "+" if signed else ""
    if metric.startswith(SHARES):
        return f"{100 * value:{sign}.1f}"
    if abs(value) >= 100:
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"
