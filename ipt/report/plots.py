"""The bars and scores of a report, and the list of all its figures.

Curves are in ipt/report/curves.py, the law of a ratio in ipt/report/ratio_figure.py.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ipt.report.curves import course_figure, loss_figure, way_figure
from ipt.report.formatting import duration, finite, listed, spaced, task_label
from ipt.report.plot_style import STYLE, Drawing, colour, render
from ipt.report.ratio import RatioStudy
from ipt.report.ratio_figure import law_figure
from ipt.report.scores import Run, Score, main_scores, measure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_figures(
    runs: list[Run],
    scores: list[Score],
    stages: list[dict[str, Any]],
    quality: Mapping[str, Any],
    study: RatioStudy | None = None,
) -> dict[str, Drawing]:
    """Name -> drawing, for each figure that has something to show."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {
            "losses": loss_figure(runs),
            "course": course_figure(runs),
            "way": way_figure(runs),
            "scores": _score_figure(runs, scores),
            "ratio": law_figure(study) if study else None,
            "sources": _source_figure(runs),
            "lengths": _length_figure(quality.get("histograms") or {}),
            "kinds": _kind_figure(quality.get("kinds") or {}),
            "stages": _stage_figure(stages),
        }
        return {name: render(name, *found) for name, found in drawn.items() if found is not None}


def _score_figure(runs: list[Run], scores: list[Score]) -> "tuple[Figure, str] | None":
    """One panel per main metric, one row per task, one mark with its interval per arm."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: dict[str, dict[str, dict[str, Score]]] = {}
    for (task, metric), by_arm in main_scores(scores).items():
        panels.setdefault(metric, {})[task] = by_arm
    if not panels:
        return None
    bands = [list(panels.items())[start : start + 2] for start in range(0, len(panels), 2)]
    heights = [
        0.85 + max(len(tasks) for _, tasks in band) * (0.16 + 0.15 * len(runs)) for band in bands
    ]
    figure = Figure(
        figsize=(10, 0.4 + sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.05)
    )
    grid = figure.subplots(
        len(bands), len(bands[0]), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row, band in zip(grid, bands, strict=True):
        for axes, (metric, tasks) in zip(row, band, strict=False):
            _draw_scores(axes, metric, tasks, runs)
        if len(band) == 2 and list(band[0][1]) == list(band[1][1]):
            row[1].tick_params(labelleft=False)  # the same tasks as beside it
        for axes in row[len(band) :]:
            axes.remove()
    marks = {
        label: mark
        for axes in figure.axes
        for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style: dict[str, Any] = {
        "frameon": False,
        "labelcolor": "linecolor",
        "handletextpad": 0.3,
        "prop": {"weight": "bold"},
    }
    figure.legend(marks.values(), marks, loc="outside upper left", ncols=len(marks), **style)
    shown = ", ".join(dict.fromkeys(measure_of(metric).label for metric in panels))
    return (
        figure,
        f"Scores with 95% intervals of {listed([run.name for run in runs])}: {shown}. The tables "
        "hold the same figures.",
    )


def _draw_scores(
    axes: "Axes", metric: str, tasks: dict[str, dict[str, Score]], runs: list[Run]
) -> None:
    from matplotlib.ticker import PercentFormatter

    measure = measure_of(metric)
    for number, run in enumerate(runs):
        shift = (number - (len(runs) - 1) / 2) * 0.64 / max(len(runs), 2)
        _draw_arm(
            axes,
            run,
            [
                (row + shift, by_arm[run.name])
                for row, by_arm in enumerate(tasks.values())
                if run.name in by_arm
            ],
        )
    levels = next((run.chance for run in runs if run.chance), {}) if "accuracy" in metric else {}
    for row, task in enumerate(tasks):
        if task in levels:
            axes.plot(
                [levels[task]] * 2,
                [row - 0.4, row + 0.4],
                color=colour("muted"),
                linewidth=1,
                linestyle=(0, (2, 2)),
            )
    axes.set_title(f"{measure.label} {measure.detail}")
    axes.set_xlabel(
        "; ".join(
            filter(None, [measure.unit, measure.direction, "dotted: guessing" if levels else ""])
        )
    )
    axes.set_yticks(range(len(tasks)), [task_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if measure.percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_arm(axes: "Axes", run: Run, placed: list[tuple[float, Score]]) -> None:
    """A mark with its interval at each height; an interval that is not known is not drawn."""
    known = [(height, score, score.value) for height, score in placed if score.value is not None]
    if known:
        below = [
            0.0 if score.low is None else max(0.0, value - score.low) for _, score, value in known
        ]
        above = [
            0.0 if score.high is None else max(0.0, score.high - value) for _, score, value in known
        ]
        style: dict[str, Any] = {
            "color": colour(run.colour),
            "fmt": run.marker,
            "markersize": 5.5,
            "elinewidth": 1.8,
        }
        axes.errorbar(
            [value for *_, value in known],
            [height for height, *_ in known],
            xerr=[below, above],
            label=run.name,
            **style,
        )


def _source_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
    """Tokens of each source as a bar, and a tick where the request was."""
    from matplotlib.figure import Figure

    rows = [
        (run, source, row)
        for run in runs
        for source, row in run.sources.items()
        if finite(row.get("tokens")) is not None
    ]
    if not rows:
        return None
    figure = Figure(figsize=(10, 0.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(row["tokens"], _requested_tokens(run, row) or 0) for run, _, row in rows)
    for place, (run, _, row) in enumerate(rows):
        axes.barh(place, row["tokens"], height=0.5, color=colour(run.colour))
        requested = _requested_tokens(run, row)
        if requested is not None:
            axes.plot(
                [requested] * 2,
                [place - 0.38, place + 0.38],
                color=colour("ink"),
                linewidth=1.6,
                solid_capstyle="butt",
            )
        realised = "" if row.get("realised") is None else f", {row['realised']:.2%} of the run"
        asked = "" if row.get("requested") is None else f" (requested {row['requested']:.2%})"
        end = max(row["tokens"], requested or 0) + widest * 0.012
        axes.text(end, place, f"{row['tokens']:,} tokens{realised}{asked}", va="center")
    _plain_bars(axes, [f"{run.name}: {source}" for run, source, _ in rows])
    axes.set_xlim(0, widest * 1.5)
    parts = [f"{run.name} {source} {row['tokens']:,} tokens" for run, source, row in rows]
    return figure, f"Tokens of each source requested (tick) and realised (bar): {', '.join(parts)}."


def _requested_tokens(run: Run, row: Mapping[str, Any]) -> float | None:
    total = run.summary.get("tokens")
    return None if total is None or row.get("requested") is None else row["requested"] * total


def _length_figure(
    histograms: Mapping[str, Mapping[str, list[int]]],
) -> "tuple[Figure, str] | None":
    """A panel for each histogram: the share of what falls into each bin, which is as wide as any
    other.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    counted = {
        name: histogram for name, histogram in histograms.items() if sum(histogram["counts"])
    }
    if not counted:
        return None
    figure = Figure(figsize=(10, 0.3 + 2.1 * math.ceil(len(counted) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(counted) / 2), 2, squeeze=False)
    descriptions = []
    for axes, (name, histogram) in zip(grid.flat, counted.items(), strict=False):
        edges, total = histogram["edges"], sum(histogram["counts"])
        last = max(place for place, count in enumerate(histogram["counts"]) if count)
        shares = [count / total for count in histogram["counts"][: last + 1]]
        labels = [
            _bin_label(low, high) for low, high in zip(edges, [*edges[1:], None], strict=True)
        ]
        axes.bar(range(last + 1), shares, width=0.86, color=colour("bar"))
        axes.set_title(spaced(name).replace("per row", "per document"))
        axes.set_xticks(
            range(last + 1),
            [
                label.replace("–", "–\n") if len(label) > 6 else label
                for label in labels[: last + 1]
            ],
            fontsize=7.5,
        )
        axes.set_xlim(-0.6, max(last, 7) + 0.6)  # room for the labels
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.tick_params(length=0)
        known = [
            f"{label} {share:.0%}" for label, share in zip(labels, shares, strict=False) if share
        ]
        descriptions.append(f"{spaced(name)}: {', '.join(known)}")
    for axes in list(grid.flat)[len(counted) :]:
        axes.remove()
    return figure, f"Lengths in words, and pairs of a document: {'; '.join(descriptions)}."


def _bin_label(low: int, high: int | None) -> str:
    """The whole numbers from `low` up to and without `high`."""
    if high is None:
        return f"{low}+"
    return str(low) if high == low + 1 else f"{low}–{high - 1}"


def _kind_figure(kinds: Mapping[str, int]) -> "tuple[Figure, str] | None":
    """Pairs of each kind of task, the most frequent first."""
    from matplotlib.figure import Figure

    total = sum(kinds.values())
    if not total:
        return None
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    figure = Figure(figsize=(10, 0.3 + 0.26 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    for place, (_, count) in enumerate(ranked):
        axes.barh(place, count, height=0.6, color=colour("bar"))
        axes.text(
            count + ranked[0][1] * 0.012, place, f"{count:,}, {count / total:.1%}", va="center"
        )
    _plain_bars(axes, [spaced(name) for name, _ in ranked])
    axes.set_xlim(0, ranked[0][1] * 1.18)
    return (
        figure,
        "Pairs by kind of task: "
        f"{', '.join(f'{spaced(name)} {count:,}' for name, count in ranked)}.",
    )


def _stage_figure(stages: list[dict[str, Any]]) -> "tuple[Figure, str] | None":
    """Time of each stage; those reused from an earlier run are pale."""
    from matplotlib.figure import Figure

    timed = [stage for stage in stages if finite(stage.get("seconds")) is not None]
    if not timed:
        return None
    figure = Figure(figsize=(10, 0.3 + 0.32 * len(timed)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(stage["seconds"] for stage in timed), 1e-3)
    for place, stage in enumerate(timed):
        reused = bool(stage.get("reused"))
        axes.barh(
            place, stage["seconds"], height=0.5, color=colour("bar-pale" if reused else "bar")
        )
        note = f"{duration(stage['seconds'])}{', reused' if reused else ''}"
        axes.text(stage["seconds"] + widest * 0.012, place, note, va="center")
    _plain_bars(axes, [str(stage.get("name", "")) for stage in timed])
    axes.set_xlim(0, widest * 1.18)
    return figure, "Time per stage: " + ", ".join(
        f"{stage.get('name')} {duration(stage['seconds'])}" for stage in timed
    ) + "."


def _plain_bars(axes: "Axes", labels: list[str]) -> None:
    """Bars say their value themselves: no scale, no grid."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
