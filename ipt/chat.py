"""A conversation with a model in the terminal, or with the lines of standard input.

A pre-trained model has no prompt template: it continues the text of the user, as the model cards of
the released models describe. `chat.apply_chat_template` uses the tokenizer's chat template.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from ipt.chat_templates import check_kwargs
from ipt.config import ChatConfig, EvaluationConfig
from ipt.console import console
from ipt.errors import UserError

if TYPE_CHECKING:
    from ipt.evaluation.backends.huggingface import Scorer

BETWEEN = "\n\n"  # between an answer and the next question, without a template


class Turn(NamedTuple):
    question: str
    answer: str = ""


def check_chat(config: ChatConfig, evaluation: EvaluationConfig) -> None:
    """Raise UserError for a value that cannot work."""
    check_kwargs(evaluation.chat_template_kwargs, "evaluation.chat_template_kwargs")
    if evaluation.backend != "hf":
        raise UserError(
            f"evaluation.backend={evaluation.backend}: chat supports only evaluation.backend=hf"
        )
    if config.max_new_tokens < 1:
        raise UserError(f"chat.max_new_tokens is {config.max_new_tokens}, expected 1 or more")
    if config.temperature < 0:
        raise UserError(f"chat.temperature is {config.temperature}, expected 0 (greedy) or more")


def chat(config: ChatConfig, evaluation: EvaluationConfig, model: str) -> None:
    """Answer questions until Ctrl-D. Ctrl-C ends an answer, which stays in the conversation."""
    from ipt.evaluation.backends.encoding import check_chat as check_template
    from ipt.evaluation.backends.huggingface import load_scorer

    scorer = load_scorer(replace(evaluation, apply_chat_template=False, scoring="plain"), model)
    if config.apply_chat_template:
        check_template(scorer.encoder.tokenizer, True, scorer.encoder.chat_template_kwargs)
    turns: list[Turn] = []
    for question in _questions():
        prompt, complete = prompt_of([*turns, Turn(question)], scorer, config)
        if not complete:
            console.print(
                f"[dim]longer than the context length of {scorer.encoder.max_length} tokens: the "
                "beginning is left out"
            )
        written = ""
        try:
            for piece in answer(scorer, prompt, config):
                written += piece
                print(piece, end="", flush=True)
            if not written.strip():
                has_template = bool(scorer.encoder.tokenizer.chat_template)
                hint = ""
                if has_template and not config.apply_chat_template:
                    hint = "; the model has a chat template: set chat.apply_chat_template=true"
                console.print(f"[dim]empty answer: the model ends at once{hint}")
        except KeyboardInterrupt:
            console.print("[dim] – stopped")
        print("\n")
        if config.memory:
            turns.append(Turn(question, written))


def prompt_of(turns: list[Turn], scorer: "Scorer", config: ChatConfig) -> tuple[list[int], bool]:
    """Tokens of a conversation before its last answer, and whether it is complete.

    If it does not fit, the oldest turns are left out, then the beginning of the last question.
    """
    for first in range(len(turns)):
        kept = turns[first:]
        if config.apply_chat_template:
            ids, truncated = scorer.encoder.conversation(_messages(kept), config.max_new_tokens)
        else:
            text = BETWEEN.join(turn.question + turn.answer for turn in kept)
            ids, truncated = scorer.encoder.prompt(text, config.max_new_tokens)
        if not truncated:
            break
    return ids, not (first or truncated)


def answer(scorer: "Scorer", prompt: list[int], config: ChatConfig) -> Iterator[str]:
    """The model's answer in pieces. Closing the iterator ends the generation."""
    import torch
    from transformers import GenerationConfig, TextIteratorStreamer

    from ipt.evaluation.backends.base import end_tokens

    tokenizer, stopped = scorer.encoder.tokenizer, Event()
    ends = sorted(end_tokens(scorer.inner.generation_config, tokenizer))
    settings = GenerationConfig(  # without the defaults of the model's folder
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        **({"temperature": config.temperature, "top_k": 0} if config.temperature else {}),
        stop_strings=config.stop or None,
        eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
    )
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ids_BT = torch.tensor([prompt], device=scorer.device)

    def generate() -> None:
        try:
            scorer.inner.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=settings,
                streamer=streamer,
                stopping_criteria=[
                    lambda ids_BT, scores: torch.full((1,), stopped.is_set(), device=ids_BT.device)
                ],
                tokenizer=tokenizer,
            )
        finally:
            streamer.end()  # otherwise the reader would wait forever after an error

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(generate)
        try:
            yield from streamer
        finally:
            stopped.set()
        done.result()


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """The turns without the last answer."""
    messages = []
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
    return messages[:-1]


def _questions() -> Iterator[str]:
    """Questions from the terminal, or lines of standard input. A backslash at the end of a line
    continues the question; empty lines are skipped.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        console.print(
            "[dim]Ctrl-C stops an answer, Ctrl-D ends. \\ at the end of a line continues the "
            "question."
        )
    question = ""
    while True:
        prompt = ""
        if terminal:
            prompt = "… " if question else "> "
        try:
            line = input(prompt)
        except EOFError:
            break
        except KeyboardInterrupt:
            question = ""
            print()
            continue
        question += line.removesuffix("\\")
        if line.endswith("\\"):
            question += "\n"
        elif question.strip():
            yield question
            question = ""
    if question.strip():
        yield question
