"""The figure of a ratio: runs, law and predicted best ratio, a panel for each validation set."""

import math
from typing import TYPE_CHECKING, Any

from ipt.report.formatting import task_label
from ipt.report.plot_style import colour
from ipt.report.ratio import Panel, RatioStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE, BEST = "arm-1", "arm-2"


def law_figure(study: RatioStudy) -> "tuple[Figure, str] | None":
    from matplotlib.figure import Figure

    if not study.panels:
        return None
    columns = min(3, len(study.panels))
    rows = math.ceil(len(study.panels) / columns)
    figure = Figure(figsize=(10, 0.4 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, study.panels, strict=False):
        _draw_panel(axes, panel, study.source)
    for axes in list(grid.flat)[len(study.panels) :]:
        axes.remove()
    said = [
        f"{task_label(panel.task)}, {panel.measure.label}: {panel.finding}"
        for panel in study.panels
    ]
    return figure, f"Scores against the ratio of {study.source}. {'; '.join(said)}."


def _draw_panel(axes: "Axes", panel: Panel, source: str) -> None:
    from matplotlib.ticker import PercentFormatter

    law = panel.law
    if law is not None:
        axes.fill_between(
            law.ratios, law.low, law.high, color=colour(LINE), alpha=0.16, linewidth=0
        )
        axes.plot(law.ratios, law.curve, color=colour(LINE))
        if not law.is_flat:
            axes.axvspan(law.best_low, law.best_high, color=colour(BEST), alpha=0.14, linewidth=0)
            axes.axvline(law.best, color=colour(BEST), linewidth=1.6, linestyle=(0, (4, 2)))
            side = "left" if law.best < (law.ratios[0] + law.ratios[-1]) / 2 else "right"
            gap = 4 if side == "left" else -4
            place = (law.best, 0.97)
            style: dict[str, Any] = {
                "color": colour(BEST),
                "fontweight": "bold",
                "fontsize": 8.5,
                "va": "top",
                "ha": side,
            }
            axes.annotate(
                f"best {law.best:.2f}",
                place,
                (gap, 0),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                **style,
            )
    axes.plot(
        [point.ratio for point in panel.points],
        [point.value for point in panel.points],
        "o",
        color=colour("ink"),
        markersize=4.5,
    )
    axes.set_title(f"{task_label(panel.task)}\n{panel.measure.label}")
    axes.set_xlabel(f"ratio of {source}")
    axes.set_ylabel(panel.measure.direction)
    axes.tick_params(length=0)
    axes.margins(y=0.18)
    if panel.measure.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
