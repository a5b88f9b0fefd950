import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.synthesis.formats.tags import (
    STRICTER,
    Pair,
    _parse_pieces,
    context_text,
    grammar,
    pairs_text,
    parse,
)
from tests.examples import examples


def test_the_published_bytes():
    assert context_text("Text.") == " <CON> Text. </CON>\n\n"
    assert (
        pairs_text([Pair("A?", "b"), Pair("C?", "d")])
        == "<QUE> A? <ANS> b </END>\n\n<QUE> C? <ANS> d </END>"
    )


SIDE = st.text(
    alphabet=st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1
).filter(lambda text: text.strip() == text)


@given(st.lists(st.tuples(SIDE, SIDE), unique_by=lambda pair: pair[0].lower()))
def test_what_is_written_is_read_back(sides):
    pairs = [Pair(*side) for side in sides]
    parsed = parse(pairs_text(pairs))
    assert parsed.pairs == pairs
    assert not parsed.rejected


@given(
    st.lists(st.sampled_from(["<QUE>", "<ANS>", "</END>", " a ", "B", "\n"]), max_size=30).map(
        "".join
    )
)
def test_every_piece_is_a_pair_or_is_counted(output):
    pairs, rejected, _ = parse(output)
    pieces = output.split("</END>")
    assert len(pairs) + rejected.total() == len(pieces) - 1 + bool(pieces[-1].strip())
    assert len({pair.question.lower() for pair in pairs}) == len(pairs)


WRITTEN = st.lists(
    st.sampled_from(
        [
            "<QUE> ",
            " <ANS> ",
            " </END>",
            "\n\n",
            "a",
            "A",
            "b c",
            " ",
            "<",
            "<QUE> a b <ANS> c d </END>\n\n",
        ]
    ),
    max_size=25,
)


@examples(500)
@given(WRITTEN.map("".join))
def test_the_fast_way_gives_what_the_rules_give(output):
    assert parse(output) == _parse_pieces(output)


def published(output: str) -> list[Pair]:
    """The rules of the released code, before it takes out doubled questions."""
    pieces = output.split("</END>")[:-1]
    sides = [
        [side.strip() for side in piece.split("<ANS>")]
        for piece in pieces
        if piece.count("<ANS>") == 1
    ]
    return [
        Pair(left.replace("<QUE>", "").strip(), right)
        for left, right in sides
        if left.startswith("<QUE>") and right
    ]


PIECES = st.lists(
    st.sampled_from(
        [
            "<QUE> a",
            "<QUE> b",
            "<QUE>",
            "<ANS>",
            " <ANS> c </END>",
            "</END>",
            "<CON>",
            "</CON>",
            "B",
            "\n",
        ]
    ),
    max_size=30,
).map("".join)


@examples(500)
@given(PIECES)
def test_only_the_named_rules_are_stricter_than_the_published_ones(output):
    theirs, ours = published(output), parse(output)
    stricter = sum(ours.rejected[reason] for reason in STRICTER)
    assert len(theirs) == len(ours.pairs) + ours.rejected["repeated_question"] + stricter
    assert set(ours.pairs) <= set(theirs)
    if not stricter:
        first: dict[str, Pair] = {}
        for pair in theirs:
            first.setdefault(pair.question.lower(), pair)
        assert ours.pairs == list(first.values())


def test_reasons():
    output = (
        "<QUE> A? <ANS> b </END> <QUE> a? <ANS> c </END> <QUE> d </END> e <ANS> f </END> <QUE> g "
        "<ANS> h <ANS> i </END>"
        " <QUE> j <ANS> </END> <QUE> <ANS> k </END> <QUE> l <QUE> m <ANS> n </END> <QUE> cut <ANS> "
        "o"
    )
    parsed = parse(output)
    assert parsed.pairs == [Pair("A?", "b")]
    assert parsed.rejected == {
        "repeated_question": 1,
        "no_answer_tag": 1,
        "no_question_tag": 1,
        "several_answer_tags": 1,
        "empty_answer": 1,
        "empty_question": 1,
        "tag_inside": 1,
        "truncated": 1,
    }


@pytest.fixture(scope="module")
def accepts(vocabulary):
    """Whether the grammar of up to three pairs takes a whole output."""
    xgrammar = pytest.importorskip("xgrammar")
    tokens = xgrammar.TokenizerInfo.from_huggingface(
        vocabulary.tokenizer, stop_token_ids=[vocabulary.eos]
    )
    compiled = xgrammar.GrammarCompiler(tokens).compile_grammar(grammar(3))

    def accept(output):
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(output) and matcher.is_completed()

    return accept


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=5))
def test_the_grammar_takes_up_to_so_many_pairs(accepts, sides):
    assert accepts(pairs_text(Pair(*side) for side in sides)) == (len(sides) <= 3)


@examples(500)
@given(WRITTEN.map("".join))
def test_the_parser_rejects_nothing_that_the_grammar_takes(accepts, output):
    if accepts(output.strip()):
        assert set(parse(output.strip()).rejected) <= {"repeated_question"}
