import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.playground.outputs import OutputPiece, read_output
from ipt.synthesis.formats.rule_based import RuleFormat
from ipt.synthesis.formats.tags import Pair, parse

FORMAT = RuleFormat()  # the published text format, without a vocabulary
GOOD = "<QUE> What is it? <ANS> A pool. </END>"
PIECES = st.lists(
    st.sampled_from(
        [
            GOOD,
            "<QUE> Who? <ANS> Me. </END>",
            "<QUE> no answer </END>",
            "<QUE> a <ANS>  </END>",
            "\n\n",
            " half",
            "<QUE> x <ANS> y",
        ]
    ),
    max_size=8,
).map("\n".join)


def test_each_piece_is_a_pair_or_has_a_reason():
    output = f"{GOOD}\n\n<QUE> Nothing said </END>\n\n{GOOD}\n\n<QUE> Why <ANS> be"
    assert read_output(output, FORMAT, ended=True).pieces == [
        OutputPiece(Pair("What is it?", "A pool.")),
        OutputPiece(None, "<QUE> Nothing said </END>", "no_answer_tag"),
        OutputPiece(None, GOOD, "repeated_question"),
        OutputPiece(None, "<QUE> Why <ANS> be", "truncated"),
    ]


def test_what_is_still_being_written_is_no_mistake():
    reading = read_output(f"{GOOD}\n\n<QUE> Why <ANS> be", FORMAT, ended=False)
    assert (
        reading.pieces == [OutputPiece(Pair("What is it?", "A pool."))]
        and reading.rest == "<QUE> Why <ANS> be"
    )
    assert read_output("", FORMAT, ended=False) == ([], "", "")


@given(PIECES, st.booleans())
def test_the_parser_has_the_last_word(output, ended):
    reading, parsed = read_output(output, FORMAT, ended), parse(output)
    assert [said.pair for said in reading.pieces if said.pair] == parsed.pairs
    reasons = Counter(said.reason for said in reading.pieces if not said.pair)
    assert reasons == (
        parsed.rejected
        if ended
        else parsed.rejected - Counter(truncated=parsed.rejected["truncated"])
    )


@pytest.mark.parametrize("cut", range(0, 130, 9))
def test_pairs_of_json_appear_one_by_one(cut, vocabulary):
    from ipt.config import SynthesisConfig
    from ipt.synthesis.formats.chat import ChatFormat

    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="faq"))
    output = (
        '{"title": "T", "questions": [{"question": "A?", "answer": "1"}, {"question": "B?", '
        '"answer": "2"}]}'
    )
    reading = read_output(output[:cut], chat, ended=False)
    assert [said.pair for said in reading.pieces if said.pair] == chat.parse(output[:cut]).pairs
    assert not [said for said in reading.pieces if said.reason == "truncated"]


def test_pairs_of_a_draft_are_not_shown(vocabulary):
    from ipt.config import SynthesisConfig
    from ipt.synthesis.formats.chat import ChatFormat

    chat = ChatFormat(vocabulary, SynthesisConfig(format="chat", prompt="pairs"))
    draft, answer = (
        json.dumps(
            {
                "questions": [{"question": f"{word}?", "answer": "1"}] * 2
                + [{"question": "C?", "answer": "2"}],
                "choices": [],
                "problems": [],
            }
        )
        for word in "AB"
    )
    for before in ("", "<think>", "Well, "):
        output = f"{before}{draft}{'</think>' * (before == '<think>')} {answer}"
        shown = [said.pair for said in read_output(output, chat, ended=True).pieces if said.pair]
        assert (
            sorted(shown) == sorted(chat.parse(output).pairs) == [Pair("B?", "1"), Pair("C?", "2")]
        )
