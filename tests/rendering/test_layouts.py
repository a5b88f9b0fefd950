import re
from collections import Counter
from dataclasses import replace

import pytest

from ipt.rendering.draws import Draws
from ipt.rendering.layouts import LAYOUTS, Style, choose_layout, labels, show
from ipt.rendering.pairs import Item
from ipt.rendering.pools import OptionFormat, Template, load_pools

PAPER = {"classic": 80, "dialogue": 5, "numbered": 5, "inline_few_shot": 5, "next_turn": 5}
POOLS = load_pools("default")
PLAIN = [Item("plain", f"Question {index}?", f"answer {index}") for index in range(3)]


def block(layout: str, items: list[Item], pools=POOLS, chain: str = "d") -> str:
    style = Style(pools, Draws(0, chain))
    return LAYOUTS[layout].render(show(items, 0, style), style)


@pytest.mark.parametrize(
    ("fewest_pairs", "published"),
    [(1, {"classic": 95, "dialogue": 5}), (2, PAPER), (7, PAPER)],
)
def test_weights_are_the_published_ones(fewest_pairs: int, published: dict[str, float]):
    """Exactly: one fraction in the middle of each of 100 equal intervals."""
    chosen = Counter(
        choose_layout(PAPER, fewest_pairs, (index + 0.5) / 100) for index in range(100)
    )
    assert chosen == published


def test_the_order_of_the_weights_does_not_matter():
    backwards = dict(reversed(PAPER.items()))
    fractions = [index / 997 for index in range(997)]
    assert [choose_layout(PAPER, 2, fraction) for fraction in fractions] == [
        choose_layout(backwards, 2, fraction) for fraction in fractions
    ]


def test_classic_takes_over_even_where_it_has_no_weight():
    assert choose_layout({"numbered": 1.0}, 1, 0.3) == "classic"
    assert choose_layout({"numbered": 1.0, "classic": 0.0}, 2, 0.999999) == "numbered"


def positions(text: str, parts: list[str]) -> list[int]:
    assert all(text.count(part) == 1 for part in parts), text
    return [text.index(part) for part in parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chain", ["d", "e", "f", "g"])
def test_order_of_questions_and_answers(layout: str, chain: str):
    text = block(layout, PLAIN, chain=chain)
    questions, answers = [item.question for item in PLAIN], [item.answer for item in PLAIN]
    turns = [part for pair in zip(questions, answers, strict=True) for part in pair]
    expected = questions + answers if layout == "numbered" else turns
    found = positions(text, expected)
    assert found == sorted(found)


def test_numbered_counts_questions_and_answers_alike_and_beyond_26():
    """Lists of labels end after 26 in the released code; ours do not."""
    pools = replace(
        POOLS,
        numbered=tuple(style for style in POOLS.numbered if "letter" in style.question.fields),
    )
    items = [Item("plain", f"Question {index}?", f"answer {index}!") for index in range(60)]
    text = block("numbered", items, pools)
    for index, item in enumerate(items):
        label = labels(index)["letter"]
        assert re.search(rf"(?<![a-z]){label}[.)] {re.escape(item.question)}", text)
        assert re.search(rf"(?<![a-z]){label}[.)] {re.escape(item.answer)}", text)


def test_labels():
    assert [labels(index)["letter"] for index in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        "a",
        "z",
        "aa",
        "ab",
        "az",
        "ba",
        "zz",
        "aaa",
    ]
    assert [labels(index)["roman"] for index in (0, 3, 8, 39, 48, 93, 1993)] == [
        "i",
        "iv",
        "ix",
        "xl",
        "xlix",
        "xciv",
        "mcmxciv",
    ]
    assert labels(6) == {
        "number": "7",
        "letter": "g",
        "LETTER": "G",
        "roman": "vii",
        "ROMAN": "VII",
    }
    for name in labels(0):
        assert len({labels(index)[name] for index in range(2000)}) == 2000


# Options
# ----------------------------------------------------------------------------------------------


def styled(item: str, answer: str, separator: str = "\n"):
    style = OptionFormat(Template(item), Template(answer), separator)
    return replace(POOLS, option_formats=(style,), without={**POOLS.without, "options_header": 1.0})


@pytest.mark.parametrize("size", [2, 5, 26, 27, 70])
def test_the_printed_label_is_that_of_the_right_option(size: int):
    options = tuple(f"option number {index}." for index in range(size))
    pools = styled("({letter}) {option}", "({letter})")
    orders = set()
    for chain in range(30):
        item = Item("options", "Which?", options[chain % size], options)
        [shown] = show([item], 0, Style(pools, Draws(0, str(chain))))
        listed = shown.options.split("\n")
        assert sorted(line.split(" ", 1)[1] for line in listed) == sorted(options)
        assert f"{shown.answer} {item.answer}" in listed
        orders.add(tuple(line.split(" ", 1)[1] for line in listed))
    assert len(orders) > 1


def test_without_labels_the_option_itself_is_the_answer():
    options = ("red", "green", "blue")
    [shown] = show(
        [Item("options", "Which?", "green", options)],
        0,
        Style(styled("- {option}", "{option}"), Draws(0, "d")),
    )
    assert shown.answer == "green" and sorted(shown.options.split("\n")) == [
        "- blue",
        "- green",
        "- red",
    ]


def test_each_order_of_options_is_as_likely_and_differs_within_a_text():
    """The released code shuffles the first question of every text in the same way."""
    item = Item("options", "Which?", "c", ("a", "b", "c"))
    orders = Counter()
    same = 0
    for chain in range(3000):
        first, second = show(
            [item, item], 0, Style(styled("{option}", "{option}"), Draws(1, str(chain)))
        )
        orders[first.options] += 1
        same += first.options == second.options
    # 500 each; six standard deviations are 122
    assert len(orders) == 6 and max(orders.values()) < 600 and min(orders.values()) > 400
    assert 380 < same < 620


# Reasoning
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reasoning_stands_before_the_answer_and_in_worked_examples_behind_it(layout: str):
    pools = replace(POOLS, pairs={**POOLS.pairs, "reasoning": POOLS.pairs["reasoning"][:1]})
    items = [
        Item("reasoning", f"Question {index}?", f"answer {index}", (), f"Thought {index}.")
        for index in range(2)
    ]
    text = block(layout, items, pools)
    for item in items:
        thought, answer = positions(text, [item.reasoning, item.answer])
        assert (thought > answer) == (layout == "inline_few_shot")


def test_worked_examples_without_reasoning_everywhere_keep_it_before_the_answer():
    text = block(
        "inline_few_shot", [Item("reasoning", "Why?", "so", (), "Because of this."), PLAIN[0]]
    )
    assert text.index("Because of this.") < text.index("so", text.index("Because of this.") + 16)
