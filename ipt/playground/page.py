"""The page: its two tabs and its theme."""

from pathlib import Path

import gradio as gr

from ipt.config import Config
from ipt.playground.chat_tab import add_chat_tab
from ipt.playground.models import Models
from ipt.playground.pairs_tab import add_pairs_tab
from ipt.playground.stops import Stops
from ipt.playground.synthesizer import Synthesizer

STYLE = Path(__file__).with_name("page.css")
# Fonts of the visitor's machine.
SANS = ["Inter", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Liberation Sans", "Arial"]
SANS += ["sans-serif"]
MONO = ["SF Mono", "Cascadia Mono", "Menlo", "Consolas", "Liberation Mono", "DejaVu Sans Mono"]
MONO += ["monospace"]
# Gradio's variable -> ours, which page.css defines for light and dark mode.
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
# Colours before page.css is loaded: its --page and --ink.
FIRST = {
    "body_background_fill": "#f6f7f9",
    "body_background_fill_dark": "#11151b",
    "body_text_color": "#1b2330",
    "body_text_color_dark": "#e8ebf0",
}
HEADER = '<header><p class="eyebrow">Instruction Pre-Training</p><h1>Playground</h1></header>'


def build_page(config: Config, synthesizer: Synthesizer, models: Models, stops: Stops) -> gr.Blocks:
    """The page, to be served with `theme()` and STYLE.

    Uploaded files are deleted after an hour and when the server ends.
    """
    with gr.Blocks(
        title="Playground, Instruction Pre-Training",
        analytics_enabled=False,
        delete_cache=(600, 3600),
    ) as page:
        gr.HTML(HEADER)
        with gr.Tab("Generate pairs", id="pairs"):
            add_pairs_tab(config, synthesizer, stops)
        with gr.Tab("Chat with a model", id="chat"):
            add_chat_tab(config, models, stops, page)
    return page


def theme() -> gr.themes.Base:
    """Fonts of the visitor's machine, and the colours of page.css."""
    base = gr.themes.Base(
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
        radius_size=gr.themes.sizes.radius_md,
    )
    colours = {name: f"var(--{ours})" for name, ours in COLOURS.items()}
    dark = {f"{name}_dark": value for name, value in colours.items()}
    known = {name: value for name, value in dark.items() if hasattr(base, name)}
    return base.set(**FIRST, **colours, **known)
