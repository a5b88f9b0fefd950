"""What `gold` means: one thing for all rows of a task."""

import json

import pytest

from ipt.errors import UserError
from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types import multiple_choice

SUMS = [["2", "3", "4", "1"], ["6", "8", "7", "5"]]
WORDS = ["heart", "lung", "bone"]


def golds(folder, options, found, name="x.jsonl", **keys):
    """The right options of a task whose rows have these options and this field `g`."""
    rows = [
        {"prompt": "p", "options": texts, "g": value}
        for texts, value in zip(options, found, strict=True)
    ]
    if name.endswith(".csv"):
        lines = [f"p,{','.join(row['options'])},{row['g']}" for row in rows]
        (folder / name).write_text(
            "\n".join(["prompt,a,b,c,d", *lines]).replace("d\n", "d,g\n", 1) + "\n"
        )
        keys["options"] = ["{{ a }}", "{{ b }}", "{{ c }}", "{{ d }}"]
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(
        json.dumps({"kind": "choice", "data": name, "gold": "g", **keys})
    )
    questions = multiple_choice.read(load_tasks([str(folder / "mine.yaml")])[0], None)
    return [question.right or question.gold for question in questions]


@pytest.mark.parametrize(
    ("options", "found", "keys", "expected"),
    [
        (SUMS, ["1", "2"], {}, [1, 2]),  # no option of the second row is 2: indices
        (SUMS, [1, 2], {}, [1, 2]),  # numbers are indices
        (SUMS, [1.0, 2.0], {}, [1, 2]),
        (SUMS, ["1.0", "2.0"], {}, [1, 2]),
        (SUMS, [" 1", "2 "], {}, [1, 2]),
        (SUMS, ["3", "7"], {}, [1, 2]),  # the second row has no index 7: texts
        (SUMS, [["1", "2"], ["0"]], {}, [(1, 2), 0]),
        ([["0", "1"]] * 2, ["0", "1"], {}, [0, 1]),  # both readings say the same
        ([["1", "0", "2"]], ["1"], {"gold": "{{ g | int - 1 }}"}, [0]),  # a number of a template
        ([["1", "0", "2"]], [1], {"gold": "{% set one = g - 1 %}{{ one }}\n"}, [0]),
        ([["1", "0", "2"]], [1], {"gold": "{{ g / 1 }}"}, [1]),
        ([WORDS] * 2, ["bone", "heart"], {"gold": "{{ g }}"}, [2, 0]),
        (SUMS[:1], ["1"], {"gold_is": "index"}, [1]),
        (SUMS[:1], ["1"], {"gold_is": "text"}, [3]),
        (SUMS[:1], [1], {"gold_is": "text"}, [3]),
        (SUMS[:1], ["1"], {"gold": "{{ g | int }}", "gold_is": "text"}, [3]),
    ],
)
def test_one_meaning_for_all_rows(tmp_path, options, found, keys, expected):
    assert golds(tmp_path, options, found, **keys) == expected


def test_cells_of_tables_are_read_as_texts_of_other_files(tmp_path):
    assert golds(tmp_path, SUMS, ["1", "2"], "x.csv") == [1, 2]
    with pytest.raises(
        UserError,
        match=(
            r"x.csv line 2: field g is '1', which means option 1 \('3'\) as an index from 0, and "
            r"option 3"
        ),
    ):
        golds(tmp_path, SUMS[:1], ["1"], "x.csv")


@pytest.mark.parametrize(
    ("options", "found", "keys", "message"),
    [
        (
            [SUMS[0], SUMS[0]],
            ["2", "1"],
            {},
            r"x.jsonl line 1: field g is '2', which means option 2 \('4'\) as an index from 0, and "
            r"option 0 \('2'\) as a text: "
            r"add gold_is: index or gold_is: text to the file of task mine",
        ),
        (
            [SUMS[0]],
            ["{{ g }}"],
            {"gold_is": "text"},
            r"line 1: field g is '{{ g }}', expected the text of an option .* .gold_is: text",
        ),
        (
            SUMS,
            ["1", "4"],
            {},
            r"x.jsonl line 2: field g is '4', expected an index from 0 to 3 or the text of an "
            r"option",
        ),
        (
            SUMS,
            ["1", "4"],
            {"gold_is": "index"},
            r"x.jsonl line 2: field g is '4', expected an index from 0 to 3 \(or",
        ),
        (
            [WORDS] * 2,
            [1, "bone"],
            {},
            r"must be the same in all rows, .*, but .*line 1 has an index \(1\) and .*line 2 a "
            r"text",
        ),
        ([WORDS], [True], {}, r"field g is True, expected"),
        (
            [WORDS],
            ["heart"],
            {"gold_is": "label"},
            r"task mine: gold_is is 'label', expected index or text",
        ),
        ([WORDS], [0], {"gold": "{{ g - 1 }}"}, r"is -1, expected an index"),
    ],
)
def test_what_has_no_meaning_is_an_error(tmp_path, options, found, keys, message):
    with pytest.raises(UserError, match=message):
        golds(tmp_path, options, found, **keys)


def test_demonstrations_have_the_meaning_of_the_task(tmp_path):
    """Alone, the rows of either file might be read in two ways."""
    shots = [{"prompt": "shot", "options": SUMS[1], "g": "2"}]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots))
    assert golds(tmp_path, SUMS[:1], ["1"], num_fewshot=1, fewshot={"data": "shots.jsonl"}) == [1]
    (tmp_path / "shots.jsonl").write_text(
        json.dumps({"prompt": "shot", "options": SUMS[0], "g": "7"}) + "\n"
    )
    with pytest.raises(UserError, match=r"shots.jsonl line 1: field g is '7'"):
        golds(tmp_path, SUMS[:1], ["1"], num_fewshot=1, fewshot={"data": "shots.jsonl"})
