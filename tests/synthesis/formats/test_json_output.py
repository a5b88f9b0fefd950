"""What models write before and around the JSON that they were asked for."""

import json
from collections import Counter

import pytest

from ipt.config import SynthesisConfig
from ipt.synthesis.formats.base import Prompt
from ipt.synthesis.formats.chat import ChatFormat
from ipt.synthesis.formats.json_output import after_reasoning, fits, read_json

SCHEMA = {
    "type": "object",
    "required": ["questions", "choices"],
    "properties": {
        "questions": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["question"],
                "properties": {"question": {"type": "string"}},
            },
        },
        "choices": {"type": "array"},
    },
}
ANSWER = {
    "questions": [{"question": "What is {it}?"}, {"question": "Why </think>?"}],
    "choices": [],
}
DRAFT = {"questions": [{"question": "A draft?"}], "choices": []}
JSON, OTHER = json.dumps(ANSWER), json.dumps(DRAFT)


@pytest.mark.parametrize(
    "output",
    [
        JSON,
        f"<think>An object with {{questions}}, say {{}}.</think>\n{JSON}",
        f"\n <think>\n{OTHER}\n</think>\n\n{JSON}",
        f"<think></think>{JSON}",
        f"<THINK>{OTHER}</THINK>{JSON}",
        f"[THINK]{OTHER}[/THINK]{JSON}",
        f"<thinking>{OTHER}</thinking> <think>more</think>{JSON}",
        f"<seed:think>{OTHER}</seed:think>{JSON}",
        f"◁think▷{OTHER}◁/think▷{JSON}",
        f"<|channel|>analysis<|message|>{OTHER}<|end|><|start|>assistant<|channel|>final<|message|>{JSON}",
        f"The opening tag is in the prompt. {OTHER}\n</think>\n{JSON}",
        f"The opening tag is in the prompt, {{and}} this brace: {{ \n</think>\n{JSON}",
        f"<think>It never closes its tag. {OTHER}\n{JSON}\n",
        f"<think>It never closes its tag.\n```json\n{JSON}\n```",
        f"Here it is:\n```json\n{JSON}\n```\nI hope {{it}} helps.",
        f"For example {OTHER}. Now the exercises: {JSON}",
        f'{JSON}\nI left {{choices}} empty, see {{"a": 1}}.',
        f"Use {{ to open. Then: {JSON}",
        f"{{reasoning: {JSON}}}",
        f'{{"a": 1, }} {JSON}',
    ],
)
def test_the_last_object_that_fits_counts(output):
    assert read_json(output, SCHEMA) == (ANSWER, True, "")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (f"<think>First {OTHER}, then", "truncated"),
        (f"<think>First {OTHER[:30]}", "truncated"),
        ("<think>", "truncated"),
        (f"<think>{OTHER}</think>", "not_json"),
        (f"<think>{OTHER}</think>I cannot.", "not_json"),
        ("I cannot.", "not_json"),
        ("[1, 2]", "not_json"),
        ("", "not_json"),
    ],
)
def test_reasoning_without_an_answer_gives_nothing(output, reason):
    assert read_json(output, SCHEMA).reason == reason and not read_json(output, SCHEMA).value


def test_an_answer_that_is_cut_after_reasoning_gives_its_complete_items():
    cut = JSON[: JSON.index("Why")]
    for before in ("", "<think>{x}</think>", f"{{x}} {OTHER}</think>", "Here it is, {x}: "):
        found = read_json(before + cut, SCHEMA)
        assert (found.value, found.whole, found.reason) == (
            {"questions": ANSWER["questions"][:1]},
            False,
            "truncated",
        )


def test_of_objects_that_do_not_fit_the_most_alike_is_read():
    almost = {"questions": [{"question": "Q?"}, {"answer": "A."}], "choices": []}
    assert read_json(f'{{"a": 1}} {json.dumps(almost)} {{"b": 2}}', SCHEMA).value == almost


@pytest.mark.parametrize("depth", [5, 3000])
def test_degenerate_outputs_are_read_in_reasonable_time(depth):
    """Each would take hours if its braces were all read to the end."""
    for piece in (
        "{",
        '{"a" ',
        '{"a',
        '{"a": [',
        '{"a": {',
        "</think>",
        "<think>",
        '{"a": "',
        "{}",
        '{"a": 1} ',
    ):
        read_json(piece * depth, SCHEMA)


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        (True, {"type": "integer"}, False),
        (True, {"type": "boolean"}, True),
        (1, {"type": "number"}, True),
        ("a", {"type": ["string", "null"]}, True),
        (None, {"type": ["string", "null"]}, True),
        (3, {"type": ["string", "null"]}, False),
        (
            {"a": "x" * 99},
            {"properties": {"a": {"type": "string", "maxLength": 3}, "b": True}},
            True,
        ),
        ([1, "a"], {"type": "array", "items": {"type": "integer"}}, False),
    ],
)
def test_what_fits(value, schema, expected):
    assert fits(value, schema) == expected


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("<think>Well.</think>\nThe heart.", "The heart."),
        ("Well.</think>The heart.", "The heart."),
        ("Models write <think> and </think>.", "Models write <think> and </think>."),
        ("The heart.", "The heart."),
    ],
)
def test_reasoning_is_no_part_of_a_rewrite(vocabulary, output, text):
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="paraphrase"))
    assert chat.parse(output).rewrite == text


def test_a_rewrite_that_ends_in_its_reasoning_is_truncated(vocabulary):
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="paraphrase"))
    assert chat.parse("<think>Well, the heart").rejected == Counter(truncated=1)
    assert not after_reasoning("<think>Well, the heart").ended


def test_later_shots_do_not_see_the_reasoning(vocabulary):
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="math_problem"))
    answer = json.dumps({"problem": "Two hearts?", "steps": ["1 + 1 = 2."], "answer": "2"})
    output = f"<think>Well.</think>\n{answer}"
    history = chat.finish(Prompt([1]), vocabulary.encode(output), output, chat.parse(output))
    assert history.messages[-1].content == answer
    assert history.ids == [1, *vocabulary.encode_continuation(answer)]
