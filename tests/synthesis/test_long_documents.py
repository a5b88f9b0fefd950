import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.synthesis.chains import fit, sentences, split, truncate
from tests.examples import examples


def count_characters(text):
    return len(text) + 5  # 5: tags


SENTENCES = (
    'The heart pumps blood. It has four chambers! Does it rest? "Never." So e.g. valves (two of '
    "them) close.\nNew line here.  End"
)
JAPANESE = "心臓は血液を送る。四つの部屋がある。休まない！なぜか？"
TEXTS = st.text(alphabet=st.sampled_from("aB .。!\n\t—心🫀"), max_size=120)


def test_sentences_end_where_a_reader_would_say():
    assert [sentence.strip() for sentence in sentences(SENTENCES)] == [
        "The heart pumps blood.",
        "It has four chambers!",
        "Does it rest?",
        '"Never."',
        "So e.g. valves (two of them) close.",
        "New line here.",
        "End",
    ]
    assert sentences(JAPANESE) == [
        "心臓は血液を送る。",
        "四つの部屋がある。",
        "休まない！",
        "なぜか？",
    ]


@given(TEXTS, st.integers(6, 60))
def test_every_character_is_in_exactly_one_piece_and_every_piece_fits(text, limit):
    pieces = split(text, limit, count_characters)
    assert "".join(pieces) == text
    assert all(0 < count_characters(piece) <= limit for piece in pieces)


@pytest.mark.parametrize(("text", "limit"), [(SENTENCES, 60), (SENTENCES * 9, 200), (JAPANESE, 20)])
def test_cuts_are_between_sentences(text, limit):
    pieces = split(text, limit, count_characters)
    assert len(pieces) > 1
    assert [sentence for piece in pieces for sentence in sentences(piece)] == sentences(text)
    lengths = [len(piece) for piece in pieces]
    assert min(lengths) > 0.2 * max(lengths)  # similar lengths: no scrap left at the end


def test_a_sentence_that_does_not_fit_is_cut_between_words_and_a_word_within():
    pieces = split("one two three four. " + "x" * 25, 15, count_characters)
    assert all(len(piece) <= 10 for piece in pieces)
    assert {"one", "two", "three", "four."} <= set("|".join(pieces).replace(" ", "|").split("|"))


@given(TEXTS, st.integers(6, 60))
def test_truncation_keeps_a_beginning_that_fits(text, limit):
    kept = truncate(text, limit, count_characters) if count_characters(text) > limit else text
    assert text.startswith(kept)
    assert count_characters(kept) <= limit
    assert len(kept) >= min(len(text), limit - 5) // 2


@examples(25)
@given(
    st.text(alphabet=st.sampled_from("ab .\n心🫀é"), min_size=60, max_size=200),
    st.sampled_from(["split", "truncate"]),
)
def test_real_tokens_whose_number_is_not_additive(vocabulary, text, mode):
    def count(piece):
        return len(vocabulary.encode(f" <CON> {piece} </CON>\n\n"))

    pieces, action = fit(text, mode, 25, count)
    assert all(count(piece) <= 25 for piece in pieces)
    if action == "split":
        assert "".join(pieces) == text
    elif action == "truncated":
        assert text.startswith(pieces[0])
    else:
        assert pieces == [text]


def test_what_fits_is_left_alone_and_skipping_is_named():
    assert fit("short", "split", 100, count_characters) == (["short"], "")
    assert fit("x" * 100, "skip", 100, count_characters) == ([], "too_long")
