import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.rendering.pairs import REASONS, ChainRow, Item, read_document, read_pair
from ipt.synthesis.formats.tags import Pair

STEPS = "\nLet's think step by step."
THEREFORE = "\nTherefore, the answer is "
OPTIONS = "\nOptions:\n- red\n- green\n- dark blue"


@pytest.mark.parametrize(
    ("question", "answer", "item"),
    [
        (" Which? ", " red\n", Item("plain", "Which?", "red")),
        (
            "Which?" + OPTIONS,
            "green",
            Item("options", "Which?", "green", ("red", "green", "dark blue")),
        ),
        (
            "Which?" + OPTIONS,
            "green.",
            Item("options", "Which?", "green", ("red", "green", "dark blue")),
        ),
        (
            "Which?" + STEPS,
            "It is hot." + THEREFORE + "red",
            Item("reasoning", "Which?", "red", (), "It is hot."),
        ),
        (
            "Which?" + OPTIONS + STEPS,
            "It is\nhot." + THEREFORE + "dark blue.",
            Item(
                "options_reasoning",
                "Which?",
                "dark blue",
                ("red", "green", "dark blue"),
                "It is\nhot.",
            ),
        ),
        # no question before the options: nothing to take apart
        ("Options:\n- a\n- b", "a", Item("plain", "Options:\n- a\n- b", "a")),
        ("Which?", "Hot." + THEREFORE + "red", Item("plain", "Which?", "Hot." + THEREFORE + "red")),
    ],
)
def test_kinds(question: str, answer: str, item: Item):
    assert read_pair(Pair(question, answer)) == item


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        (" \n", "red", "empty_question"),
        ("Which?", "\t", "empty_answer"),
        ("Which?" + OPTIONS, "Green", "answer_not_among_options"),
        ("Which?" + OPTIONS + OPTIONS, "green", "malformed_options"),
        ("Which?\nOptions:\n- red", "red", "malformed_options"),
        ("Which?\nOptions:\n- red\n- \n- green", "red", "malformed_options"),
        ("Which?\nOptions:\n- red\n- red", "red", "malformed_options"),
        ("Which?" + STEPS, "red", "malformed_reasoning"),
        ("Which?" + STEPS, THEREFORE + "red", "malformed_reasoning"),
        ("Which?" + STEPS, "Hot." + THEREFORE, "malformed_reasoning"),
        ("Which?" + STEPS, "Hot." + THEREFORE + "red" + THEREFORE + "green", "malformed_reasoning"),
        ("Which?" + OPTIONS + STEPS, "Hot." + THEREFORE + "yellow", "answer_not_among_options"),
    ],
)
def test_reasons(question: str, answer: str, reason: str):
    assert reason in REASONS
    assert read_pair(Pair(question, answer)) == reason


MARKED = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "\nOptions:\n- ", "\n- ", STEPS, THEREFORE, "."]),
    max_size=9,
).map("".join)


@given(MARKED, MARKED)
def test_any_pair_is_usable_or_has_a_known_reason(question: str, answer: str):
    read = read_pair(Pair(question, answer))
    if isinstance(read, str):
        assert read in REASONS
        return
    assert read.question and read.answer and read.question in question and read.answer in answer
    assert bool(read.options) == ("options" in read.kind) and bool(read.reasoning) == (
        "reasoning" in read.kind
    )
    assert not read.options or (
        read.answer in read.options and len(set(read.options)) == len(read.options) > 1
    )


def test_a_document_keeps_its_other_pairs():
    row = ChainRow(
        "d",
        "text",
        [Pair("Q1", "A1"), Pair("Q2", ""), Pair("Q3" + OPTIONS, "yellow"), Pair("Q4", "A4")],
    )
    document = read_document(row)
    assert [item.question for item in document.items] == ["Q1", "Q4"]
    assert document.dropped == ["empty_answer", "answer_not_among_options"]
