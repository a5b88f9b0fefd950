"""A conversation with a model in the terminal, or with the lines of standard input.

A pre-trained model has no prompt template: it goes on with what is typed, as the released models'
cards say. With `chat.apply_chat_template` each question goes through the chat template of the model's
tokenizer.
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

BETWEEN = "\n\n"  # an answer and the next question, without a template


class Turn(NamedTuple):
    question: str
    answer: str = ""


def check_chat(config: ChatConfig, evaluation: EvaluationConfig) -> None:
    """Raise UserError for a value that cannot work."""
    check_kwargs(evaluation.chat_template_kwargs, "evaluation.chat_template_kwargs")
    if evaluation.backend != "hf":
        raise UserError(
            f"evaluation.backend={evaluation.backend}: a chat runs on the Hugging Face backend: "
            "leave it at hf"
        )
    if config.max_new_tokens < 1:
        raise UserError(f"chat.max_new_tokens is {config.max_new_tokens}, expected 1 or more")
    if config.temperature < 0:
        raise UserError(
            f"chat.temperature is {config.temperature}, expected 0 (the likeliest token) or more"
        )


def chat(config: ChatConfig, evaluation: EvaluationConfig, model: str) -> None:
    """Answer questions until their end (Ctrl-D). Ctrl-C ends an answer; what was said stays."""
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
                f"[dim]longer than the {scorer.encoder.max_length} tokens that the model reads: "
                "the beginning is left out"
            )
        said = []
        try:
            for piece in answer(scorer, prompt, config):
                said.append(piece)
                print(piece, end="", flush=True)
            if not "".join(said).strip():
                console.print(
                    f"[dim]nothing: the model ends at once{_template_unused(config, scorer)}"
                )
        except KeyboardInterrupt:
            console.print("[dim] – stopped")
        print("\n")
        if config.memory:
            turns.append(Turn(question, "".join(said)))


def prompt_of(turns: list[Turn], scorer: "Scorer", config: ChatConfig) -> tuple[list[int], bool]:
    """Tokens of a conversation whose last answer is to come, and whether it is complete.

    The oldest turns are left out where it does not fit, and if need be the beginning of the last
    question.
    """
    for first in range(len(turns)):
        said = turns[first:]
        if config.apply_chat_template:
            ids, truncated = scorer.encoder.conversation(_messages(said), config.max_new_tokens)
        else:
            text = BETWEEN.join(turn.question + turn.answer for turn in said)
            ids, truncated = scorer.encoder.prompt(text, config.max_new_tokens)
        if not truncated:
            break
    return ids, not (first or truncated)


def answer(scorer: "Scorer", prompt: list[int], config: ChatConfig) -> Iterator[str]:
    """The model's answer, piece by piece. Closing the iterator ends the generation."""
    import torch
    from transformers import GenerationConfig, TextIteratorStreamer

    from ipt.evaluation.backends.base import end_tokens

    tokenizer, stopped = scorer.encoder.tokenizer, Event()
    ends = sorted(end_tokens(scorer.inner.generation_config, tokenizer))
    settings = GenerationConfig(  # what is said here, and no defaults from the model's folder
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
            streamer.end()  # else whoever reads would wait for ever after an error

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(generate)
        try:
            yield from streamer
        finally:
            stopped.set()
        done.result()


def _template_unused(config: ChatConfig, scorer: "Scorer") -> str:
    unused = not config.apply_chat_template and scorer.encoder.tokenizer.chat_template
    return (
        "; it was tuned with a chat template: chat.apply_chat_template=true uses it"
        if unused
        else ""
    )


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """The turns without the last answer, which is to come."""
    messages = []
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
    return messages[:-1]


def _questions() -> Iterator[str]:
    """What is typed, or the lines of standard input. A line that ends in a backslash goes on in the
    next one; empty ones are none.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        console.print(
            "[dim]Ctrl-C stops an answer, Ctrl-D ends. \\ at the end of a line: the question goes "
            "on."
        )
    question = ""
    while True:
        try:
            line = input(("… " if question else "> ") if terminal else "")
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
