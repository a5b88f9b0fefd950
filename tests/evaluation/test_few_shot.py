"""Demonstrations before prompts, several phrasings of a prompt, and wrong options from other
rows.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.evaluation.data import draw, read_rows
from ipt.evaluation.task import Task, load_tasks, task_digests
from ipt.evaluation.task_types import generation, multiple_choice

COLOURS = ["red", "green"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(begin, end):
    return [
        {"id": f"i{number}", "q": f"question {number}", "gold": number % 2}
        for number in range(begin, end)
    ]


@pytest.fixture
def task(tmp_path):
    """Twenty questions of two classes, and forty others to demonstrate with."""
    write(tmp_path / "test.jsonl", rows(0, 20))
    write(tmp_path / "train.jsonl", rows(100, 140))

    def make(number=2, prompt="Q: {{ q }}\nA:", delimiter="\n\n", **fewshot):
        return Task(
            "mine",
            "choice",
            "test.jsonl",
            prompt=prompt,
            options=COLOURS,
            option=" {{ option }}",
            num_fewshot=number,
            fewshot_delimiter=delimiter,
            fewshot={"data": "train.jsonl", **fewshot},
            folder=tmp_path,
        )

    return make


def demonstrations(question, separator="\n\n"):
    return question.prompt[: question.shots].split(separator)[:-1]


def test_all_items_share_one_draw_behind_which_they_stand_as_without(task):
    found = multiple_choice.read(task(5), None)
    assert len({question.prompt[: question.shots] for question in found}) == 1
    plain = multiple_choice.read(replace(task(), num_fewshot=None), None)
    assert [question.prompt[question.shots :] for question in found] == [
        question.prompt for question in plain
    ]
    assert [question.text for question in found] == [question.text for question in plain]
    shown = demonstrations(found[0])
    wanted = {f"Q: question {number}\nA: {COLOURS[number % 2]}" for number in range(100, 140)}
    assert len(set(shown)) == 5 and set(shown) <= wanted


def test_as_many_of_each_class(task):
    for keys in ({}, {"vary": True}, {"order": "data"}):
        for question in multiple_choice.read(task(3, per_class=True, **keys), None):
            classes = [shown.rpartition(" ")[2] for shown in demonstrations(question)]
            assert Counter(classes) == {"red": 3, "green": 3}


def test_each_item_may_have_its_own_draw(task):
    first, again = (multiple_choice.read(task(3, vary=True), None) for _ in range(2))
    assert first == again
    assert len({question.prompt[: question.shots] for question in first}) > 15
    assert multiple_choice.read(task(3, vary=True, seed=1), None) != first


def test_a_seed_gives_another_draw_and_data_order_none(task):
    assert (
        multiple_choice.read(task(), None)[0].prompt
        != multiple_choice.read(task(seed=1), None)[0].prompt
    )
    question = multiple_choice.read(task(2, order="data", delimiter="\n"), None)[0]
    assert (
        question.prompt == "Q: question 100\nA: red\nQ: question 101\nA: green\nQ: question 0\nA:"
    )


def test_an_item_never_demonstrates_itself_and_no_text_comes_twice(task):
    own = {"data": "test.jsonl"}
    for question in multiple_choice.read(task(19, **own), None):
        shown = demonstrations(question)
        assert len(set(shown)) == 19 and question.text not in shown
    with pytest.raises(ValueError, match=r"task mine: 19 demonstrations for item i0, expected 20"):
        multiple_choice.read(task(20, **own), None)
    with pytest.raises(
        ValueError,
        match=r"task mine: 9 demonstrations with the answer ' red' for item i0, expected 10",
    ):
        multiple_choice.read(task(10, per_class=True, **own, where={"gold": 0}), None)


def test_demonstrations_take_the_phrasing_of_their_item(task):
    found = multiple_choice.read(task(2, prompt=["Q: {{ q }}\nA:", "Asked: {{ q }}\nSaid:"]), None)
    begins = Counter(question.prompt[question.shots :].split(":")[0] for question in found)
    assert set(begins) == {"Q", "Asked"}, "both phrasings occur"
    for question in found:
        begin = question.prompt[question.shots :].split(":")[0]
        assert [shown.split(":")[0] for shown in demonstrations(question)] == [begin] * 2
    assert len({question.prompt[: question.shots] for question in found}) == 2, (
        "one draw, printed in both ways"
    )


def test_written_answers_are_demonstrated_too(tmp_path):
    write(tmp_path / "x.jsonl", [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}])
    task = Task(
        "mine",
        "generation",
        "x.jsonl",
        prompt="{{ q }} =",
        answer=" {{ a }}",
        num_fewshot=1,
        folder=tmp_path,
    )
    assert [item.prompt for item in generation.read(task, None)] == [
        "2+2 = 4\n\n1+1 =",
        "1+1 = 2\n\n2+2 =",
    ]
    with pytest.raises(ValueError, match=r"fewshot.per_class is for tasks of kind choice"):
        generation.read(replace(task, fewshot={"per_class": True}), None)


def test_the_digest_follows_the_demonstrations(task, tmp_path):
    before = task_digests([task()])
    write(tmp_path / "train.jsonl", rows(100, 141))
    assert task_digests([task()]) != before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_fewshot": 2, "fewshot": {"perclass": True}},
            r"unknown key 'fewshot.perclass': did you mean per_class\?",
        ),
        ({"num_fewshot": "2"}, r"num_fewshot is '2', expected a whole number, 0 or more"),
        ({"num_fewshot": -1}, r"num_fewshot is -1, expected a whole number, 0 or more"),
        ({"fewshot": {"data": "x.jsonl"}}, r"num_fewshot is missing: fewshot needs it"),
        ({"fewshot_split": "train"}, r"num_fewshot is missing: fewshot_split needs it"),
        (
            {"num_fewshot": 1, "fewshot": {"split": "train"}},
            r"fewshot.split: write fewshot_split",
        ),
        (
            {"num_fewshot": 1, "fewshot": {"vary": "yes"}},
            r"fewshot.vary is 'yes', expected true or false",
        ),
        (
            {"shots": {"number": 1, "per_class": True, "separator": "x"}},
            r"the key shots has new names: write shots.number -> num_fewshot, "
            r"shots.per_class -> fewshot.per_class, shots.separator -> fewshot_delimiter",
        ),
        ({"shots": 5}, r"write shots.number -> num_fewshot"),
    ],
)
def test_keys_of_demonstrations_are_checked(tmp_path, keys, message):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"kind": "choice", "data": "x.jsonl", **keys}))
    with pytest.raises(ValueError, match=message):
        load_tasks([str(path)])


def test_an_unknown_order(task):
    with pytest.raises(ValueError, match=r"fewshot.order is 'last', expected random or data"):
        multiple_choice.read(task(order="last"), None)


@given(st.integers(1, 30), st.text(max_size=5))
def test_a_draw_is_a_permutation(size, key):
    assert sorted(draw(size, key)) == list(range(size))
    assert list(draw(size, key)) == list(draw(size, key))


def test_draws_are_even():
    firsts = Counter(next(draw(5, str(number))) for number in range(5000))
    assert all(900 < count < 1100 for count in firsts.values())


# Wrong options from other rows
# ----------------------------------------------------------------------------------------------


def glossary(folder, rows, **distractors):
    (folder / "x.json").write_text(json.dumps(rows))
    distractors = {"field": "term", "number": 3, **distractors}
    return Task(
        "mine",
        "choice",
        "x.json",
        prompt="{{ meaning }}:",
        distractors=distractors,
        option=" {{ option }}",
        folder=folder,
    )


def test_wrong_options_come_from_near_rows_first(tmp_path):
    rows = [
        {"term": f"t{number}", "meaning": f"m{number}", "page": str(number // 4)}
        for number in range(40)
    ]
    task = glossary(
        tmp_path, [*rows, {"term": "T0", "meaning": "m0 again", "page": "0"}], near="page"
    )
    found = multiple_choice.read(task, None)
    for question, row in zip(found[:40], rows, strict=True):
        assert question.options[question.gold] == f" {row['term']}"
        page = {f" {other['term']}" for other in rows if other["page"] == row["page"]}
        assert {option.lower() for option in question.options} == page
    assert len({question.gold for question in found}) == 4, "the right option stands anywhere"
    anywhere = multiple_choice.read(replace(task, distractors={"field": "term", "number": 3}), None)
    assert all(len({option.lower() for option in question.options}) == 4 for question in anywhere)
    assert len({option for question in anywhere[:4] for option in question.options}) > 8


def test_what_has_no_wrong_options(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"x.json entry 1: 1 other values of term than 'a', expected 3: lower distractors.number"
        ),
    ):
        read_rows(glossary(tmp_path, [{"term": "a"}, {"term": "b"}, {"term": "A"}]), None)
    with pytest.raises(ValueError, match=r"x.json entry 2: field term is 3, expected a text"):
        read_rows(glossary(tmp_path, [{"term": "a"}, {"term": 3}]), None)
