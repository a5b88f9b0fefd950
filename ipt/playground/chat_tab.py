"""The second tab: chat with a model."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from ipt.chat import Turn, check_chat
from ipt.config import Config
from ipt.playground.models import Models
from ipt.playground.pairs_tab import QUIET
from ipt.playground.stops import Stops
from ipt.playground.uploads import check_text
from ipt.playground.views import conversation_view, notice

MOST_TOKENS = 2_000  # of an answer
WITHOUT_TEMPLATE = "Without the template the model continues your text, as in pre-training."


class Sheet(NamedTuple):
    model: gr.Dropdown
    template: gr.Checkbox
    temperature: gr.Slider
    max_new_tokens: gr.Slider
    conversation: gr.HTML
    state: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button
    turns: gr.State


def add_chat_tab(config: Config, models: Models, stops: Stops, page: gr.Blocks) -> None:
    """Add the tab. The list of models is updated for each visitor."""
    sheet = _lay_out(config, models)
    _wire(config, models, stops, sheet)
    page.load(lambda: gr.update(choices=models.names()), outputs=sheet.model, **QUIET)


def _lay_out(config: Config, models: Models) -> Sheet:
    chat = config.chat
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="sheet", scale=2, min_width=260):
            gr.HTML(
                '<h2>Model</h2><p class="lead">An exported model, or the model of the config.</p>'
            )
            names = models.names()
            model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
            template = gr.Checkbox(
                chat.apply_chat_template,
                label="Use the chat template of the tokenizer",
                info=WITHOUT_TEMPLATE,
                elem_id="template",
            )
            temperature = gr.Slider(
                0,
                2,
                chat.temperature,
                step=0.1,
                label="Temperature (0: greedy decoding)",
                elem_id="temperature",
            )
            most = max(MOST_TOKENS, chat.max_new_tokens)
            tokens = gr.Slider(
                1,
                most,
                chat.max_new_tokens,
                step=1,
                label="Maximum new tokens",
                elem_id="max-new-tokens",
            )
        with gr.Column(elem_classes="sheet", scale=5, min_width=300):
            gr.HTML("<h2>Conversation</h2>")
            conversation = gr.HTML(conversation_view([]), autoscroll=True, elem_id="conversation")
            state = gr.HTML("", elem_id="state")
            question = gr.Textbox(
                label="Message",
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                placeholder="The heart is",
                elem_id="question",
            )
            with gr.Row(elem_classes="buttons"):
                ask = gr.Button("Send", variant="primary", elem_id="ask", min_width=120)
                stop = gr.Button(
                    "Stop", variant="stop", visible=False, elem_id="stop-answer", min_width=120
                )
                clear = gr.Button("New conversation", elem_id="clear", min_width=120)
    return Sheet(
        model,
        template,
        temperature,
        tokens,
        conversation,
        state,
        question,
        ask,
        stop,
        clear,
        gr.State([]),
    )


def _wire(config: Config, models: Models, stops: Stops, sheet: Sheet) -> None:
    def talk(
        question: str,
        turns: list[Turn],
        model: str,
        template: bool,
        temperature: float,
        max_new_tokens: int,
        request: gr.Request,
    ) -> Iterator[Any]:
        chat = replace(
            config.chat,
            apply_chat_template=template,
            temperature=temperature,
            max_new_tokens=int(max_new_tokens),
        )
        try:
            check_chat(chat, config.evaluation)
            check_text(question, config.playground.max_characters, "the question")
            yield (
                conversation_view([*turns, Turn(question)]),
                turns,
                "",
                notice(f"{model} is processing …"),
            )
            context = [*(turns if chat.memory else []), Turn(question)]
            answer = ""
            stopped = stops.begin(request.session_hash)
            for answer, complete in models.answer(model, context, chat, stopped):
                warning = (
                    ""
                    if complete
                    else notice(
                        "The conversation exceeds the context window; its beginning was truncated."
                    )
                )
                now = [*turns, Turn(question, answer)]
                yield conversation_view(now), now, "", warning
            if not answer:
                empty = notice("The model generated no text.")
                yield conversation_view(turns), turns, question, empty
        except (ValueError, OSError, RuntimeError) as error:
            yield gr.skip(), gr.skip(), gr.skip(), notice(error, is_error=True)

    def busy(is_busy: bool) -> tuple[Any, Any]:
        return gr.update(visible=not is_busy), gr.update(visible=is_busy)

    def stop(request: gr.Request) -> None:
        stops.stop(request.session_hash)

    buttons = [sheet.ask, sheet.stop]
    inputs = [
        sheet.question,
        sheet.turns,
        sheet.model,
        sheet.template,
        sheet.temperature,
        sheet.max_new_tokens,
    ]
    started = gr.on(
        [sheet.ask.click, sheet.question.submit], partial(busy, True), outputs=buttons, **QUIET
    )
    answered = started.then(
        talk, inputs, [sheet.conversation, sheet.turns, sheet.question, sheet.state], **QUIET
    )
    answered.then(partial(busy, False), outputs=buttons, **QUIET)
    sheet.stop.click(stop, queue=False, **QUIET)
    sheet.clear.click(
        lambda: (conversation_view([]), [], ""),
        outputs=[sheet.conversation, sheet.turns, sheet.state],
        **QUIET,
    )
