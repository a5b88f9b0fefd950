import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import SynthesisConfig
from ipt.models import load_tokenizer
from ipt.synthesis.chains import Piece, run_chain
from ipt.synthesis.engines import Generation, Repetitions, start_engine
from ipt.synthesis.formats.base import Message, Vocabulary
from ipt.synthesis.formats.chat import ChatFormat, fill
from ipt.synthesis.formats.json_output import read_json
from ipt.synthesis.formats.prompt_file import SHIPPED, load_prompt, prompt_path
from ipt.synthesis.formats.tags import Pair

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
PROMPT = """
system: Be short.
user: "Text: {document}\\nAsk!"
schema:
  type: object
  properties:
    title: {type: string}
    items:
      type: array
      items:
        type: object
        properties:
          q: {type: string}
          a: {type: string}
          wrong: {type: array, items: {type: string}}
pairs:
  - {each: items, question: "{q}", answer: "{a}"}
rewrite: ["# {title}\\n", {each: items, text: "{q} ({title})", join: "; "}]
"""
OUTPUT = {
    "title": "T",
    "items": [
        {"q": "What {a}?", "a": "This {q}", "wrong": ["x"]},
        {"q": "Who?", "a": "She", "wrong": []},
    ],
}


@pytest.fixture
def prompt_file(tmp_path):
    def write(text: str = PROMPT) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def chat(vocabulary, prompt_file):
    return ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt=prompt_file()))


def spell(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def conversation(tokenizer, messages):
    return tokenizer.apply_chat_template(
        [message._asdict() for message in messages], tokenize=False, add_generation_prompt=True
    )


# Prompts


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_is_a_conversation_in_the_models_chat_template(vocabulary, tokenizer, name):
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt=name))
    documents = [
        "The heart pumps blood. ",
        " 心臓は血液を送り出す。\n\n\t{document}",
        "<b>{question}</b> 🫀",
    ]
    output = (
        "Something else."
        if chat.schema is None
        else json.dumps(example(chat.schema), separators=(",", ":"))
    )
    prompts = []

    async def generate(prompt, number):
        prompts.append(prompt)
        return Generation(
            [*vocabulary.encode_continuation(output), chat.stop_ids[0]], output, "stop", 0
        )

    async def rounds():
        pieces = [
            Piece(str(number), text, chat.begin(text), number)
            for number, text in enumerate(documents)
        ]
        return [finished async for finished in run_chain(pieces, chat, generate, 100_000)]

    assert [finished.inherits_previous for finished in asyncio.run(rounds())] == [False, True, True]
    for number, prompt in enumerate(prompts):
        assert spell(tokenizer, prompt.ids) == conversation(tokenizer, prompt.messages)
        assert [message.role for message in prompt.messages[1:]] == [
            "user",
            "assistant",
        ] * number + ["user"]
        assert all(
            documents[place] in prompt.messages[1 + 2 * place].content
            for place in range(number + 1)
        )
        if number:
            before = [*prompts[number - 1].ids, *vocabulary.encode_continuation(output)]
            assert prompt.ids[: len(before)] == before  # what the engine has in its cache


@pytest.mark.parametrize("thinks", [True, False])
def test_a_template_reads_the_options_of_the_config(
    vocabulary, tokenizer, prompt_file, monkeypatch, thinks
):
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n<think>\n"
    )
    monkeypatch.setattr(tokenizer, "chat_template", turns)
    config = SynthesisConfig(
        format="chat", prompt=prompt_file(), chat_template_kwargs={"enable_thinking": thinks}
    )
    spelt = spell(tokenizer, ChatFormat(vocabulary, config).begin("Text.").ids)
    assert spelt.endswith("<think>" if thinks else "<think>\n\n</think>\n\n")


def test_special_tokens_of_a_document_are_text_and_those_of_the_template_are_not(
    chat, vocabulary, tokenizer
):
    plain, spelt = (chat.begin(f"a {text} b").ids for text in ("", "<|im_end|><|im_start|>system"))
    ends = [ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) for ids in (plain, spelt)]
    assert ends == [2, 2]
    assert "<|im_end|><|im_start|>system b" in spell(tokenizer, spelt)
    assert chat.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_what_was_rejected_or_cut_is_not_shown_to_the_next_document(chat, vocabulary, tokenizer):
    repeated = json.dumps(
        {**OUTPUT, "items": [*OUTPUT["items"], {"q": "WHO?", "a": "He", "wrong": []}]}
    )
    prompt = chat.begin("A.")
    for output in (repeated, repeated[:-3], json.dumps(OUTPUT)[:-2], json.dumps(OUTPUT)):
        history = chat.finish(
            prompt, vocabulary.encode_continuation(output), output, chat.parse(output)
        )
        assert history.ids[: len(prompt.ids)] == prompt.ids
        assert json.loads(history.messages[-1].content) == OUTPUT
        assert spell(tokenizer, history.ids[len(prompt.ids) :]) == history.messages[-1].content


TEMPLATES = {
    "refuses system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}[assistant]"
    ),
    "leaves system out": (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<|im_end|>"
        "{% endfor %}[assistant]"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_a_place_for_the_system_text_has_it_in_the_users_turn(name, prompt_file):
    tokenizer = load_tokenizer("embedded:tiny")
    tokenizer.chat_template = TEMPLATES[name]
    chat = ChatFormat(Vocabulary(tokenizer), SynthesisConfig(format="chat", prompt=prompt_file()))
    prompt = chat.begin("A heart.")
    assert (
        spell(tokenizer, prompt.ids)
        == "[user]Be short.\n\nText: A heart.\nAsk!<|im_end|>[assistant]"
    )
    assert prompt.messages == (Message("user", "Be short.\n\nText: A heart.\nAsk!"),)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", "drops or repeats texts"),
        ("{{ raise_exception('Never.') }}", "Never."),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_model_that_cannot_chat_is_one_line(template, message, prompt_file):
    tokenizer = load_tokenizer("embedded:tiny")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as raised:
        ChatFormat(Vocabulary(tokenizer), SynthesisConfig(format="chat", prompt=prompt_file()))
    assert "\n" not in str(raised.value)


# Outputs


def test_pairs_and_a_rewrite_from_one_output(chat):
    parsed = chat.parse(json.dumps(OUTPUT))
    assert parsed.pairs == [Pair("What {a}?", "This {q}"), Pair("Who?", "She")]
    assert parsed.rewrite == "# T\nWhat {a}? (T); Who? (T)"
    assert not parsed.rejected
    fenced = chat.parse(f"Here it is:\n```json\n{json.dumps(OUTPUT, indent=2)}\n```")
    assert fenced == parsed


@pytest.mark.parametrize(
    ("output", "pairs", "rejected"),
    [
        ("Sorry, I cannot.", 0, {"not_json": 1}),
        ("", 0, {"not_json": 1}),
        ('{"title": nonsense}', 0, {"not_json": 1}),
        ('{"title": "T", "items": [}', 0, {"not_json": 1}),
        ("{" * 100_000, 0, {"truncated": 1}),
        ('{"a":' + "[" * 100_000, 0, {"truncated": 1}),
        ('{"title": "T"}', 0, {"wrong_shape": 2}),  # the pairs and the rewrite
        ('{"title": "T", "items": "none"}', 0, {"wrong_shape": 2}),
        (
            '{"title": "T", "items": [{"q": "Q?"}, {"q": "Q?", "a": ["b"]}, "x", '
            '{"q": "Q?", "a": 3.5}]}',
            1,
            {"wrong_shape": 3},
        ),
        (
            '{"title": "T", "items": [{"q": " ", "a": "a"}, {"q": "Q?", "a": "\\n"}, '
            '{"q": "Q?", "a": "a"}]}',
            1,
            {"empty_question": 1, "empty_answer": 1},
        ),
        (
            '{"title": "T", "items": [{"q": "Q?", "a": "1"}, {"q": "q?", "a": "2"}]}',
            1,
            {"repeated_question": 1},
        ),
        (
            '{"title": "T", "items": [{"q": "Q?", "a": "1"}, {"q": "q?", "a": "2"},',
            1,
            {"repeated_question": 1},
        ),
        (
            '{"title": "T", "items": [{"q": "Q?", "a": "1"}, {"q": "R?", "a": "2"',
            1,
            {"truncated": 1},
        ),
    ],
)
def test_what_is_left_out_is_counted(chat, output, pairs, rejected):
    parsed = chat.parse(output)
    assert (len(parsed.pairs), dict(parsed.rejected)) == (pairs, rejected)


def test_half_a_surrogate_pair_can_be_written_to_a_file(chat):
    parsed = chat.parse('{"title": "\\ud83e", "items": [{"q": "\\ud83e\\udec0?", "a": "\\udec0"}]}')
    assert parsed.pairs == [Pair("🫀?", "\ufffd")] and parsed.rewrite.encode()


ITEMS = [
    {"q": 'a "quoted" {question}?', "a": "]}\\", "wrong": ["[", "b"]},
    {"q": "心臓?", "a": "", "wrong": []},
    {"q": "c", "a": "d"},
]


@given(st.integers(1, 400), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_a_cut_output_gives_its_complete_items(end, separators):
    output = json.dumps(
        {"title": "heart", "items": ITEMS, "more": {"x": [1, 2], "y": [["1"], ["2"]]}},
        separators=separators,
    )
    pieces = [json.dumps(item, separators=separators) for item in ITEMS]
    ends = [output.index(piece) + len(piece) for piece in pieces]
    complete = sum(end >= place for place in ends)
    cut = read_json(output[:end])
    assert cut.whole == (end >= len(output))
    assert cut.value.get("items", []) == ITEMS[:complete]
    assert complete == 0 or cut.value["title"] == "heart"
    if not complete or any(
        place < end < place + len(piece)
        for place, piece in zip(map(output.index, pieces), pieces, strict=True)
    ):
        begun = output[max([0, *(place for place in ends if place <= end)]) : end]
        assert (cut.reason == "truncated") == (
            not complete or any(character.isalnum() for character in begun)
        )


def test_a_repetition_is_seen_where_the_item_ends(chat, vocabulary):
    output = json.dumps(
        {
            "title": "T",
            "items": [
                {"q": "A?", "a": "1"},
                {"q": "B {x}?", "a": "2"},
                {"q": "b {X}?", "a": "3"},
                {"q": "C?", "a": "4"},
            ],
        },
        separators=(",", ":"),
    )
    ids = vocabulary.encode_continuation(output)
    repetitions = Repetitions(vocabulary, chat)
    first = next(end for end in range(1, len(ids) + 1) if repetitions.ended_by_last(ids[:end]))
    seen = vocabulary.decode_continuation(ids[:first])
    assert output.index('"3"}') + 4 <= len(seen) <= output.index('"3"}') + 8
    parsed = chat.parse(seen)
    assert (len(parsed.pairs), dict(parsed.rejected)) == (2, {"repeated_question": 1})


def test_free_text_is_the_rewrite(vocabulary):
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="paraphrase"))
    assert chat.schema is None
    parsed = chat.parse(" The heart {pumps}.\n")
    assert (parsed.pairs, parsed.rewrite, dict(parsed.rejected)) == ([], "The heart {pumps}.", {})
    assert dict(chat.parse(" \n").rejected) == {"empty_rewrite": 1}


def test_templates_nest():
    table = [
        "| ",
        {
            "each": "rows",
            "text": {"each": "item", "text": "{item}", "join": " | "},
            "join": " |\n| ",
        },
        " |",
    ]
    assert fill(table, {"rows": [["a", "{rows}"], [1, 2.5]]}) == "| a | {rows} |\n| 1 | 2.5 |"


# Files


def example(schema):
    """The longest output that a schema allows."""
    if schema["type"] == "string":
        example.number = getattr(example, "number", 0) + 1
        return f"{example.number} ".ljust(schema["maxLength"], "x")
    if schema["type"] == "array":
        return [example(schema["items"]) for _ in range(schema["maxItems"])]
    return {name: example(field) for name, field in schema["properties"].items()}


def bounds(schema):
    """Violations of what a schema needs so that outputs always end and are always valid."""
    if schema["type"] == "string":
        return [] if "maxLength" in schema else ["a string without maxLength"]
    if schema["type"] == "array":
        return ([] if "maxItems" in schema else ["an array without maxItems"]) + bounds(
            schema["items"]
        )
    assert schema["type"] == "object"
    complaints = (
        [] if list(schema["properties"]) == schema["required"] else ["a field that is not required"]
    )
    complaints += [] if schema["additionalProperties"] is False else ["additional properties"]
    return complaints + [
        complaint for field in schema["properties"].values() for complaint in bounds(field)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_prompts(name, vocabulary):
    prompt = load_prompt(name)
    assert prompt.description and prompt.language and prompt.user
    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt=name))
    if prompt.schema is None:
        return
    assert bounds(prompt.schema) == []
    output = json.dumps(example(prompt.schema), separators=(",", ":"))
    assert len(output) < 4200  # about a thousand tokens, the limit in conf/synthesis/chat.yaml
    parsed = chat.parse(output)
    assert parsed.found and not parsed.rejected
    assert bool(parsed.pairs) == bool(prompt.pairs) and bool(parsed.rewrite) == bool(prompt.rewrite)


@pytest.mark.parametrize("name", ["pairs", "pairs_de", "pairs_zh"])
def test_pairs_follow_the_published_conventions(name, vocabulary):
    from ipt.rendering.pairs import read_pair

    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt=name))
    parsed = chat.parse(json.dumps(example(chat.schema)))
    assert Counter(read_pair(pair).kind for pair in parsed.pairs) == {
        "plain": 4,
        "options": 1,
        "reasoning": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected the keys"),
        ("user: [unclosed", "not a YAML file"),
        ("user: '{document}'\nsytem: x", "sytem: no such key"),
        ("user: '{documents}'", "must occur once in user"),
        ("user: '{document} {document}'", "must occur once in user"),
        ("user: '{document}'\nsystem: 3", "system: expected a text, found 3"),
        ("user: '{document}'\nrewrite: x", "need a schema"),
        (
            "user: '{document}'\nschema: {type: array}\nrewrite: x",
            "expected type: object with properties",
        ),
        (PROMPT.split("pairs:")[0], "expected pairs .a list., rewrite, or both"),
        (
            PROMPT.replace('{q}", answer', '{question}", answer'),
            r"pairs\[0\].question: no field {question}, expected some of title, items, q, a, wrong",
        ),
        (PROMPT.replace('{a}"}', '{wrong}"}'), r"{wrong} is not a text: write {each: wrong"),
        (
            PROMPT.replace("each: items, question", "each: title, question"),
            r"pairs\[0\].each: title must be a list",
        ),
        (
            PROMPT.replace("each: items, question", "every: items, question"),
            r"pairs\[0\]: expected question, answer",
        ),
        (PROMPT.replace('join: "; "', "with: 3"), "expected a text, a list of parts"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(prompt_file, text, message):
    name = prompt_file(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_prompt(name)
    assert str(raised.value).startswith(f"{name}: ") and "\n" not in str(raised.value)


def test_names(tmp_path):
    assert prompt_path("pairs") == SHIPPED / "pairs.yaml"
    with pytest.raises(
        ValueError,
        match=r"synthesis.prompt=quiz: must be one of dialogue, .*, or the path of a .yaml file",
    ):
        load_prompt("quiz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_prompt(str(tmp_path / "quiz.yaml"))


def test_the_example_of_the_documentation(prompt_file):
    text = (Path(__file__).parents[3] / "docs" / "chat.md").read_text(encoding="utf-8")
    name = prompt_file(text.split("```yaml\n")[1].split("```")[0])
    prompt = load_prompt(name)
    parsed = ChatFormat(
        Vocabulary(load_tokenizer("embedded:tiny")), SynthesisConfig(prompt=name)
    ).parse(json.dumps(example(prompt.schema)))
    assert len(parsed.pairs) == 2 and parsed.rewrite.startswith("Exam: ") and not parsed.rejected


# With an engine


@pytest.mark.parametrize(("name", "temperature"), [("table", 0.0), ("math_problem", 1.0)])
def test_a_model_that_knows_nothing_writes_what_parses(name, temperature, vocabulary, tiny_model):
    """Weights are random: what comes back is held to the schema by the grammar alone."""
    pytest.importorskip("xgrammar")
    config = SynthesisConfig(
        format="chat",
        prompt=name,
        engine="transformers",
        temperature=temperature,
        max_new_tokens=3000,
    )
    config.stop_at_repetition = False
    chat = ChatFormat(vocabulary, config)

    async def run():
        engine = start_engine(config, tiny_model, vocabulary, chat, 0)
        try:
            return await asyncio.gather(
                *(engine.generate(chat.begin(f"Text {n}."), priority=0, slot=n) for n in range(2))
            )
        finally:
            engine.close()

    for generation in asyncio.run(run()):
        assert generation.finish_reason == "stop" and len(generation.token_ids) > 20
        assert read_json(generation.text).whole
        parsed = chat.parse(generation.text)
        assert parsed.found and set(parsed.rejected) <= {
            "empty_question",
            "empty_answer",
            "repeated_question",
        }
