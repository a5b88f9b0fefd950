"""What all figures of a report share: colours, style, grids of panels, conversion to PNG and SVG.

Colours in the SVG are CSS variables, so that figures follow the light or dark mode of the page.
"""

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Role -> colour on a light and on a dark page. Arms also differ in lightness, so that they can be
# distinguished with any of the three forms of colour blindness. Their contrast against the page and
# table headings is at least 4.5:1.
PALETTE = {
    "ink": ("#1b2330", "#e8ebf0"),
    "muted": ("#596273", "#a3adbb"),
    "rule": ("#d8dde5", "#363f4c"),
    "bar": ("#7d8ca3", "#8091ab"),
    "bar-pale": ("#d3dae4", "#3d4857"),
    "arm-0": ("#5a5f71", "#acadb6"),
    "arm-1": ("#0262f2", "#5393fd"),
    "arm-2": ("#a25c06", "#fc7508"),
    "arm-3": ("#01432f", "#96f8ac"),
    "arm-4": ("#520260", "#b67eb7"),
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


@dataclass(frozen=True)
class Drawing:
    svg: Markup
    png: bytes


def render(name: str, figure: "Figure", description: str) -> Drawing:
    """The figure as PNG on white and as inline SVG.

    `name` makes the ids in the SVG unique among figures, and the same in every run.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        svg = _inline_svg(figure, description)
    figure.set_layout_engine("none")  # keeps the layout of the SVG
    return Drawing(svg, _png(figure))


def colour(role: str) -> str:
    """The colour of a role on a light page; in the SVG it becomes a variable."""
    return PALETTE[role][0]


def panels(
    count: int, columns: int = 3, height: float = 2.9, sharey: bool = False
) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels in rows of `columns`; `height` of a row in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10, 0.4 + height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _inline_svg(figure: "Figure", description: str) -> Markup:
    """The figure as an SVG element without fonts and metadata, with variables as colours."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    opening, drawing = svg[svg.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing).replace("xlink:href", "href")
    drawing = re.sub(r" font-family: [^;\"]*;?", "", drawing)
    for role, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{role})")
    label = Markup.escape(description)
    # matplotlib has escaped its texts.
    return Markup(f'<svg role="img" aria-label="{label}" {view.group()}>{drawing}')
