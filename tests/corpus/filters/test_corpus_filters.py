import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import CorpusConfig
from ipt.corpus.build import build_corpus, check_corpus
from ipt.corpus.decontaminate import OVERLAPS, Overlap
from ipt.corpus.filters.build import (
    NEARLY_SAME,
    SAME,
    TOO_LONG,
    TOO_SHORT,
    UNCERTAIN,
    build_filters,
)
from tests.examples import examples

ENGLISH = "The heart of a mammal has four chambers, and its walls are made of muscle."
GERMAN = "Das Herz eines Säugetiers hat vier Kammern, und seine Wände bestehen aus Muskeln."


def reasons(texts: list[str], **options) -> list[str | None]:
    filters = build_filters(CorpusConfig(kind="files", path="x", **options))
    return [next(filter(None, (reason(text) for reason in filters)), None) for text in texts]


def sentence(seed: int, words: int = 200) -> list[str]:
    choose = random.Random(seed)
    return [f"word{choose.randrange(10_000)}" for _ in range(words)]


def test_by_default_nothing_is_left_out():
    assert build_filters(CorpusConfig()) == []


def test_lengths():
    assert reasons(["a" * size for size in (4, 5, 9, 10)], min_characters=5, max_characters=9) == [
        TOO_SHORT,
        None,
        None,
        TOO_LONG,
    ]


def test_languages():
    assert reasons([ENGLISH, GERMAN], languages=["en"]) == [None, "language de"]
    assert reasons([ENGLISH, GERMAN], languages=["en", "de"], language_probability=0.3) == [
        None,
        None,
    ]
    assert reasons([ENGLISH], languages=["en"], language_probability=1.0) == [UNCERTAIN]


@examples(50)
@given(st.lists(st.text(max_size=2), max_size=30))
def test_the_first_of_equal_texts_is_kept(texts):
    assert reasons(texts, exact_duplicates="remove") == [
        SAME if text in texts[:place] else None for place, text in enumerate(texts)
    ]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_by_their_jaccard_similarity(similarity):
    """Pairs of texts that are surely above and surely below the threshold, whose similarity is
    counted by hand.
    """

    def shingles(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}

    found = {True: [], False: []}
    for seed in range(30):
        words = sentence(seed)
        for changed in range(1, 120, 6):
            other = words[:-changed] + sentence(seed + 1000, changed)
            both, either = shingles(words) & shingles(other), shingles(words) | shingles(other)
            jaccard = len(both) / len(either)
            if abs(jaccard - similarity) > 0.08:
                [first, second] = reasons(
                    [" ".join(words), " ".join(other)], near_duplicates=similarity
                )
                assert first is None
                found[jaccard > similarity].append(second == NEARLY_SAME)
    assert len(found[True]) > 20 and sum(found[True]) > 0.97 * len(found[True])
    assert len(found[False]) > 20 and sum(found[False]) < 0.03 * len(found[False])


def test_near_duplicates_ignore_case_punctuation_and_line_breaks():
    text = " ".join(sentence(1))
    changed = text.upper().replace(" ", ",\n")
    assert reasons([text, changed, " ".join(sentence(2))], near_duplicates=0.95) == [
        None,
        NEARLY_SAME,
        None,
    ]


def test_near_duplicates_of_short_texts_and_of_scripts_without_spaces():
    assert reasons(["one two", "One, two!", "one three", "…", "…"], near_duplicates=0.8) == [
        None,
        NEARLY_SAME,
        None,
        None,
        None,
    ]
    chinese = "".join(
        chr(0x4E00 + random.Random(1).randrange(5000) + place) for place in range(300)
    )
    assert reasons(
        [chinese, chinese[:150] + "、" + chinese[151:], chinese[::-1]], near_duplicates=0.8
    ) == [None, NEARLY_SAME, None]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_no_document_is_lost_and_no_duplicate_crosses_over_to_training(tmp_path, rows):
    texts = [" ".join(sentence(seed, 30)) for seed in range(100)]
    path = write(
        tmp_path / "a.jsonl",
        texts + texts + [f"{text} end" for text in texts] + ["", "short", GERMAN * 3],
    )
    filters = {"min_characters": 10, "exact_duplicates": "remove", "near_duplicates": 0.8}
    config = CorpusConfig(kind="files", path=str(path), held_out_fraction=0.4, **filters)
    stats = build_corpus(config, 1, tmp_path / "out")
    training, held_out = rows(tmp_path / "out/documents"), rows(tmp_path / "out/held_out")
    assert stats["read"] == 303 == len(training) + len(held_out) + sum(stats["dropped"].values())
    assert stats["dropped"] == {"empty text": 1, TOO_SHORT: 1, SAME: 100, NEARLY_SAME: 100}
    assert sorted(row["text"] for row in training + held_out) == sorted([*texts, GERMAN * 3])
    assert len(held_out) > 20


def test_documents_that_overlap_with_a_task_are_counted_and_removed_on_demand(tmp_path, rows):
    item, other, absent = (" ".join(sentence(seed, 20)) for seed in (1, 2, 3))
    texts = [
        f"{' '.join(sentence(10 + number, 30))} {tail}"
        for number, tail in enumerate([item, "", f"{item} {other}", ""])
    ]
    config = CorpusConfig(
        kind="files", path=str(write(tmp_path / "a.jsonl", texts)), held_out_fraction=0.0
    )
    overlap = Overlap({"one": [item, absent, "too short"], "two": [other]})
    found = {
        "one": {
            "items": 3,
            "items_found": 1,
            "items_too_short_to_look_for": 1,
            "texts_that_overlap": 2,
        },
        "two": {
            "items": 1,
            "items_found": 1,
            "items_too_short_to_look_for": 0,
            "texts_that_overlap": 1,
        },
    }
    stats = build_corpus(config, 1, tmp_path / "out", overlap)
    assert (
        stats["overlap"] == {"ngram": 13, "removed": False, "tasks": found}
        and stats["documents"] == 4
        and stats["dropped"] == {}
    )
    stats = build_corpus(config, 1, tmp_path / "out", overlap, remove=True)
    assert stats["overlap"] == {"ngram": 13, "removed": True, "tasks": found} and stats[
        "dropped"
    ] == {OVERLAPS: 2}
    assert [row["text"] for row in rows(tmp_path / "out/documents")] == [texts[1], texts[3]]
    assert "overlap" not in build_corpus(config, 1, tmp_path / "out")


def test_pages_of_the_embedded_corpus_that_overlap(tmp_path, rows):
    config = CorpusConfig(kind="ontology", ontologies=["CL"], max_documents=30, questions=5)
    build_corpus(config, 1, tmp_path / "out")
    before = rows(tmp_path / "out/documents")
    overlap = Overlap({"task": [before[3]["text"], " ".join(sentence(1))]})
    stats = build_corpus(config, 1, tmp_path / "out", overlap, remove=True)
    assert stats["overlap"]["tasks"]["task"]["items_found"] == 1 and stats["dropped"][OVERLAPS] >= 1
    assert (
        stats["documents"]
        == 30 - stats["dropped"][OVERLAPS]
        == len(rows(tmp_path / "out/documents"))
    )
    assert before[3]["doc_id"] not in {row["doc_id"] for row in rows(tmp_path / "out/documents")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_characters": -1}, r"corpus\.min_characters=-1"),
        ({"max_characters": 0}, r"corpus\.max_characters=0"),
        ({"min_characters": 9, "max_characters": 8}, r"corpus\.max_characters=8"),
        (
            {"languages": ["en", "english"]},
            r"corpus\.languages names english: expected codes among .*en",
        ),
        ({"language_probability": 2.0}, r"corpus\.language_probability=2\.0"),
        (
            {"exact_duplicates": "drop"},
            r"corpus\.exact_duplicates=drop: must be one of keep, remove",
        ),
        ({"near_duplicates": 0.3}, r"corpus\.near_duplicates=0\.3"),
        ({"near_duplicates": 1.1}, r"corpus\.near_duplicates=1\.1"),
        (
            {"min_characters": 999},
            r"no document of the corpus is left.*shorter than corpus\.min_characters: 2",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, said):
    config = CorpusConfig(
        kind="files", path=str(write(tmp_path / "a.jsonl", ["one", "two"])), **options
    )
    with pytest.raises(ValueError, match=said) as caught:
        if options != {"min_characters": 999}:
            check_corpus(config)
        build_corpus(config, 0, tmp_path / "out")
    assert "\n" not in str(caught.value)
