"""Rows of which no item can be made: left out, counted and reported, or an error."""

import io
import json

import pytest
from rich.console import Console

from ipt.config import EvaluationConfig
from ipt.errors import UserError
from ipt.evaluation.odd_rows import OddRow, OddRows
from ipt.evaluation.results import compare, load_results
from ipt.evaluation.run import evaluate
from ipt.evaluation.tables import table
from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types.registry import kind_of

QUESTION = {"prompt": "p", "options": [" x", " y"], "gold": 0}
PAIR = {"context": "c", "question": "q", "answer": "a"}
TASKS = {
    "choice": {},
    "generation": {"prompt": "{{ prompt }}", "answer": "{{ options[gold] }}"},
    "perplexity": {"text": "{{ text }}", "context": "{{ prompt }}"},
    "pairs": {},
}
GOOD = {
    "choice": QUESTION,
    "generation": QUESTION,
    "perplexity": {"prompt": "p", "text": "t"},
    "pairs": PAIR,
}
ODD = [
    (
        "choice",
        {"options": [" x", " x"]},
        {},
        r"options are \[' x', ' x'\], expected at least two different texts",
    ),
    (
        "choice",
        {"options": [" X", " x"]},
        {"option": "{{ option | lower }}"},
        r"options are \[' x', ' x'\]",
    ),
    ("choice", {"options": [" x", ""]}, {}, r"none empty"),
    ("choice", {"options": ["x", ""]}, {"option": " {{ option }}"}, r"options are \[' x', ' '\]"),
    ("choice", {"options": [" x", None]}, {}, r"none empty"),
    ("choice", {"options": [" x"]}, {}, r"at least two"),
    ("choice", {"options": "xy"}, {}, r"field options is 'xy', expected a list of texts"),
    (
        "choice",
        {"options": [" x", 3]},
        {},
        r"field options is \[' x', 3\], expected a list of texts",
    ),
    (
        "choice",
        {"options": None},
        {},
        r"there is no field options, which the task's key `options` names; there are",
    ),
    ("choice", {"gold": None}, {}, r"field gold is None: the row has no right option"),
    ("choice", {"gold": float("nan")}, {}, r"field gold is nan: the row has no right option"),
    ("choice", {"prompt": float("nan")}, {}, r"cannot fill its prompt: 'prompt' is undefined"),
    ("choice", {"gold": ""}, {}, r"field gold is '': the row has no right option"),
    ("choice", {"gold": []}, {}, r"field gold is \[\]"),
    (
        "choice",
        {"gold": None},
        {"gold": "{{ gold }}"},
        r"cannot fill its gold: 'gold' is undefined",
    ),
    (
        "choice",
        {"prompt": None},
        {},
        r"task mine cannot fill its prompt: 'prompt' is undefined; the row has options, gold",
    ),
    (
        "choice",
        {"options": None},
        {"options": ["{{ options[0] }}", "{{ options[1] }}"]},
        r"cannot fill its options",
    ),
    (
        "choice",
        {"prompt": None},
        {"unconditional": "{{ prompt }}:", "prompt": "p"},
        r"cannot fill its unconditional",
    ),
    (
        "choice",
        {"prompt": None},
        {"group": "prompt"},
        r"there is no field prompt, which the task's key `group` names",
    ),
    ("choice", {"prompt": None}, {"keep": "{{ prompt != 'q' }}"}, r"cannot fill its keep"),
    ("generation", {"prompt": None}, {}, r"cannot fill its prompt"),
    ("generation", {"options": []}, {}, r"cannot fill its answer"),
    ("perplexity", {"text": None}, {}, r"cannot fill its text"),
    ("perplexity", {"text": ""}, {}, r"text is empty, so nothing follows the context"),
    ("pairs", {"answer": None}, {}, r"cannot fill its answer"),
    ("pairs", {"context": None}, {}, r"cannot fill its context"),
]


def write(folder, kind, rows, **keys):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(
        json.dumps({"kind": kind, "data": "x.jsonl", **TASKS[kind], **keys})
    )
    (task,) = load_tasks([str(folder / "mine.yaml")])
    return task


@pytest.mark.parametrize(("kind", "change", "keys", "message"), ODD)
def test_an_odd_row_is_left_out_or_an_error(tmp_path, kind, change, keys, message):
    good = GOOD[kind]
    task, odd = write(tmp_path, kind, [good, {**good, **change}, good], **keys), OddRows()
    assert len(kind_of(task).read(task, None, odd)) == 2 and (len(odd), odd.read) == (1, 3)
    strict = write(tmp_path, kind, [good, {**good, **change}, good], odd_rows="error", **keys)
    with pytest.raises(OddRow, match=rf"x.jsonl line 2: .*{message}"):
        kind_of(strict).read(strict, None)
    nothing = write(tmp_path, kind, [{**good, **change}] * 2, **keys)
    with pytest.raises(OddRow, match=rf"x.jsonl line 1: .*{message}"):
        kind_of(nothing).read(nothing, None)


def test_other_mistakes_stay_errors(tmp_path):
    for keys, message in [
        ({"odd_rows": "skip"}, "odd_rows is 'skip', expected leave_out or error"),
        ({"gold": "right"}, "no field right"),
    ]:
        task = write(tmp_path, "choice", [QUESTION] * 2, **keys)
        with pytest.raises(UserError, match=message):
            kind_of(task).read(task, None)


def test_a_row_without_what_distractors_need_is_no_one_s_option(tmp_path):
    rows = [{"term": term, "prompt": "p"} for term in ("a", "b", "c", None)]
    task, odd = (
        write(tmp_path, "choice", rows, distractors={"field": "term", "number": 2}),
        OddRows(),
    )
    found = kind_of(task).read(task, None, odd)
    assert [set(question.options) for question in found] == [{"a", "b", "c"}] * 3 and (
        len(odd),
        odd.read,
    ) == (1, 4)


def test_a_line_names_the_rows(tmp_path, caplog):
    rows = [QUESTION, *[{**QUESTION, "gold": None}] * 7]
    (tmp_path / "shots.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [{**QUESTION, "prompt": "shot"}, {**QUESTION, "options": []}]
        )
    )
    task, odd = (
        write(tmp_path, "choice", rows, num_fewshot=1, fewshot={"data": "shots.jsonl"}),
        OddRows(),
    )
    kind_of(task).read(task, None, odd)
    odd.report(task)
    first, second = caplog.messages
    assert first.startswith(
        "task mine: 7 of 8 rows are left out (odd_rows: error makes this an error): "
    ) and first.endswith("; and 2 more")
    assert "x.jsonl line 2: field gold is None" in first and first.count("x.jsonl line") == 5
    assert (
        second.startswith("task mine: 1 of 2 rows of its demonstrations are left out")
        and "shots.jsonl line 2" in second
    )
    OddRows().report(task)
    assert len(caplog.messages) == 2


def test_results_say_how_many_are_left_out(tmp_path, tiny_model, caplog):
    rows = [
        {**QUESTION, "id": str(number), "options": [" x"] * 2 if number == 1 else [" x", " y"]}
        for number in range(4)
    ]
    write(tmp_path, "choice", rows)
    folder = tmp_path / "out"
    statistics = evaluate(
        EvaluationConfig(limit=2), tiny_model, [str(tmp_path / "mine.yaml")], None, folder
    )
    assert statistics["tasks"]["mine"]["left_out_rows"] == 1 and statistics["items"] == 2
    assert load_results(folder)["mine"]["left_out"] == {
        "value": 1,
        "stderr": None,
        "ci95": [None, None],
        "n": 4,
    }
    assert "| mine | left_out | 1 | – | 4 |" in (folder / "results.md").read_text(encoding="utf-8")
    assert "| mine | 2 |" in (folder / "results.md").read_text(encoding="utf-8")
    Console(file=(shown := io.StringIO()), width=80).print(table({"tiny": folder}))
    assert any(
        "left_out" in line and line.split()[-1] == "1" for line in shown.getvalue().splitlines()
    )
    assert "left_out" not in compare(folder, folder)["mine"]
    assert "task mine: 1 of 4 rows are left out" in caplog.text
