"""Mining by rules: what each rule finds in a text written for it, and what holds for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.rendering.pairs import Item, read_pair
from ipt.synthesis.formats.rule_based import (
    ANYWHERE,
    INFERENCE,
    RULES,
    TYPES,
    _common_words,
    _wordings,
    mine,
    mine_typed,
)
from ipt.synthesis.formats.tags import pairs_text, parse

# First sentence, second sentence with its connective, what is left of the second, and the type.
LINKED = {
    "entailment": ("Hence ", "nli"),
    "neutral": ("In addition, ", "nli"),
    "contrast": ("In contrast, ", "nli"),
    "effect": ("That is why ", "reasoning"),
    "cause": ("This is because ", "reasoning"),
    "restatement": ("In other words, ", "paraphrase"),
}
FIRST = "The walls of the left ventricle are much thicker than those of the right."
SECOND = "the left side of the heart pumps blood through all of the body."
INSIDE = {
    "cause": [
        (
            "The patient could not stand up any longer because the muscles of both legs had "
            "become weak.",
            "Because the muscles",
        ),
        (
            "The production of hormones in the gland came to a halt due to a lack of iodine in "
            "the soil.",
            "Due to a lack of iodine",
        ),
        (
            "Because the harvest had failed for the third time, many families left the valley for "
            "good.",
            "Because the harvest",
        ),
    ],
    "effect": [
        (
            "The bridge over the river had been washed away, so the travellers waited for the "
            "ferry.",
            "The travellers waited for the ferry.",
        )
    ],
    "definition": [
        (
            "Osmosis is the movement of water through a membrane that lets only some substances "
            "pass.",
            "Osmosis is the movement",
        )
    ],
    "naming": [
        (
            "The membrane that surrounds the heart and protects it is called the pericardium.",
            "The pericardium",
        )
    ],
    "conclusion": [
        (
            "In conclusion, regular sleep improves memory in people of every age group we studied.",
            "Regular sleep",
        )
    ],
    "finding": [
        (
            "These results suggest that regular sleep improves the memory of adults of any age.",
            "These results suggest",
        )
    ],
    "keywords": [
        (
            "The cerebellum coordinates locomotion and equilibrioception in nearly all vertebrate "
            "animals.",
            "The cerebellum",
        )
    ],
}


def mined_by_many_seeds(text: str, **options: str) -> list:
    return [typed for seed in range(40) for typed in mine_typed(text, seed, **options)]


@pytest.mark.parametrize("rule", LINKED)
def test_two_sentences_and_what_links_them(rule):
    connective, kind = LINKED[rule]
    pairs = [
        pair
        for found, pair in mined_by_many_seeds(f"{FIRST} {connective}{SECOND}")
        if found == kind
    ]
    second = SECOND[0].upper() + SECOND[1:]
    assert pairs
    for pair in pairs:
        # the answer would be given away
        assert connective.strip(", ") not in pair.question + pair.answer
        item = read_pair(pair)
        if kind == "nli" and item.options:
            assert FIRST in item.question and second in item.question
            assert any(
                item.answer == wording["options"][INFERENCE.index(rule)]
                and sorted(item.options) == sorted(wording["options"])
                for wording in _wordings()["classify"]
            )
        else:
            assert (FIRST in pair.question, pair.answer) == (True, second) or (
                rule == "restatement" and pair.answer == FIRST
            )
    if kind == "nli":
        assert {read_pair(pair).kind for pair in pairs} == {"options", "plain"}


@pytest.mark.parametrize(
    ("rule", "sentence", "answer"), [(rule, *case) for rule in INSIDE for case in INSIDE[rule]]
)
def test_within_one_sentence(rule, sentence, answer):
    pairs = [
        pair for kind, pair in mined_by_many_seeds(f"{sentence} It was so.") if kind == TYPES[rule]
    ]
    assert pairs
    assert any(pair.answer.startswith(answer) for pair in pairs)


@pytest.mark.parametrize(
    "text",
    [
        "The muscles became weak. As a result, he fell.",  # too short
        f"{FIRST}\n\nAs a result, {SECOND}",  # not the same paragraph
        f"See Figure 3 for the walls of the ventricle and what they do. As a result, {SECOND}",
        # no clause before it
        "The disorder of the second patient is due to a lack of iodine in the soil of the valley.",
        "The high blood pressure of many adults due to elevated salt is a risk factor for heart "
        "disease.",
        "As a result of the long and cold winter the whole village had to go hungry.",
    ],
)
def test_what_is_no_task_is_left_alone(text):
    assert not [pair for kind, pair in mined_by_many_seeds(text) if kind == "reasoning"]


def test_a_title_is_given_or_the_first_line():
    body = " ".join(
        [
            FIRST,
            "Nobody knows how the heart of the first vertebrates came to be as strong as it is.",
        ]
        * 2
    )
    assert {
        pair.answer
        for kind, pair in mined_by_many_seeds(body, title="Of hearts")
        if kind == "summary"
    } == {"Of hearts"}
    assert {
        pair.answer
        for kind, pair in mined_by_many_seeds(f"Two  Ventricles\n\n{body}")
        if kind == "summary"
    } == {"Two Ventricles"}
    for line in (
        "He went home.",
        '"Off with you," cried the queen',
        "- a list",
        "Introduction",
        "Then he said to",
    ):
        assert not [
            pair
            for kind, pair in mined_by_many_seeds(f"{line}\n\n{body}\n\n{body}")
            if kind == "summary"
        ], line


def test_how_often_title_and_completion_are_asked_for():
    sentences = [
        f"On day {number} nothing happened in the small village by the sea at all."
        for number in ("one", "two", "three", "four", "five", "six")
    ]
    kinds = [
        {kind for kind, _ in mine_typed(" ".join(sentences), seed, title="A quiet week")}
        for seed in range(2000)
    ]
    shares = [
        sum(kind == chosen for kind in kinds) / 2000
        for chosen in ({"summary"}, {"completion"}, {"summary", "completion"}, set())
    ]
    assert shares == pytest.approx([0.4, 0.1, 0.4, 0.1], abs=0.04)


def test_at_most_two_by_a_rule_and_no_sentence_twice():
    lines = [
        f"{FIRST.replace('left', name)} As a result, {SECOND.replace('left', name)}"
        for name in ("left", "dorsal", "ventral", "upper")
    ]
    for seed in range(20):
        typed = mine_typed("\n".join(lines), seed)
        assert 2 <= len(typed) <= 3  # two by the rule, perhaps a completion
        named = [
            name
            for name in ("left", "dorsal", "ventral", "upper")
            for _, pair in typed
            if name in pair.question + pair.answer
        ]
        assert len(named) == len(set(named))


def test_ordinary_long_words_are_no_keywords():
    sentence = (
        "The description of the development was particularly successful in that it was "
        "understandable."
    )
    assert not [pair for kind, pair in mined_by_many_seeds(sentence) if kind == "word_to_text"]
    assert all(len(word) >= 10 and word.islower() for word in _common_words())


def test_a_text_in_another_language_gives_completions():
    chinese = (
        "科学家们在三月份的报告中指出，这种植物只在海拔两千米以上的山区生长。"
        "它的叶子可以用来制作一种传统的药物，当地人使用它已经有几百年了。"
    )
    assert {kind for kind, _ in mined_by_many_seeds(chinese)} == {"completion"}


def test_every_rule_has_wordings_a_type_and_only_fields_that_it_fills():
    assert (
        set(TYPES)
        == {*RULES, *ANYWHERE, "title"}
        == set(_wordings()) - {"classify", "common_words"}
    )
    assert all(
        len(wordings) == len(set(wordings)) >= 3
        for rule, wordings in _wordings().items()
        if rule in TYPES
    )
    assert all(len(wording["options"]) == len(INFERENCE) for wording in _wordings()["classify"])


PIECES = [
    f"{FIRST} ",
    *(connective + SECOND + " " for connective, _ in LINKED.values()),
    *(sentence + " " for cases in INSIDE.values() for sentence, _ in cases),
    "A title of some words",
    "\n",
    "\n\n",
    "<QUE>",
    "</END> ",
    "\nOptions:\n- ",
    "{first}",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=80)), max_size=12).map("".join)


@given(TEXT, st.integers(0, 5), st.one_of(st.none(), st.text(max_size=30)))
def test_pairs_of_any_text_keep_the_formats_rules(text, seed, title):
    pairs = mine(text, seed, title=title)
    assert mine(text, seed, title=title) == pairs
    parsed = parse(pairs_text(pairs))
    # so nothing is empty, holds a tag, or is asked twice
    assert parsed.pairs == pairs and not parsed.rejected
    squeezed = " ".join([*(title or "").split(), *text.split()]).lower()
    for pair in pairs:
        item = read_pair(pair)
        assert isinstance(item, Item)
        # a clause gets a full stop, a sentence a capital letter
        said = item.answer.rstrip(".").lower()
        assert (
            item.kind == "options"
            or said in squeezed
            or all(part in squeezed for part in said.split(". "))
        )


def test_the_choice_depends_on_seed_and_document_alone():
    text = " ".join(sentence for cases in INSIDE.values() for sentence, _ in cases)
    assert mine(text, 0, "a") == mine(text, 0, "a")
    assert len({tuple(mine(text, 0, doc_id)) for doc_id in "abcd"}) > 1
    assert len({tuple(mine(text, seed, "a")) for seed in range(4)}) > 1
