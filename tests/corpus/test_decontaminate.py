import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.corpus.decontaminate import SHORTEST, Overlap, OverlapCount
from ipt.corpus.words import words_of
from tests.examples import examples

# few words, so that n-grams do meet
LETTERS = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def plain_find(texts: dict[str, list[str]], ngram: int, text: str) -> dict[str, set[int]]:
    """The definition, word for word."""
    found: dict[str, set[int]] = {}
    for task, items in texts.items():
        for number, item in enumerate(items):
            length = min(ngram, len(words_of(item)))
            if length >= min(SHORTEST, ngram) and runs(item, length) & runs(text, length):
                found.setdefault(task, set()).add(number)
    return found


@examples(300)
@given(
    st.dictionaries(st.sampled_from("xyz"), st.lists(LETTERS, max_size=5)),
    st.integers(1, 13),
    LETTERS,
)
def test_finds_what_the_definition_says(texts, ngram, text):
    overlap = Overlap(texts, ngram)
    assert overlap.find(text) == plain_find(texts, ngram, text)
    for task, items in texts.items():
        assert all(
            number in overlap.find(item)[task]
            for number, item in enumerate(items)
            if len(words_of(item)) >= min(ngram, SHORTEST)
        )


def test_case_punctuation_and_place_do_not_matter():
    item = "Which of the following is not one of the four chambers of the heart?"
    text = (
        "Long before that. " * 3000
        + "which of the following is NOT one of the\n“four” chambers — of the heart"
    )
    assert Overlap({"heart": [item]}).find(text) == {"heart": {0}}
    assert Overlap({"heart": [item]}).find(text.replace("four", "five")) == {}


def test_scripts_without_spaces_are_compared_by_characters():
    item = "心脏的四个腔室中不包括以下哪一项结构"
    assert Overlap({"heart": [item]}).find(f"前面。{item[2:16]}，后面") == {"heart": {0}}
    assert Overlap({"heart": [item]}).find(f"前面。{item[2:14]}，后面") == {}
    assert words_of("हिन्दी में, नहीं?") == ["हिन्दी", "में", "नहीं"]
    assert words_of("ภาษา 2") == ["ภ", "า", "ษ", "า", "2"]


def test_the_count_adds_up():
    words = [f"word{i}" for i in range(40)]
    long, other, short = " ".join(words[:20]), " ".join(words[20:]), " ".join(words[:7])
    overlap = Overlap({"a": [short, long, other], "b": iter([short]), "c": []})
    count = OverlapCount(overlap)
    for text in (f"{long} {other}", long, "nothing at all", short):
        count.add(overlap.find(text))
    assert count.report() == {
        "a": {
            "items": 3,
            "items_found": 2,
            "items_too_short_to_look_for": 1,
            "texts_that_overlap": 2,
        },
        "b": {
            "items": 1,
            "items_found": 0,
            "items_too_short_to_look_for": 1,
            "texts_that_overlap": 0,
        },
        "c": {
            "items": 0,
            "items_found": 0,
            "items_too_short_to_look_for": 0,
            "texts_that_overlap": 0,
        },
    }


def test_nothing_to_look_for_finds_nothing():
    assert Overlap({}).find("some text") == {} == Overlap({"a": []}).find("")
    with pytest.raises(ValueError, match="ngram=0"):
        Overlap({}, ngram=0)


def test_the_wording_of_a_task_is_not_looked_for():
    wording = (
        "Read the following question about medicine and choose the best of the four answers below. "
        "Question:"
    )
    items = [
        f"{wording} which organ number {number} makes the hormone that raises the pressure of the "
        f"blood in vessel {number}?"
        for number in range(40)
    ]
    overlap = Overlap({"exam": items})
    assert overlap.find(f"A page. {wording} what is a cell?") == {}
    assert overlap.find(f"The book asks: {items[7].removeprefix(wording)}") == {"exam": {7}}
