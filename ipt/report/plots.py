"""All figures of a report; scores and bars are drawn here, curves in ipt/report/curves.py."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ipt.report.curves import law_figure, loss_figure, metrics_figure, score_curves_figure
from ipt.report.formatting import duration, finite, listed, spaced, task_label
from ipt.report.measures import measure_of
from ipt.report.mixing_law import RatioStudy
from ipt.report.plot_style import STYLE, Drawing, colour, panels, render
from ipt.report.scores import Run, Score, main_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HISTOGRAMS = {
    "pairs_per_row": "pairs per document",
    "question_words": "words per question",
    "answer_words": "words per answer",
    "document_words": "words per document",
}
LONG_LABEL = 36  # characters; longer labels of bars lose their beginning
WIDE_BIN = 6  # characters; labels of wider bins take two lines


def draw_figures(
    runs: Sequence[Run],
    scores: Sequence[Score],
    stages: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    study: RatioStudy | None = None,
) -> dict[str, Drawing]:
    """Name -> drawing, for each figure that has something to show."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = {
            "losses": loss_figure(runs),
            "training": metrics_figure(runs),
            "score_curves": score_curves_figure(runs),
            "scores": _score_figure(runs, scores),
            "ratio": law_figure(study),
            "sources": _source_figure(runs),
            "lengths": _length_figure(quality.get("histograms") or {}),
            "kinds": _kind_figure(quality.get("kinds") or {}),
            "stages": _stage_figure(stages),
        }
        return {name: render(name, *found) for name, found in figures.items() if found}


# Scores
# ----------------------------------------------------------------------------------------------


def _score_figure(runs: Sequence[Run], scores: Sequence[Score]) -> "tuple[Figure, str] | None":
    """A panel per main metric, a row per task, a mark with its interval per run."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    metrics: dict[str, dict[str, dict[str, Score]]] = {}
    for (task, metric), by_run in main_scores(scores).items():
        metrics.setdefault(metric, {})[task] = by_run
    if not metrics:
        return None
    names = list(metrics)
    bands = [names[start : start + 2] for start in range(0, len(names), 2)]
    heights = []
    for band in bands:
        tasks = max(len(metrics[metric]) for metric in band)
        heights.append(0.85 + tasks * (0.16 + 0.15 * len(runs)))
    figure = Figure(
        figsize=(10, 0.4 + sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.05)
    )
    ratios = {"height_ratios": heights}
    grid = figure.subplots(len(bands), len(bands[0]), squeeze=False, gridspec_kw=ratios)
    for row, band in zip(grid, bands, strict=True):
        for axes, metric in zip(row, band, strict=False):
            _draw_scores(axes, metric, metrics[metric], runs)
        if len(band) == 2 and list(metrics[band[0]]) == list(metrics[band[1]]):
            row[1].tick_params(labelleft=False)  # both panels have the same tasks
        for axes in row[len(band) :]:
            axes.remove()
    _add_legend(figure)
    shown = ", ".join(dict.fromkeys(measure_of(metric).label for metric in metrics))
    models = listed([run.name for run in runs])
    return figure, f"Scores of {models} with 95% intervals: {shown}. The tables have all numbers."


def _add_legend(figure: "Figure") -> None:
    """One entry per run, from all panels: a run may be missing in some."""
    marks = {}
    for axes in figure.axes:
        for mark, label in zip(*axes.get_legend_handles_labels(), strict=True):
            marks[label] = mark
    figure.legend(
        list(marks.values()),
        list(marks),
        loc="outside upper left",
        ncols=len(marks),
        frameon=False,
        labelcolor="linecolor",
        handletextpad=0.3,
        prop={"weight": "bold"},
    )


def _draw_scores(
    axes: "Axes", metric: str, tasks: Mapping[str, Mapping[str, Score]], runs: Sequence[Run]
) -> None:
    from matplotlib.ticker import PercentFormatter

    measure = measure_of(metric)
    for number, run in enumerate(runs):
        shift = (number - (len(runs) - 1) / 2) * 0.64 / max(len(runs), 2)
        found = {}
        for row, by_run in enumerate(tasks.values()):
            if run.name in by_run:
                found[row + shift] = by_run[run.name]
        _draw_run(axes, run, found)
    levels = next((run.chance for run in runs if run.chance), {}) if "accuracy" in metric else {}
    style: dict[str, Any] = {"color": colour("muted"), "linewidth": 1, "linestyle": (0, (2, 2))}
    for row, task in enumerate(tasks):
        if task in levels:
            axes.plot([levels[task]] * 2, [row - 0.4, row + 0.4], **style)
    axes.set_title(f"{measure.label} {measure.detail}".strip())
    chance = "dotted: chance" if levels else ""
    axes.set_xlabel("; ".join(filter(None, [measure.unit, measure.direction, chance])))
    axes.set_yticks(range(len(tasks)), [task_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if measure.percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_run(axes: "Axes", run: Run, scores: Mapping[float, Score]) -> None:
    """A mark at each height, with its interval if there is one."""
    heights, values, below, above = [], [], [], []
    for height, score in scores.items():
        if score.value is not None:
            heights.append(height)
            values.append(score.value)
            below.append(0.0 if score.low is None else max(0.0, score.value - score.low))
            above.append(0.0 if score.high is None else max(0.0, score.high - score.value))
    if values:
        axes.errorbar(
            values,
            heights,
            xerr=[below, above],
            label=run.name,
            color=colour(run.colour),
            fmt=run.marker,
            markersize=5.5,
            elinewidth=1.8,
        )


# Bars
# ----------------------------------------------------------------------------------------------


def _bar_figure(count: int, height: float) -> "tuple[Figure, Axes]":
    """A figure for horizontal bars; `height` of a bar in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.3 + height * count), layout="constrained")
    return figure, figure.subplots()


def _label_bars(axes: "Axes", labels: Sequence[str]) -> None:
    """Bars have their value next to them, so they need no scale and no grid."""
    shown = []
    for label in labels:
        shown.append(label if len(label) <= LONG_LABEL else f"…{label[-LONG_LABEL + 1 :]}")
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _source_figure(runs: Sequence[Run]) -> "tuple[Figure, str] | None":
    """The tokens of each source as a bar, with a tick at the requested number."""
    rows = []
    for run in runs:
        for source, row in run.sources.items():
            if finite(row.get("tokens")) is not None:
                rows.append((run, source, row))
    if not rows:
        return None
    figure, axes = _bar_figure(len(rows), height=0.36)
    widest = max(max(row["tokens"], _requested_tokens(run, row) or 0) for run, _, row in rows)
    tick: dict[str, Any] = {"color": colour("ink"), "linewidth": 1.6, "solid_capstyle": "butt"}
    parts = []
    for place, (run, source, row) in enumerate(rows):
        axes.barh(place, row["tokens"], height=0.5, color=colour(run.colour))
        requested = _requested_tokens(run, row)
        if requested is not None:
            axes.plot([requested] * 2, [place - 0.38, place + 0.38], **tick)
        note = f"{row['tokens']:,} tokens"
        if row.get("realised") is not None:
            note += f", {row['realised']:.2%} of the run"
        if row.get("requested") is not None:
            note += f" (requested: {row['requested']:.2%})"
        axes.text(
            max(row["tokens"], requested or 0) + widest * 0.012, place, note, va="center_baseline"
        )
        parts.append(f"{run.name} {source} {row['tokens']:,} tokens")
    _label_bars(axes, [f"{run.name}: {source}" for run, source, _ in rows])
    axes.set_xlim(0, widest * 1.5)
    return figure, f"Requested (tick) and actual (bar) tokens of each source: {', '.join(parts)}."


def _requested_tokens(run: Run, row: Mapping[str, Any]) -> float | None:
    total = run.summary.get("tokens")
    return None if total is None or row.get("requested") is None else row["requested"] * total


def _length_figure(
    histograms: Mapping[str, Mapping[str, list[int]]],
) -> "tuple[Figure, str] | None":
    """A panel for each histogram: the percentage in each bin. All bins are equally wide."""
    from matplotlib.ticker import PercentFormatter

    counted = {name: found for name, found in histograms.items() if sum(found["counts"])}
    if not counted:
        return None
    figure, grid = panels(len(counted), columns=2, height=2.1)
    descriptions = []
    for axes, (name, histogram) in zip(grid, counted.items(), strict=True):
        counts = histogram["counts"]
        last = max(place for place, count in enumerate(counts) if count)
        fractions = [count / sum(counts) for count in counts[: last + 1]]
        bins = _bins(histogram["edges"])[: last + 1]
        title = HISTOGRAMS.get(name, spaced(name))
        axes.bar(range(last + 1), fractions, width=0.86, color=colour("bar"))
        axes.set_title(title)
        labels = []
        for parts in bins:
            wide = len("".join(parts)) > WIDE_BIN
            labels.append("\n".join(parts) if wide else "".join(parts))
        axes.set_xticks(range(last + 1), labels, fontsize=7.5)
        axes.set_xlim(-0.6, max(last, 7) + 0.6)  # leaves space for the labels
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.tick_params(length=0)
        known = []
        for parts, fraction in zip(bins, fractions, strict=True):
            if fraction:
                known.append(f"{''.join(parts)}: {fraction:.0%}")
        descriptions.append(f"{title} {', '.join(known)}")
    return figure, f"Distribution of lengths: {'; '.join(descriptions)}."


def _bins(edges: Sequence[int]) -> list[tuple[str, ...]]:
    """The whole numbers of each bin, from its edge up to the next edge: ("0–", "4"), ("5",)."""
    labels: list[tuple[str, ...]] = []
    for low, high in pairwise(edges):
        labels.append((str(low),) if high == low + 1 else (f"{low}–", str(high - 1)))
    return [*labels, (f"{edges[-1]}+",)]


def _kind_figure(kinds: Mapping[str, int]) -> "tuple[Figure, str] | None":
    """Pairs of each task type, the most frequent first."""
    total = sum(kinds.values())
    if not total:
        return None
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    widest = ranked[0][1]
    figure, axes = _bar_figure(len(ranked), height=0.26)
    for place, (_, count) in enumerate(ranked):
        axes.barh(place, count, height=0.6, color=colour("bar"))
        note = f"{count:,} ({count / total:.1%})"
        axes.text(count + widest * 0.012, place, note, va="center_baseline")
    _label_bars(axes, [spaced(name) for name, _ in ranked])
    axes.set_xlim(0, widest * 1.18)
    counts = [f"{spaced(name)} {count:,}" for name, count in ranked]
    return figure, f"Pairs by task type: {', '.join(counts)}."


def _stage_figure(stages: Sequence[Mapping[str, Any]]) -> "tuple[Figure, str] | None":
    """The run time of each stage; cached ones are pale."""
    timed = [stage for stage in stages if finite(stage.get("seconds")) is not None]
    if not timed:
        return None
    figure, axes = _bar_figure(len(timed), height=0.32)
    widest = max(max(stage["seconds"] for stage in timed), 1e-3)
    names, notes = [], []
    for place, stage in enumerate(timed):
        is_cached = bool(stage.get("reused"))
        axes.barh(
            place, stage["seconds"], height=0.5, color=colour("bar-pale" if is_cached else "bar")
        )
        note = duration(stage["seconds"])
        shown = f"{note}, cached" if is_cached else note
        axes.text(stage["seconds"] + widest * 0.012, place, shown, va="center_baseline")
        names.append(str(stage.get("name", "")))
        notes.append(f"{names[-1]} {note}")
    _label_bars(axes, names)
    axes.set_xlim(0, widest * 1.18)
    return figure, f"Time per stage: {', '.join(notes)}."
