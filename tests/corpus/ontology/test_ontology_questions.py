import json
import re
from collections import Counter

import pytest
from ontology_cases import entries

from ipt.corpus.ontology.build import Book, make_askers, make_book, shuffled
from ipt.corpus.ontology.questions import ask
from ipt.corpus.ontology.terms import parse_ontology
from ipt.corpus.questions import count_questions, read_questions


def make_questions(book: Book, count: int, limit: int | None = None, seed: int = 3):
    kept = shuffled([(book, page) for page in book.pages], seed)[:limit]
    return ask(make_askers([book], kept, set(), seed), count, Counter()), [page for _, page in kept]


@pytest.fixture(scope="module", params=["made up", "cells"])
def asked(request, cells):
    source = cells if request.param == "cells" else parse_ontology("MONDO", "v1", entries())
    book = make_book(source, 0.2, 3)
    questions, kept = make_questions(book, 40)
    return book, questions, kept


def test_counts_and_form(asked):
    _, questions, _ = asked
    counts = count_questions(questions)
    assert counts["definition_to_term"] == {"recall": 40, "generalisation": 40}
    assert counts["is_a"]["recall"] == 40 and counts["is_a"]["generalisation"] >= 20
    assert len({question["id"] for question in questions}) == len(questions)
    for question in questions:
        assert all(option.startswith(" ") and option.strip() for option in question["options"])
        assert (
            len(set(question["options"]))
            == len(question["options"])
            == (4 if question["task"] == "definition_to_term" else 2)
        )
        assert question["prompt"].endswith("Answer:")


def test_places_of_the_right_option_are_balanced(asked):
    _, questions, _ = asked
    for task, places in (("definition_to_term", 4), ("is_a", 2)):
        for split in ("recall", "generalisation"):
            golds = Counter(
                question["gold"]
                for question in questions
                if (question["task"], question["split"]) == (task, split)
            )
            assert (
                set(golds) == set(range(places)) and max(golds.values()) - min(golds.values()) <= 1
            )


def test_a_definition_does_not_give_the_name_away(asked):
    book, questions, _ = asked
    for question in (
        question for question in questions if question["task"] == "definition_to_term"
    ):
        term = book.ontology.terms[question["meta"]["term"]]
        assert question["options"][question["gold"]] == f" {term.name}"
        said = question["prompt"].split("\n")[1].lower()
        left = set(re.findall(r"[^\W_]+", said))
        assert not [
            word
            for word in re.findall(r"[^\W_]+", term.name.lower())
            if len(word) > 3 and word in left
        ]
        assert not [
            name
            for name in term.synonyms
            if re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", said)
        ]
        assert len(said.replace("___", " ").split()) >= 8


def test_wrong_options_are_wrong_and_of_the_same_split(asked):
    book, questions, kept = asked
    names = {term.name: term_id for term_id, term in book.ontology.terms.items()}
    pools = {
        "recall": {term_id for page in kept for term_id in page.defined},
        "generalisation": book.held_out,
    }
    for question in (
        question for question in questions if question["task"] == "definition_to_term"
    ):
        options = [names[option[1:]] for option in question["options"]]
        assert set(options) <= pools[question["split"]]
        right = options[question["gold"]]
        for other in set(options) - {right}:
            assert (
                other not in book.ontology.terms[right].distances
                and right not in book.ontology.terms[other].distances
            )
            shared = set(book.ontology.terms[other].distances) & set(
                book.ontology.terms[right].distances
            )
            assert shared


def test_is_a_answers_are_true(asked):
    book, questions, _ = asked
    for question in (question for question in questions if question["task"] == "is_a"):
        term, kind = book.ontology.terms[question["meta"]["term"]], question["meta"]["kind"]
        assert f"Is {term.name} a kind of {book.ontology.terms[kind].name}?" in question["prompt"]
        assert (kind in term.distances) == (question["options"][question["gold"]] == " yes")


def test_what_recall_asks_stands_on_a_page(asked):
    book, questions, kept = asked
    page_of = {term_id: page for page in kept for term_id in page.defined}
    for question in (question for question in questions if question["split"] == "recall"):
        page = page_of[question["meta"]["term"]]
        if question["task"] == "is_a" and question["gold"] == 0:
            assert book.ontology.terms[question["meta"]["kind"]].name.lower() in page.text.lower()


def test_no_question_stands_in_a_training_text(asked):
    book, questions, kept = asked
    text = "\n".join(page.text for page in kept)
    for question in questions:
        assert question["prompt"] not in text and question["prompt"].split("\n")[0] not in text
        assert question["prompt"] + question["options"][question["gold"]] not in text
        if question["split"] == "generalisation":
            assert (book.ontology.terms[question["meta"]["term"]].definition or "")[1:] not in text


def test_a_limit_narrows_recall_to_the_kept_pages(cells):
    questions, kept = make_questions(make_book(cells, 0.2, 3), 30, limit=40)
    known = {term_id for page in kept for term_id in page.defined}
    recall = [question for question in questions if question["split"] == "recall"]
    assert len(recall) >= 30 and len(kept) == 40
    assert {question["meta"]["term"] for question in recall} <= known
    names = {cells.terms[term_id].name for term_id in known}
    assert all(
        option[1:] in names
        for question in recall
        if question["task"] == "definition_to_term"
        for option in question["options"]
    )


def test_questions_depend_on_the_seed_alone(cells):
    book, again = make_book(cells, 0.2, 3), make_book(cells, 0.2, 3)
    assert (
        make_questions(book, 10)[0]
        == make_questions(again, 10)[0]
        != make_questions(book, 10, seed=4)[0]
    )


def test_neutral_parents_are_not_asked_about():
    questions, _ = make_questions(make_book(parse_ontology("UBERON", "v1", entries()), 0.2, 3), 5)
    assert set(count_questions(questions)) == {"definition_to_term"}


GOOD = {
    "id": "a",
    "task": "t",
    "split": "recall",
    "prompt": "p",
    "options": [" x", " y"],
    "gold": 1,
}


def test_a_users_questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "b", "meta": {"k": 1}}) + "\n"
    )
    assert list(read_questions(path.read_bytes().splitlines(), str(path))) == [
        {**GOOD, "meta": {}},
        {**GOOD, "id": "b", "meta": {"k": 1}},
    ]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({**GOOD, "gold": 2}, "gold is 2"),
        ({**GOOD, "gold": True}, "gold is True"),
        ({**GOOD, "options": [" x"]}, "options are"),
        ({**GOOD, "options": [" x", 3]}, "options are"),
        ({**GOOD, "prompt": ""}, "prompt is ''"),
        ({key: value for key, value in GOOD.items() if key != "id"}, "id is None"),
        (["list"], "JSON list"),
        (GOOD, "'a' occurred before"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(tmp_path, question, said):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(question) + "\n")
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line 2: .*{said}"):
        list(read_questions(path.read_bytes().splitlines(), str(path)))
