"""The page as a whole: its two tabs and its looks."""

from pathlib import Path

import gradio as gr

from ipt.config import Config
from ipt.playground.chat_tab import add_talking
from ipt.playground.models import Models
from ipt.playground.pairs_tab import add_writing
from ipt.playground.stops import Stops
from ipt.playground.synthesizer import Synthesizer

STYLE = Path(__file__).with_name("page.css")
SANS = (
    "Inter",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "Liberation Sans",
    "Arial",
    "sans-serif",
)  # what the machine has
MONO = (
    "SF Mono",
    "Cascadia Mono",
    "Menlo",
    "Consolas",
    "Liberation Mono",
    "DejaVu Sans Mono",
    "monospace",
)
# Gradio's variables in terms of ours, which page.css gives for light and dark.
COLOURS = {
    "body_text_color_subdued": "muted",
    "background_fill_primary": "card",
    "background_fill_secondary": "wash",
    "block_background_fill": "card",
    "block_border_color": "rule",
    "block_label_background_fill": "card",
    "block_label_text_color": "muted",
    "block_title_text_color": "muted",
    "block_info_text_color": "muted",
    "border_color_primary": "rule",
    "border_color_accent": "link",
    "color_accent": "link",
    "color_accent_soft": "wash",
    "input_background_fill": "card",
    "input_border_color": "rule",
    "input_border_color_focus": "link",
    "input_placeholder_color": "muted",
    "button_primary_background_fill": "button",
    "button_primary_background_fill_hover": "button-hover",
    "button_primary_text_color": "on-button",
    "button_secondary_background_fill": "wash",
    "button_secondary_background_fill_hover": "rule",
    "button_secondary_text_color": "ink",
    "button_cancel_background_fill": "bad-wash",
    "button_cancel_background_fill_hover": "rule",
    "button_cancel_text_color": "bad",
    "checkbox_background_color_selected": "link",
    "slider_color": "link",
    "link_text_color": "link",
}
# These two colour the page before its styles are there: --page and --ink of page.css, for light and
# dark.
FIRST = {
    **{"body_background_fill": "#f6f7f9", "body_background_fill_dark": "#11151b"},
    **{"body_text_color": "#1b2330", "body_text_color_dark": "#e8ebf0"},
}
HEADER = '<header><p class="eyebrow">Instruction Pre-Training</p><h1>Playground</h1></header>'


def build_page(config: Config, synthesizer: Synthesizer, models: Models, stops: Stops) -> gr.Blocks:
    """The page, ready to be served with `theme()` and STYLE. What is dropped on it is deleted after
    an hour and when the server ends.
    """
    with gr.Blocks(
        title="Playground, Instruction Pre-Training",
        analytics_enabled=False,
        delete_cache=(600, 3600),
    ) as page:
        gr.HTML(HEADER)
        with gr.Tab("Pairs from a text", id="pairs"):
            add_writing(config, synthesizer, stops)
        with gr.Tab("Talk to a model", id="talk"):
            add_talking(config, models, stops, page)
    return page


def theme() -> gr.themes.Base:
    """Fonts of the machine, and colours that page.css gives."""
    base = gr.themes.Base(
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
        radius_size=gr.themes.sizes.radius_md,
    )
    colours = {name: f"var(--{ours})" for name, ours in COLOURS.items()}
    return base.set(
        **FIRST,
        **colours,
        **{
            f"{name}_dark": value
            for name, value in colours.items()
            if hasattr(base, f"{name}_dark")
        },
    )
