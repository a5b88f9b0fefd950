"""The first tab: a text, the pairs that a synthesizer generates from it, and the training texts."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from markupsafe import escape

from ipt.config import Config, RenderingConfig
from ipt.playground.stops import Stops
from ipt.playground.synthesizer import Example, Synthesizer, Writing
from ipt.playground.uploads import SUFFIXES, check_text, read_texts
from ipt.playground.views import DRAWS, draws_view, examples_view, notice, pairs_view
from ipt.rendering.layouts import LAYOUTS
from ipt.rendering.render import ARRANGEMENTS
from ipt.synthesis.engines import PromptRefused
from ipt.synthesis.formats.base import RULE_BASED

RECIPE = "random, weights of the recipe"
SAMPLE = (
    "The heart is a muscular organ in the chest. It pumps blood through the blood vessels of the "
    "body. It has four chambers: two atria, which receive blood, and two ventricles, which push it "
    "out. Four valves keep the blood from flowing back. In a resting adult it beats about 70 times "
    "a minute."
)
EMPTY = notice("Pairs appear here while the synthesizer generates them.")
NO_DRAWS = draws_view([], RenderingConfig(), 0)
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of every event


class TextSheet(NamedTuple):
    text: gr.Textbox
    file: gr.File
    document: gr.Slider  # selects a text of the file
    write: gr.Button
    stop: gr.Button
    sample: gr.Button
    earlier: gr.HTML
    keep: gr.Button
    forget: gr.Button


class DrawsSheet(NamedTuple):
    arrangement: gr.Dropdown
    layout: gr.Dropdown
    seed: gr.Number
    others: gr.Button
    draws: gr.HTML

    @property
    def controls(self) -> list[Any]:
        return [self.arrangement, self.layout, self.seed]


class State(NamedTuple):
    """State of an open page, on the server."""

    texts: gr.State  # of the file
    examples: gr.State
    writing: gr.State


def add_pairs_tab(config: Config, synthesizer: Synthesizer, stops: Stops) -> None:
    """Add the tab."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="sheet", min_width=300):
            sheet = _text_sheet(config)
        with gr.Column(elem_classes="sheet", min_width=300):
            gr.HTML(f'<h2>Pairs</h2><p class="lead">{_described(config)}</p>')
            pairs = gr.HTML(EMPTY, elem_id="pairs")
    with gr.Column(elem_classes="sheet"):
        draws = _draws_sheet(config)
    state = State(gr.State([]), gr.State([]), gr.State(None))
    _wire_text(config, sheet, pairs, state)
    _wire_writing(config, synthesizer, stops, sheet, pairs, draws, state)
    _wire_examples(sheet, pairs, draws, state)
    _wire_draws(config, draws, state)


# Layout
# ----------------------------------------------------------------------------------------------


def _text_sheet(config: Config) -> TextSheet:
    gr.HTML(
        '<h2>Text</h2><p class="lead">Paste a passage or upload a file: .txt, .md, or .jsonl with '
        "one document per line.</p>"
    )
    text = gr.Textbox(
        label="Text",
        show_label=False,
        container=False,
        lines=11,
        max_lines=24,
        placeholder="A passage of a few sentences …",
        elem_id="text",
    )
    document = gr.Slider(
        1, 2, 1, step=1, label="Document of the file", visible=False, elem_id="document"
    )
    with gr.Row(elem_classes="buttons"):
        write = gr.Button("Generate pairs", variant="primary", elem_id="write", min_width=120)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop", min_width=120)
        sample = gr.Button("Insert a sample", elem_id="sample", min_width=120)
    file = gr.File(label="File", show_label=False, file_types=[*SUFFIXES], elem_id="file")
    earlier = gr.HTML(examples_view([]), elem_id="examples")
    with gr.Row(elem_classes="buttons"):
        keep = gr.Button("Keep as example", interactive=False, elem_id="keep", min_width=120)
        forget = gr.Button("Remove examples", visible=False, elem_id="forget", min_width=120)
    return TextSheet(text, file, document, write, stop, sample, earlier, keep, forget)


def _draws_sheet(config: Config) -> DrawsSheet:
    gr.HTML(
        '<h2>Training text</h2><p class="lead">The exact text for pre-training. Each seed draws '
        "different templates.</p>"
    )
    with gr.Row(elem_classes="controls"):
        arrangement = gr.Dropdown(
            [*ARRANGEMENTS],
            value=config.rendering.arrangement,
            label="Arrangement",
            elem_id="arrangement",
        )
        layout = gr.Dropdown([RECIPE, *LAYOUTS], value=RECIPE, label="Layout", elem_id="layout")
        seed = gr.Number(config.seed, label="First seed", precision=0, elem_id="seed")
        others = gr.Button("Next seeds", elem_id="others")
    return DrawsSheet(arrangement, layout, seed, others, gr.HTML(NO_DRAWS, elem_id="draws"))


def _described(config: Config) -> str:
    synthesis = config.synthesis
    if synthesis.format == RULE_BASED:
        return "Generated by rules, without a model."
    sampling = "greedy decoding"
    if synthesis.temperature:
        sampling = f"temperature {synthesis.temperature:g}"
    return str(
        escape(
            f"{synthesis.model}, {synthesis.engine} engine, {sampling}, at most "
            f"{synthesis.max_new_tokens} new tokens"
        )
    )


# Events
# ----------------------------------------------------------------------------------------------


def _wire_text(config: Config, sheet: TextSheet, pairs: gr.HTML, state: State) -> None:
    def read(path: str) -> tuple[Any, ...]:
        try:
            texts = read_texts(
                Path(path), config.corpus.text_field, config.playground.max_characters
            )
        except (ValueError, OSError) as error:
            return gr.skip(), [], gr.update(visible=False), notice(error, is_error=True)
        slider = gr.update(
            visible=len(texts) > 1,
            maximum=max(2, len(texts)),
            value=1,
            label=f"Document of the file, 1 to {len(texts):,}",
        )
        return texts[0], texts, slider, EMPTY

    sheet.sample.click(lambda: SAMPLE, outputs=sheet.text, **QUIET)
    sheet.file.upload(read, sheet.file, [sheet.text, state.texts, sheet.document, pairs], **QUIET)
    sheet.file.clear(
        lambda: ([], gr.update(visible=False)), outputs=[state.texts, sheet.document], **QUIET
    )
    chosen = [state.texts, sheet.document]
    sheet.document.release(
        lambda texts, number: texts[int(number) - 1] if texts else gr.skip(),
        chosen,
        sheet.text,
        **QUIET,
    )


def _wire_writing(
    config: Config,
    synthesizer: Synthesizer,
    stops: Stops,
    sheet: TextSheet,
    pairs: gr.HTML,
    draws: DrawsSheet,
    state: State,
) -> None:
    def busy(is_busy: bool) -> tuple[Any, ...]:
        return (
            gr.update(visible=not is_busy),
            gr.update(visible=is_busy),
            gr.update(interactive=False),
        )

    def write(
        text: str,
        examples: list[Example],
        arrangement: str,
        layout: str,
        seed: int,
        request: gr.Request,
    ) -> Iterator[Any]:
        rendering = _rendering(config, arrangement, layout)
        shown_pairs = shown_draws = ""
        try:
            check_text(text, config.playground.max_characters)
            for writing in synthesizer.write(examples, text, stops.begin(request.session_hash)):
                rows = writing.rows() if writing.written() else []
                new_pairs = pairs_view(writing)
                new_draws = draws_view(rows, rendering, int(seed or 0))
                if (new_pairs, new_draws) != (shown_pairs, shown_draws) or writing.ended:
                    yield (
                        gr.skip() if new_pairs == shown_pairs else new_pairs,
                        gr.skip() if new_draws == shown_draws else new_draws,
                        writing,
                        gr.update(interactive=writing.ended),
                    )
                shown_pairs = new_pairs
                shown_draws = new_draws
        except (ValueError, OSError, RuntimeError, PromptRefused) as error:
            yield notice(error, is_error=True), gr.skip(), gr.skip(), gr.skip()

    buttons = [sheet.write, sheet.stop, sheet.keep]
    inputs = [sheet.text, state.examples, *draws.controls]
    started = gr.on(
        [sheet.write.click, sheet.text.submit], partial(busy, True), outputs=buttons, **QUIET
    )
    written = started.then(write, inputs, [pairs, draws.draws, state.writing, sheet.keep], **QUIET)
    written.then(lambda: busy(False)[:2], outputs=buttons[:2], **QUIET)

    def stop(request: gr.Request) -> None:
        stops.stop(request.session_hash)

    sheet.stop.click(stop, queue=False, **QUIET)


def _wire_examples(sheet: TextSheet, pairs: gr.HTML, draws: DrawsSheet, state: State) -> None:
    """Keeping an example and removing all of them both clear the text."""

    def keep(examples: list[Example], writing: Writing | None) -> tuple[Any, ...]:
        return begin([*examples, writing.example()] if writing else examples)

    def begin(examples: list[Example]) -> tuple[Any, ...]:
        buttons = gr.update(interactive=False), gr.update(visible=bool(examples))
        return examples, examples_view(examples), "", None, EMPTY, NO_DRAWS, *buttons

    outputs = [
        state.examples,
        sheet.earlier,
        sheet.text,
        state.writing,
        pairs,
        draws.draws,
        sheet.keep,
        sheet.forget,
    ]
    sheet.keep.click(keep, [state.examples, state.writing], outputs, **QUIET)
    sheet.forget.click(partial(begin, []), outputs=outputs, **QUIET)


def _wire_draws(config: Config, sheet: DrawsSheet, state: State) -> None:
    def draw(writing: Writing | None, arrangement: str, layout: str, seed: int) -> str:
        return draws_view(
            writing.rows() if writing else [],
            _rendering(config, arrangement, layout),
            int(seed or 0),
        )

    sheet.others.click(lambda seed: int(seed or 0) + DRAWS, sheet.seed, sheet.seed, **QUIET)
    gr.on(
        [control.change for control in sheet.controls],
        draw,
        [state.writing, *sheet.controls],
        sheet.draws,
        **QUIET,
    )


def _rendering(config: Config, arrangement: str, layout: str) -> RenderingConfig:
    layouts = config.rendering.layouts if layout == RECIPE else {layout: 1.0}
    return replace(config.rendering, arrangement=arrangement, layouts=layouts)
