"""The figures of a report, drawn once: as PNG on a white ground, and as inline SVG for the page.

The colours of the SVG are CSS variables, so that it follows the reader's light or dark setting.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ipt.experiment.scores import Run, Score, column, main_scores, measure_of
from ipt.experiment.wording import duration, finite, listed, spaced, task_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
class Drawing:
    svg: Markup
    png: bytes


def draw_figures(runs: list[Run], scores: list[Score], stages: list[dict[str, Any]], quality: Mapping[str, Any]) -> dict[str, Drawing]:
    """Name -> drawing, for each figure that has something to show."""
    import matplotlib

    drawings = {}
    with matplotlib.rc_context(STYLE):
        drawn = {
            "losses": _loss_figure(runs),
            "scores": _score_figure(runs, scores),
            "sources": _source_figure(runs),
            "lengths": _length_figure(quality.get("histograms") or {}),
            "kinds": _kind_figure(quality.get("kinds") or {}),
            "stages": _stage_figure(stages),
        }
        for name, found in drawn.items():
            if found is not None:
                figure, description = found
                with matplotlib.rc_context({"svg.hashsalt": name}):  # ids are the same in every run, and no two figures share one
                    svg = _inline_svg(figure, description)
                figure.set_layout_engine("none")  # it is laid out now, and the PNG is the same drawing
                drawings[name] = Drawing(svg, _png(figure))
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


def _loss_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
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
    last = [f"{run.name} {column(run.steps, 'loss')[1][-1]:.3f}" for run in trained if column(run.steps, "loss")[1]]
    return figure, f"Training loss against trained tokens. Loss of the last step: {', '.join(last)}."


def _draw_loss(axes: "Axes", run: Run, name: str) -> tuple[float, str, str] | None:
    """Draw one curve, single steps pale and their trailing mean in full colour; return where it ends."""
    import numpy as np

    tokens, losses = column(run.steps, name)
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
    return figure, f"Scores with 95% intervals of {listed([run.name for run in runs])}: {shown}. The tables hold the same figures."


def _draw_scores(axes: "Axes", metric: str, tasks: dict[str, dict[str, Score]], runs: list[Run]) -> None:
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
        below = [0.0 if score.low is None else max(0.0, value - score.low) for _, score, value in known]
        above = [0.0 if score.high is None else max(0.0, score.high - value) for _, score, value in known]
        style: dict[str, Any] = {"color": _colour(run.colour), "fmt": run.marker, "markersize": 5.5, "elinewidth": 1.8}
        axes.errorbar([value for *_, value in known], [height for height, *_ in known], xerr=[below, above], label=run.name, **style)


def _source_figure(runs: list[Run]) -> "tuple[Figure, str] | None":
    """Tokens of each source as a bar, and a tick where the request was."""
    from matplotlib.figure import Figure

    rows = [(run, source, row) for run in runs for source, row in run.sources.items() if finite(row.get("tokens")) is not None]
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


def _requested_tokens(run: Run, row: Mapping[str, Any]) -> float | None:
    total = run.summary.get("tokens")
    return None if total is None or row.get("requested") is None else row["requested"] * total


def _length_figure(histograms: Mapping[str, Mapping[str, list[int]]]) -> "tuple[Figure, str] | None":
    """A panel for each histogram: the share of what falls into each bin, which is as wide as any other."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    counted = {name: histogram for name, histogram in histograms.items() if sum(histogram["counts"])}
    if not counted:
        return None
    figure = Figure(figsize=(10, 0.3 + 2.1 * math.ceil(len(counted) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(counted) / 2), 2, squeeze=False)
    descriptions = []
    for axes, (name, histogram) in zip(grid.flat, counted.items(), strict=False):
        edges, total = histogram["edges"], sum(histogram["counts"])
        last = max(place for place, count in enumerate(histogram["counts"]) if count)
        shares = [count / total for count in histogram["counts"][: last + 1]]
        labels = [_bin_label(low, high) for low, high in zip(edges, [*edges[1:], None], strict=True)]
        axes.bar(range(last + 1), shares, width=0.86, color=_colour("bar"))
        axes.set_title(spaced(name).replace("per row", "per document"))
        axes.set_xticks(
            range(last + 1), [label.replace("–", "–\n") if len(label) > 6 else label for label in labels[: last + 1]], fontsize=7.5
        )
        axes.set_xlim(-0.6, max(last, 7) + 0.6)  # room for the labels
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.tick_params(length=0)
        known = [f"{label} {share:.0%}" for label, share in zip(labels, shares, strict=False) if share]
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
        axes.barh(place, count, height=0.6, color=_colour("bar"))
        axes.text(count + ranked[0][1] * 0.012, place, f"{count:,}, {count / total:.1%}", va="center")
    _plain_bars(axes, [spaced(name) for name, _ in ranked])
    axes.set_xlim(0, ranked[0][1] * 1.18)
    return figure, f"Pairs by kind of task: {', '.join(f'{spaced(name)} {count:,}' for name, count in ranked)}."


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
