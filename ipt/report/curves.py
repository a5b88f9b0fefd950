"""Curves against trained tokens (losses, training metrics, scores during training), and scores
against the mixture ratio.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ipt.report.formatting import listed, task_label
from ipt.report.measures import main_metrics, measure_of
from ipt.report.mixing_law import Law, Panel, RatioStudy
from ipt.report.plot_style import colour, panels
from ipt.report.scores import Run, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_POINTS = 1000  # drawn per curve at most
SCORE_PANELS = 12  # at most
SMOOTHED = 0.05  # fraction of the run that the moving average covers
METRICS = {
    "tokens_per_second": "tokens per second and device",
    "grad_norm": "gradient norm",
    "skipped": "skipped steps (cumulative)",
}
COUNTS = ("tokens_per_second", "skipped")  # axes start at 0
LAW_COLOUR, BEST_COLOUR = "arm-1", "arm-2"
LABEL: dict[str, Any] = {"fontweight": "bold", "fontsize": 8.5}


def loss_figure(runs: Sequence[Run]) -> "tuple[Figure, str] | None":
    """Loss of all tokens, and of each source if there are several."""
    trained = [run for run in runs if run.steps]
    if not trained:
        return None
    titles = {"loss": "all sources"}
    sources = [name for name in _metric_names(trained) if name.startswith("loss/")]
    if len(sources) > 1:
        titles |= {name: f"source: {name.removeprefix('loss/')}" for name in sources}
    figure, grid = _curves(trained, titles, sharey=True, smooth=True)
    columns = min(3, len(grid))
    for axes in grid[::columns]:
        axes.set_ylabel("loss (nats per token)")
    final = []
    for run in trained:
        losses = column(run.steps, "loss")[1]
        if losses:
            final.append(f"{run.name} {losses[-1]:.3f}")
    return figure, f"Training loss against trained tokens. Final loss: {', '.join(final)}."


def metrics_figure(runs: Sequence[Run]) -> "tuple[Figure, str] | None":
    """Throughput, gradient norm and skipped steps, if they were recorded."""
    trained = [run for run in runs if run.steps]
    skipped = {run.name: sum(column(run.steps, "skipped")[1]) for run in trained}
    titles = {}
    for name, title in METRICS.items():
        is_recorded = any(len(column(run.steps, name)[1]) > 1 for run in trained)
        if is_recorded and (name != "skipped" or any(skipped.values())):
            titles[name] = title
    if not titles:
        return None
    counts = ", ".join(f"{name} {steps:g}" for name, steps in skipped.items())
    figure, _ = _curves(trained, titles, smooth=True)
    shown = listed(list(titles.values()))
    return figure, f"{shown} against trained tokens. Skipped steps: {counts}."


def score_curves_figure(runs: Sequence[Run]) -> "tuple[Figure, str] | None":
    """The main measures during training, a panel for each."""
    trained = [run for run in runs if run.steps]
    metrics: dict[str, list[str]] = {}
    for name in _metric_names(trained):
        if name.startswith("eval/"):
            task, _, metric = name.removeprefix("eval/").rpartition("/")
            metrics.setdefault(task, []).append(metric)
    titles = {}
    for task, found in metrics.items():
        if _same_columns(trained, f"eval/{task}/correct", f"eval/{task}/accuracy"):
            found = [metric for metric in found if metric != "correct"]
        for metric in main_metrics(found):
            titles[f"eval/{task}/{metric}"] = f"{task_label(task)}\n{measure_of(metric).label}"
    shown = dict(list(titles.items())[:SCORE_PANELS])
    if not shown:
        return None
    figure, _ = _curves(trained, shown)
    names = [", ".join(title.splitlines()) for title in shown.values()]
    text = f"Scores during training, on a subset of the items: {'; '.join(names)}."
    if len(titles) > len(shown):
        text += f" metrics.jsonl has {len(titles) - len(shown)} more."
    return figure, text


def law_figure(study: RatioStudy | None) -> "tuple[Figure, str] | None":
    """Runs, fitted law and best ratio, a panel for each measure."""
    if study is None or not study.panels:
        return None
    figure, grid = panels(len(study.panels))
    findings = []
    for axes, panel in zip(grid, study.panels, strict=True):
        _draw_law_panel(axes, panel, study.source)
        findings.append(f"{task_label(panel.task)}, {panel.measure.label}: {panel.finding}")
    return figure, f"Scores against the ratio of {study.source}. {'; '.join(findings)}."


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for step in run.steps for name in step))


def _same_columns(runs: Sequence[Run], name: str, other: str) -> bool:
    return all(step.get(name) == step.get(other) for run in runs for step in run.steps)


# Curves
# ----------------------------------------------------------------------------------------------


def _curves(
    runs: Sequence[Run], titles: Mapping[str, str], sharey: bool = False, smooth: bool = False
) -> "tuple[Figure, list[Axes]]":
    """A panel for each metric against trained tokens, with the runs' names at the curves' ends."""
    from matplotlib.ticker import EngFormatter

    figure, grid = panels(len(titles), sharey=sharey)
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        ends = {}
        for run in runs:
            end = _draw_curve(axes, run, name, smooth)
            if end is not None:
                ends[run.name] = (end, colour(run.colour))
        axes.set_title(title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(length=0, labelleft=True)
        axes.set_xlabel("trained tokens")
        axes.margins(x=0)
        axes.set_xlim(left=0)
        _scale(axes, name)
        _label_ends(axes, ends)
    return figure, grid


def _scale(axes: "Axes", name: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    if name in COUNTS:
        axes.set_ylim(bottom=0, top=None if axes.get_ylim()[1] > 0.5 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=name == "skipped"))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if name.startswith("eval/") and measure_of(name.rpartition("/")[2]).percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_curve(axes: "Axes", run: Run, name: str, smooth: bool) -> float | None:
    """Draw one curve and return its last value; None if there are no values.

    Several seeds are drawn as their mean in a band from the lowest to the highest. With `smooth`
    the curve is a moving average, and the values of a single seed are drawn pale.
    """
    tokens, values = column(run.steps, name)
    if not values:
        return None
    window = max(1, int(len(values) * SMOOTHED)) if smooth and name != "skipped" else 1
    curves = []
    for steps in run.curves:
        curve = _transformed(column(steps, name)[1], name, window)
        if len(curve) == len(values) - window + 1:
            curves.append(curve)
    if not curves:
        curves = [_transformed(values, name, window)]
    mean = np.mean(curves, axis=0)
    drawn = slice(None, None, -math.ceil(len(values) / CURVE_POINTS))  # includes the last step
    places = tokens[window - 1 :][drawn]
    style: dict[str, Any] = {"color": colour(run.colour), "clip_on": False}
    if len(curves) > 1:
        low = np.min(curves, axis=0)[drawn]
        high = np.max(curves, axis=0)[drawn]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
    elif window > 1:
        axes.plot(tokens[drawn], values[drawn], **style, alpha=0.22, linewidth=0.9)
    if name.startswith("eval/") or len(places) == 1:
        style |= {"marker": run.marker, "markersize": 4}
    axes.plot(places, mean[drawn], **style)
    return float(mean[-1])


def _transformed(values: Sequence[float], name: str, window: int) -> Any:
    """The cumulative sum of skipped steps, the moving average of any other metric."""
    if name == "skipped":
        return np.cumsum(values)
    if len(values) < window:
        return np.empty(0)
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _label_ends(axes: "Axes", ends: Mapping[str, tuple[float, str]]) -> None:
    """Write each curve's name next to its end. Names keep a distance where curves meet."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.065
    ranked = sorted(ends.items(), key=lambda end: end[1])
    height = -math.inf
    for number, (name, (end, shown)) in enumerate(ranked):
        height = max(end, height + gap)
        place = min(height, high - (len(ranked) - 1 - number) * gap)  # inside the panel
        axes.text(
            1.02,
            place,
            name,
            color=shown,
            transform=axes.get_yaxis_transform(),
            va="center",
            **LABEL,
        )


# The mixture ratio
# ----------------------------------------------------------------------------------------------


def _draw_law_panel(axes: "Axes", panel: Panel, source: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if panel.law is not None:
        _draw_law(axes, panel.law)
    ratios = [point.ratio for point in panel.points]
    values = [point.value for point in panel.points]
    axes.plot(ratios, values, "o", color=colour("ink"), markersize=4.5)
    axes.set_title(f"{task_label(panel.task)}\n{panel.measure.label}")
    axes.set_xlabel(f"ratio of {source}")
    axes.set_ylabel(panel.measure.direction)
    axes.tick_params(length=0)
    axes.margins(y=0.18)
    if panel.measure.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_law(axes: "Axes", law: Law) -> None:
    line = colour(LAW_COLOUR)
    axes.fill_between(law.ratios, law.low, law.high, color=line, alpha=0.16, linewidth=0)
    axes.plot(law.ratios, law.curve, color=line)
    if law.is_flat:
        return
    best = colour(BEST_COLOUR)
    axes.axvspan(law.best_low, law.best_high, color=best, alpha=0.14, linewidth=0)
    axes.axvline(law.best, color=best, linewidth=1.6, linestyle=(0, (4, 2)))
    is_left = law.best < (law.ratios[0] + law.ratios[-1]) / 2
    axes.annotate(
        f"best {law.best:.2f}",
        (law.best, 0.97),
        (4 if is_left else -4, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        color=best,
        va="top",
        ha="left" if is_left else "right",
        **LABEL,
    )
