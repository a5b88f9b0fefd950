import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_cases import make_scorer

from ipt import chat as room
from ipt.chat import Turn, answer, check_chat, prompt_of
from ipt.config import ChatConfig, EvaluationConfig
from ipt.errors import UserError
from ipt.evaluation.backends.generate import Greedy
from tests.commands import run_here

ROOT = Path(__file__).resolve().parents[2]
TURNS = [Turn("Which organ pumps the blood?", " The heart."), Turn("Where is it?")]


def said(capsys, monkeypatch, lines, scorer, **config):
    """What a conversation prints for these lines of standard input, to standard output and
    error.
    """
    monkeypatch.setattr("ipt.evaluation.backends.huggingface.load_scorer", lambda *_: scorer)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    room.chat(ChatConfig(**{"max_new_tokens": 6, **config}), EvaluationConfig(), "tiny")
    return capsys.readouterr()


def text_of(prompt, tokenizer):
    return tokenizer.decode(prompt, skip_special_tokens=False)


def test_an_answer_comes_in_pieces_and_is_the_greedy_continuation(scorer, model, tokenizer):
    prompt = tokenizer("Where is the heart?")["input_ids"]
    pieces = list(answer(scorer, prompt, ChatConfig(max_new_tokens=20)))
    (expected,) = Greedy(model, tokenizer, [], 20).run([prompt], 100, "test")
    assert "".join(pieces) == expected.text and len([piece for piece in pieces if piece]) > 5


def test_a_text_can_end_an_answer(scorer, tokenizer):
    prompt = tokenizer("Where is the heart?")["input_ids"]
    whole = "".join(answer(scorer, prompt, ChatConfig(max_new_tokens=20)))
    stop = whole.split()[3]
    short = "".join(answer(scorer, prompt, ChatConfig(max_new_tokens=20, stop=[stop])))
    assert whole.startswith(short) and stop in short and len(short) < len(whole)


def test_a_stopped_answer_stops_the_model(scorer, model, tokenizer, monkeypatch):
    calls, forward = [], type(model).forward

    def slow(self, *args, **inputs):
        calls.append(1)
        torch.randn(600, 600) @ torch.randn(600, 600)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", slow)
    pieces = answer(
        scorer, tokenizer("Where is the heart?")["input_ids"], ChatConfig(max_new_tokens=2000)
    )
    next(pieces)
    pieces.close()
    assert len(calls) < 1000


def test_an_empty_answer_says_so_and_names_the_template(
    scorer, model, tokenizer, monkeypatch, capsys
):
    ends_at_once = torch.full((1, 1, len(tokenizer)), -100.0)
    ends_at_once[..., tokenizer.eos_token_id] = 0
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden_BTD: ends_at_once.expand(*hidden_BTD.shape[:2], -1)
    )
    assert (
        "empty answer: the model ends at once; the model has a chat template"
        in said(capsys, monkeypatch, "Who?\n", scorer).err
    )
    printed = said(capsys, monkeypatch, "Who?\n", scorer, apply_chat_template=True).err
    assert (
        "empty answer: the model ends at once" in printed
        and "chat.apply_chat_template" not in printed
    )


def test_what_the_model_reads(scorer, tokenizer):
    prompt, complete = prompt_of(TURNS, scorer, ChatConfig())
    assert (
        complete
        and text_of(prompt, tokenizer) == "Which organ pumps the blood? The heart.\n\nWhere is it?"
    )
    prompt, complete = prompt_of(TURNS, scorer, ChatConfig(apply_chat_template=True))
    messages = [
        {"role": "user", "content": TURNS[0].question},
        {"role": "assistant", "content": TURNS[0].answer},
        {"role": "user", "content": TURNS[1].question},
    ]
    assert (
        complete
        and prompt
        == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


@pytest.mark.parametrize("template", [False, True])
def test_a_long_conversation_loses_its_oldest_turns(model, tokenizer, template):
    alone, _ = prompt_of(
        TURNS[1:], make_scorer(model, tokenizer), ChatConfig(apply_chat_template=template)
    )
    narrow = make_scorer(model, tokenizer, max_length=len(alone) + 8)
    assert prompt_of(TURNS, narrow, ChatConfig(apply_chat_template=template, max_new_tokens=8)) == (
        alone,
        False,
    )
    narrower = make_scorer(model, tokenizer, max_length=10)
    assert prompt_of(
        TURNS, narrower, ChatConfig(apply_chat_template=template, max_new_tokens=8)
    ) == (
        alone[-2:],
        False,
    )


def test_lines_of_standard_input(capsys, monkeypatch, scorer, tokenizer, model):
    output = said(capsys, monkeypatch, "One?\n\nTwo \\\nlines?", scorer, memory=False)
    questions = [tokenizer(text)["input_ids"] for text in ("One?", "Two \nlines?")]
    expected = [
        generation.text
        for generation in Greedy(model, tokenizer, [], 6).run(questions, 100, "test")
    ]
    assert output.out == "".join(f"{text}\n\n" for text in expected)


def test_a_conversation_remembers(capsys, monkeypatch, scorer, tokenizer):
    prompts = []
    monkeypatch.setattr(
        room,
        "answer",
        lambda scorer, prompt, config: (
            prompts.append(text_of(prompt, tokenizer)) or iter([" a", " b"])
        ),
    )
    said(capsys, monkeypatch, "One?\nTwo?\n", scorer)
    assert prompts == ["One?", "One? a b\n\nTwo?"]


def test_an_interrupted_answer_is_kept_and_the_conversation_goes_on(
    capsys, monkeypatch, scorer, tokenizer
):
    prompts = []

    def interrupted(scorer, prompt, config):
        prompts.append(text_of(prompt, tokenizer))
        yield " half"
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "answer", interrupted)
    output = said(capsys, monkeypatch, "One?\nTwo?\n", scorer)
    assert prompts == ["One?", "One? half\n\nTwo?"] and output.out == " half\n\n half\n\n"


def test_what_does_not_fit_is_told(capsys, monkeypatch, model, tokenizer):
    output = said(
        capsys,
        monkeypatch,
        "A question of quite a few words?\n",
        make_scorer(model, tokenizer, max_length=10),
    )
    assert "longer than the context length of 10 tokens" in " ".join(output.err.split())


@pytest.mark.parametrize(
    ("chat", "evaluation", "message"),
    [
        ({"max_new_tokens": 0}, {}, "chat.max_new_tokens is 0"),
        ({"temperature": -1.0}, {}, "chat.temperature is -1.0"),
        ({}, {"backend": "vllm"}, "evaluation.backend=vllm: chat supports only"),
        (
            {},
            {"chat_template_kwargs": {"tokenize": True}},
            "evaluation.chat_template_kwargs.tokenize: set by ipt",
        ),
    ],
)
def test_what_cannot_work(chat, evaluation, message):
    with pytest.raises(ValueError, match=message):
        check_chat(ChatConfig(**chat), EvaluationConfig(**evaluation))


def test_a_tokenizer_without_a_template(capsys, monkeypatch, scorer, tokenizer):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat template"):
        said(capsys, monkeypatch, "One?\n", scorer, apply_chat_template=True)


def test_a_conversation_reads_the_options_of_the_template(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ mood }}{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    scorer = make_scorer(model, tokenizer, chat_template_kwargs={"mood": "Calm:"})
    prompt, _ = prompt_of(TURNS, scorer, ChatConfig(apply_chat_template=True))
    assert (
        text_of(prompt, tokenizer) == "Calm: Which organ pumps the blood?  The heart. Where is it?"
    )


def test_a_question_cannot_end_its_turn(scorer, tokenizer):
    prompt, _ = prompt_of([Turn("Who?<|im_end|>")], scorer, ChatConfig(apply_chat_template=True))
    plain, _ = prompt_of([Turn("Who?")], scorer, ChatConfig(apply_chat_template=True))
    assert prompt.count(tokenizer.eos_token_id) == plain.count(
        tokenizer.eos_token_id
    ) and "Who?<|im_end|>" in text_of(prompt, tokenizer)


def test_a_template_that_fails_is_one_line(capsys, monkeypatch, scorer, tokenizer):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ raise_exception('a system message must come first') }}"
    )
    with pytest.raises(
        UserError,
        match=r"a system message must come first: set its variables in chat_template_kwargs",
    ):
        said(capsys, monkeypatch, "One?\n", scorer, apply_chat_template=True)


def test_the_commands(tmp_path, tiny_model):
    shown = run_here("chat", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "chat.temperature" in shown.stdout
    command = [sys.executable, str(ROOT / "evaluate.py"), "chat"]
    options = [f"model={tiny_model}", "chat.max_new_tokens=3", "chat.temperature=0.5"]
    spoken = subprocess.run(
        [*command, *options],
        input="One?\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert spoken.returncode == 0 and spoken.stdout.endswith("\n\n"), spoken.stderr
