"""Curves against trained tokens: losses, how the training went, and scores on the way. Of several
seeds their mean in a band.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ipt.report.formatting import listed, task_label
from ipt.report.plot_style import colour
from ipt.report.scores import Run, column, main_metrics, measure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_POINTS = 1000  # at most so many points of a curve are drawn
PANELS = 12  # at most so many panels of scores on the way
COURSE = {
    "tokens_per_second": "tokens per second and device",
    "grad_norm": "gradient norm",
    "skipped": "skipped steps so far",
}


def loss_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
    """Loss against trained tokens: of all tokens, and of each source alone."""
    trained = [run for run in runs if run.steps]
    sources = dict.fromkeys(
        name for run in trained for step in run.steps for name in step if name.startswith("loss/")
    )
    names = ["loss", *sources] if len(sources) > 1 else ["loss"]
    if not trained:
        return None
    titles = {name: f"source: {name.removeprefix('loss/')}" for name in names} | {
        "loss": "all trained tokens"
    }
    figure = _panels(trained, titles, sharey=True, smooth=True)
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("loss, nats per token")
    last = [
        f"{run.name} {column(run.steps, 'loss')[1][-1]:.3f}"
        for run in trained
        if column(run.steps, "loss")[1]
    ]
    return (
        figure,
        f"Training loss against trained tokens. Loss of the last step: {', '.join(last)}.",
    )


def course_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
    """Speed, gradient norm and skipped steps; what no run has recorded is left out."""
    trained = [run for run in runs if run.steps]
    skipped = {run.name: sum(column(run.steps, "skipped")[1]) for run in trained}
    titles = {
        name: title
        for name, title in COURSE.items()
        if any(len(column(run.steps, name)[1]) > 1 for run in trained)
    }
    if not any(skipped.values()):
        titles.pop("skipped", None)  # nothing to see
    if not titles:
        return None
    counted = ", ".join(f"{name} {steps:g}" for name, steps in skipped.items())
    return _panels(
        trained, titles, smooth=True
    ), f"{listed(list(titles.values()))} against trained tokens. Skipped steps: {counted}."


def way_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
    """Scores of the models while they were trained: the main measures, a panel for each."""
    metrics: dict[str, list[str]] = {}
    for name in dict.fromkeys(
        name for run in runs for step in run.steps for name in step if name.startswith("eval/")
    ):
        task, _, metric = name.removeprefix("eval/").rpartition("/")
        metrics.setdefault(task, []).append(metric)
    titles = {}
    for task, found in metrics.items():
        same = all(
            step.get(f"eval/{task}/correct") == step.get(f"eval/{task}/accuracy")
            for run in runs
            for step in run.steps
        )
        for metric in main_metrics(
            [metric for metric in found if not (same and metric == "correct")]
        ):
            titles[f"eval/{task}/{metric}"] = f"{task_label(task)}\n{measure_of(metric).label}"
    shown = dict(list(titles.items())[:PANELS])
    if not shown:
        return None
    more = (
        f" {len(titles) - len(shown)} more are in metrics.jsonl."
        if len(titles) > len(shown)
        else ""
    )
    text = (
        f"Scores during training, on a part of the items, in {len(shown)} panels: "
        f"{', '.join(shown.values())}.{more}"
    )
    return _panels([run for run in runs if run.steps], shown), text.replace("\n", " ")


def _panels(
    runs: Sequence[Run], titles: dict[str, str], sharey: bool = False, smooth: bool = False
) -> "Figure":
    """A panel for each metric against trained tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(10, 0.4 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axes, (name, title) in zip(grid.flat, titles.items(), strict=False):
        ends = [end for run in runs if (end := _draw(axes, run, name, smooth)) is not None]
        axes.set_title(title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(length=0, labelleft=True)
        axes.set_xlabel("trained tokens")
        axes.margins(x=0)
        axes.set_xlim(left=0)
        _scale(axes, name)
        _label_ends(axes, ends)
    for axes in list(grid.flat)[len(titles) :]:
        axes.remove()
    return figure


def _scale(axes: "Axes", name: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    if name in ("tokens_per_second", "skipped"):
        axes.set_ylim(bottom=0, top=None if axes.get_ylim()[1] > 0.5 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=name == "skipped"))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if name.startswith("eval/") and measure_of(name.rpartition("/")[2]).percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw(axes: "Axes", run: Run, name: str, smooth: bool) -> tuple[float, str, str] | None:
    """Draw one curve; return where it ends.

    With `smooth`, a trailing mean in full colour, and of one seed the single steps pale. Of several
    seeds the mean, in a band from the lowest to the highest.
    """
    import numpy as np

    tokens, values = column(run.steps, name)
    if not values:
        return None
    shown, window = (
        colour(run.colour),
        max(1, len(values) // 20) if smooth and name != "skipped" else 1,
    )
    curves = [_trailing(column(course, name)[1], name, window) for course in run.courses]
    curves = [curve for curve in curves if len(curve) == len(values) - window + 1] or [
        _trailing(values, name, window)
    ]
    middle, stride = (
        np.mean(curves, axis=0),
        math.ceil(len(values) / CURVE_POINTS),
    )  # from the end, so that the last step is always drawn
    places = tokens[window - 1 :][::-stride]
    if len(curves) > 1:
        axes.fill_between(
            places,
            np.min(curves, axis=0)[::-stride],
            np.max(curves, axis=0)[::-stride],
            color=shown,
            alpha=0.2,
            linewidth=0,
        )
    elif window > 1:
        axes.plot(tokens[::-stride], values[::-stride], color=shown, alpha=0.22, linewidth=0.9)
    few: dict[str, Any] = (
        {"marker": run.marker, "markersize": 4, "clip_on": False}
        if name.startswith("eval/") or len(places) == 1
        else {}
    )
    axes.plot(places, middle[::-stride], color=shown, **few)
    return float(middle[-1]), run.name, shown


def _trailing(values: Sequence[float], name: str, window: int) -> Any:
    """What is drawn of a metric: skipped steps as their sum so far, all else as the mean of the
    `window` steps before.
    """
    import numpy as np

    if name == "skipped":
        return np.cumsum(values)
    return (
        np.convolve(values, np.ones(window) / window, mode="valid")
        if len(values) >= window
        else np.empty(0)
    )


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name beside its end, kept apart where curves meet."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.065
    heights: list[float] = []
    for height, _, _ in sorted(ends):
        heights.append(max(height, heights[-1] + gap) if heights else height)
    for number, (_, name, shown) in enumerate(sorted(ends)):
        height = min(heights[number], high - (len(ends) - 1 - number) * gap)  # none above the panel
        axes.text(
            1.02,
            height,
            name,
            color=shown,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontweight="bold",
            fontsize=8.5,
        )
