import html
import re

import pytest

from ipt.chat import Turn
from ipt.config import RenderingConfig
from ipt.playground.synthesizer import UNFINISHED, Example, Writing
from ipt.playground.views import conversation_view, draws_view, examples_view, notice, pairs_view
from ipt.rendering.layouts import LAYOUTS
from ipt.rendering.pairs import ChainRow
from ipt.rendering.render import ARRANGEMENTS, Settings, render_chain
from ipt.rendering.run import PairsRow
from ipt.synthesis.chains import Piece, Round
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import Prompt
from ipt.synthesis.formats.rule_based import RuleFormat
from ipt.synthesis.formats.tags import Pair, pairs_text, parse

EVIL = "<script>alert(1)</script> ${1+1} {{value}} \"' & <b>bold</b>"
PAIRS = [
    Pair(f"What {EVIL}?", EVIL),
    Pair("Which?\nOptions:\n- red\n- blue", "blue"),
    Pair("Which?\nOptions:\n- red\n- blue", "green"),
]


def written(output, ended=True, finish_reason="stop", examples=0):
    """A text for which `output` has been written."""
    rounds = [
        Round(
            0,
            Piece("text 1", EVIL, Prompt([1, 2]), 0),
            2,
            Generation([5] * 4, output, finish_reason, 0),
            parse(output),
            False,
        )
    ]
    return Writing(
        EVIL, examples, RuleFormat(), [*([None] * examples), *rounds], seconds=2.0, ended=ended
    )


def plain(view):
    return html.unescape(re.sub(r"<[^>]*>", "", view))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_are_the_training_texts_to_the_letter(arrangement, layout):
    config = RenderingConfig(arrangement=arrangement, layouts={layout: 1})
    row = ChainRow("text 1", EVIL, PAIRS)
    view = draws_view([PairsRow(0, False, row)], config, 7)
    shown = [
        plain(text) for text in re.findall(r'<pre class="text"[^>]*>(.*?)</pre>', view, re.DOTALL)
    ]
    assert shown == [
        text.text for seed in (7, 8, 9) for text in render_chain([row], Settings.of(config), seed)
    ]


def test_nothing_that_is_said_is_markup():
    output = pairs_text(PAIRS) + f"\n\n<QUE> {EVIL} </END>"
    views = [
        pairs_view(written(output)),
        pairs_view(written(f"<QUE> {EVIL}", ended=False, finish_reason=UNFINISHED)),
        draws_view(
            [PairsRow(0, False, ChainRow("text 1", EVIL, PAIRS))],
            RenderingConfig(layouts={"classic": 1}),
            0,
        ),
        examples_view([Example(EVIL, (), 1)]),
        conversation_view([Turn(EVIL, EVIL)]),
        notice(ValueError(EVIL), is_error=True),
    ]
    for view in views:
        assert "<script" not in view and "<b>" not in view and "alert(1)" in plain(view)


def test_pairs_and_what_is_none_say_what_they_are():
    view = plain(pairs_view(written(pairs_text(PAIRS[1:2]) + " <QUE> no </END>")))
    assert (
        "multiple choice" in view
        and "Not a pair: no answer tag" in view
        and "<QUE> no </END>" in view
    )
    assert "1 pair · 2 prompt tokens · 4 tokens generated in 2.0 s · finished" in view
    assert "Left out of the training text: answer not among options" in plain(
        pairs_view(written(pairs_text(PAIRS[2:])))
    )
    assert "generated no pair" in plain(pairs_view(written("")))


def test_stages_of_writing():
    assert "Loading" in pairs_view(Writing("a"))
    assert "Processing" in pairs_view(Writing("a", prompt_format=RuleFormat()))
    assert "Stopped" in pairs_view(Writing("a", prompt_format=RuleFormat(), ended=True))
    assert "truncated at" in pairs_view(written("<QUE> a", finish_reason="length"))
    assert "examples are not in this prompt" in pairs_view(
        written(pairs_text(PAIRS[:1]), examples=1)
    )
    assert "cannot be an example" in pairs_view(written("", examples=1))


def test_rewrites_and_rows_without_pairs():
    row = PairsRow(0, False, ChainRow("text 1", "A text.", [], "In other words."))
    assert "In other words." in draws_view([row], RenderingConfig(layouts={"classic": 1}), 0)
    assert "appear here" in draws_view(
        [PairsRow(0, False, ChainRow("a", "A text.", []))], RenderingConfig(), 0
    )
