"""The second tab: chat with a model."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import gradio as gr

from ipt.chat import Turn, check_chat
from ipt.config import ChatConfig, Config
from ipt.playground.models import Models
from ipt.playground.pairs_tab import QUIET
from ipt.playground.stops import Stops
from ipt.playground.uploads import check_text
from ipt.playground.views import conversation_view, notice

MOST_TOKENS = 2_000  # of an answer
TRUNCATED = "The conversation exceeds the context window; its beginning was truncated."
WITHOUT_TEMPLATE = "Without the template the model continues your text, as in pre-training."


class ModelSheet(NamedTuple):
    model: gr.Dropdown
    template: gr.Checkbox
    temperature: gr.Slider
    max_new_tokens: gr.Slider


class ChatSheet(NamedTuple):
    conversation: gr.HTML
    state: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button


def add_chat_tab(config: Config, models: Models, stops: Stops, page: gr.Blocks) -> None:
    """Add the tab. The list of models is updated for each visitor."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="sheet", scale=2, min_width=260):
            settings = _model_sheet(config, models)
        with gr.Column(elem_classes="sheet", scale=5, min_width=300):
            sheet = _chat_sheet()
    _wire(config, models, stops, settings, sheet)
    page.load(lambda: gr.update(choices=models.names()), outputs=settings.model, **QUIET)


def _model_sheet(config: Config, models: Models) -> ModelSheet:
    chat = config.chat
    gr.HTML('<h2>Model</h2><p class="lead">An exported model, or the model of the config.</p>')
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
    max_new_tokens = gr.Slider(
        1,
        max(MOST_TOKENS, chat.max_new_tokens),
        chat.max_new_tokens,
        step=1,
        label="Maximum new tokens",
        elem_id="max-new-tokens",
    )
    return ModelSheet(model, template, temperature, max_new_tokens)


def _chat_sheet() -> ChatSheet:
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
    return ChatSheet(conversation, state, question, ask, stop, clear)


def _wire(
    config: Config, models: Models, stops: Stops, settings: ModelSheet, sheet: ChatSheet
) -> None:
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
            check_text(question, config.playground.max_characters, "the message")
            stopped = stops.begin(request.session_hash)
            yield from _answer(models, model, turns, question, chat, stopped)
        except (ValueError, OSError, RuntimeError) as error:
            yield gr.skip(), gr.skip(), gr.skip(), notice(error, is_error=True)

    def busy(is_busy: bool) -> tuple[Any, Any]:
        return gr.update(visible=not is_busy), gr.update(visible=is_busy)

    def stop(request: gr.Request) -> None:
        stops.stop(request.session_hash)

    turns = gr.State([])
    buttons = [sheet.ask, sheet.stop]
    started = gr.on(
        [sheet.ask.click, sheet.question.submit], partial(busy, True), outputs=buttons, **QUIET
    )
    answered = started.then(
        talk,
        [sheet.question, turns, *settings],
        [sheet.conversation, turns, sheet.question, sheet.state],
        **QUIET,
    )
    answered.then(partial(busy, False), outputs=buttons, **QUIET)
    sheet.stop.click(stop, queue=False, **QUIET)
    sheet.clear.click(
        lambda: (conversation_view([]), [], ""),
        outputs=[sheet.conversation, turns, sheet.state],
        **QUIET,
    )


def _answer(
    models: Models, model: str, turns: list[Turn], question: str, chat: ChatConfig, stopped: Event
) -> Iterator[tuple[str, list[Turn], str, str]]:
    """Yield the conversation, its turns, the content of the text box and the status line."""
    yield conversation_view([*turns, Turn(question)]), turns, "", notice(f"Running {model} …")
    context = [*(turns if chat.memory else []), Turn(question)]
    text = ""
    for text, complete in models.answer(model, context, chat, stopped):
        now = [*turns, Turn(question, text)]
        yield conversation_view(now), now, "", "" if complete else notice(TRUNCATED)
    if not text:
        yield conversation_view(turns), turns, question, notice("The model generated no text.")
