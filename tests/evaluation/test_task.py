import gzip
import json
import subprocess
import sys

import pytest

from ipt.evaluation.data import read_rows, subset
from ipt.evaluation.task import load_tasks, task_digests, task_names
from ipt.evaluation.task_types import multiple_choice, perplexity
from ipt.evaluation.task_types.registry import KINDS, kind_of


def write_task(folder, name="mine", **content):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


def write_rows(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)


def test_everything_that_ships_loads():
    tasks = load_tasks(task_names())
    assert {entry.kind for entry in tasks} == set(KINDS)
    assert all(entry.description for entry in tasks)


def test_a_group_is_its_tasks_and_each_task_is_there_once():
    names = [entry.name for entry in load_tasks(["is_a_recall", "ontology", "is_a_recall"])]
    assert names == [
        "is_a_recall",
        "definition_to_term_recall",
        "definition_to_term_generalisation",
        "is_a_generalisation",
        "held_out_perplexity",
    ]


def test_a_users_group_names_files_beside_it(tmp_path):
    write_task(tmp_path, "one", kind="choice", data="one.jsonl")
    group = write_task(tmp_path, "several", tasks=["one.yaml", "is_a_recall"])
    assert [entry.name for entry in load_tasks([group])] == ["one", "is_a_recall"]


def test_unknown_names_get_the_nearest():
    with pytest.raises(
        ValueError, match=r"no task or group is called 'is_a_recal': did you mean is_a_recall\b"
    ):
        load_tasks(["is_a_recal"])
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist"):
        load_tasks(["nowhere.yaml"])
    with pytest.raises(
        ValueError, match=r"tasks is empty: name a task, or the path of a .yaml file"
    ):
        load_tasks([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"kind": "choice", "data": "x.jsonl", "promt": "a"},
            r"mine.yaml: unknown key 'promt': did you mean prompt\?",
        ),
        ({"kind": "choice"}, r"mine.yaml: the key data is missing"),
        ({"kind": "choice", "data": 3}, r"mine.yaml: data is 3, expected a text"),
        (
            {"kind": "choice", "data": "x", "options": []},
            r"mine.yaml: options is \[\], expected a text or a list of texts",
        ),
        (
            {"kind": "choice", "data": "x", "options": [True, False]},
            r"mine.yaml: options is \[True, False\], .*quote them",
        ),
        (
            {"kind": "choice", "data": "x", "where": "a"},
            r"mine.yaml: where is 'a', expected a mapping",
        ),
        (
            {"kind": "choice", "data": "x", "name": "a/b"},
            r"mine.yaml: name is 'a/b'.*cannot contain a slash",
        ),
        (
            {"kind": "choice", "data": "x", "stop": ["."]},
            r"mine.yaml: stop has no effect in a task of kind choice: .* \(it is for generation\)",
        ),
        (
            {"kind": "perplexity", "data": "x", "num_fewshot": 1},
            r"mine.yaml: num_fewshot has no effect in a task of kind perplexity",
        ),
        (
            {"kind": "harness", "harness": "a", "num_fewshot": 2, "fewshot": {"seed": 1}},
            r"mine.yaml: fewshot has no effect in a task of kind harness",
        ),
        (
            {"kind": "choice", "data": "x", "distractors": {"number": 3}},
            r"mine.yaml: distractors.field is missing",
        ),
        (
            {"kind": "choice", "data": "x", "distractors": {"near": 3}},
            r"mine.yaml: distractors.near is 3, expected a text",
        ),
        ({"tasks": "one"}, r"mine.yaml: tasks is 'one', expected a list of texts"),
        ({"tasks": ["mine.yaml"]}, r"mine.yaml: the group contains itself"),
        (["a"], r"mine.yaml: found list, expected keys"),
    ],
)
def test_bad_files_give_one_line(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_tasks([str(path)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: [open\nkind: choice")
    with pytest.raises(ValueError, match=r"mine.yaml: not a YAML file") as error:
        load_tasks([str(path)])
    assert "\n" not in str(error.value)


def test_an_unknown_kind(tmp_path):
    (loaded,) = load_tasks([write_task(tmp_path, kind="choise", data="x")])
    with pytest.raises(
        ValueError, match=r"task mine: kind is 'choise', expected choice or generation or"
    ):
        kind_of(loaded)


def test_two_tasks_of_one_name(tmp_path):
    with pytest.raises(ValueError, match=r"another task has the name is_a_recall"):
        load_tasks(
            ["is_a_recall", write_task(tmp_path, kind="choice", data="x", name="is_a_recall")]
        )


def test_digests_follow_definition_and_data(tmp_path):
    def digest(**content):
        return task_digests(
            load_tasks([write_task(tmp_path, kind="choice", data="x.jsonl", **content)])
        )["mine"]

    write_rows(tmp_path / "x.jsonl", {"a": 1})
    first = digest()
    assert digest() == first != digest(prompt="{{ a }}")
    write_rows(tmp_path / "x.jsonl", {"a": 2})
    assert digest() != first
    (tmp_path / "own").mkdir()
    folder = load_tasks([write_task(tmp_path, "two", kind="harness", harness="two", data="own")])
    before = task_digests(folder)
    (tmp_path / "own" / "two.yaml").write_text("task: two")
    assert task_digests(folder) != before
    assert set(task_digests(load_tasks(["ontology"]))) == {
        entry.name for entry in load_tasks(["ontology"])
    }


# Items
# ----------------------------------------------------------------------------------------------


def test_templates_and_fields_of_a_users_file(tmp_path):
    row = {
        "key": "q7",
        "question": "Cost ${{5}} of what?",
        "choices": ["tea", "salt"],
        "answer": "salt",
    }
    write_rows(tmp_path / "x.jsonl.gz", row)
    path = write_task(
        tmp_path,
        kind="choice",
        data="x.jsonl.gz",
        id="key",
        prompt="Question: {{ question }}\nAnswer:",
        options="choices",
        option=" {{ option | upper }}",
        gold="answer",
    )
    (question,) = multiple_choice.read(load_tasks([path])[0], None)
    assert question[:4] == ("q7", "Question: Cost ${{5}} of what?\nAnswer:", [" TEA", " SALT"], 1)


def test_options_may_be_fixed_or_spread_over_fields(tmp_path):
    write_rows(tmp_path / "x.jsonl", {"prompt": "p", "a": "one", "b": "two", "gold": 1})
    path = write_task(
        tmp_path, kind="choice", data="x.jsonl", options=[" {{ a }}", " {{ b }}", " neither"]
    )
    (question,) = multiple_choice.read(load_tasks([path])[0], None)
    assert question[:4] == ("0", "p", [" one", " two", " neither"], 1)


def test_documents_of_a_users_file(tmp_path):
    write_rows(
        tmp_path / "x.jsonl",
        {"id": "a", "body": "text", "lang": "en"},
        {"id": "b", "body": "Text", "lang": "de"},
    )
    path = write_task(
        tmp_path, kind="perplexity", data="x.jsonl", text="{{ body }}", where={"lang": "de"}
    )
    assert perplexity.read(load_tasks([path])[0], None) == [("b", "Text", 0)]


GOOD = {"id": "a", "prompt": "p", "options": ["x", "y"], "gold": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gold": 2},
            r"x.jsonl line 2: field gold is 2, expected an index from 0 to 1 or the text of an "
            r"option",
        ),
        ({"gold": True}, r"x.jsonl line 2: field gold is True"),
        ({"gold": -1}, r"x.jsonl line 2: field gold is -1, expected an index from 0 to 1"),
        ({"gold": 0.5}, r"x.jsonl line 2: field gold is 0.5"),
        ({"gold": "z"}, r"x.jsonl line 2: field gold is 'z'"),
        ({"id": "a"}, r"task mine: two items have the id 'a', expected unique ids"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    write_rows(tmp_path / "x.jsonl", GOOD, {**GOOD, "id": "b", **change})
    with pytest.raises(ValueError, match=message):
        multiple_choice.read(
            load_tasks([write_task(tmp_path, kind="choice", data="x.jsonl")])[0], None
        )


def test_bad_files_are_named(tmp_path):
    (loaded,) = load_tasks([write_task(tmp_path, kind="choice", data="x.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"task mine: data file .*x.jsonl does not exist"):
        read_rows(loaded, None)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"x.jsonl line 2: not valid JSON"):
        read_rows(loaded, None)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(
        ValueError, match=r"x.jsonl cannot be read as jsonl: .*can't decode byte 0xff"
    ):
        read_rows(loaded, None)
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"task mine: .*x.jsonl holds no rows"):
        read_rows(loaded, None)


def test_a_template_that_is_none(tmp_path):
    write_rows(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"task mine: prompt is not a valid template"):
        multiple_choice.read(
            load_tasks([write_task(tmp_path, kind="choice", data="x.jsonl", prompt="{{ prompt")])[
                0
            ],
            None,
        )


def test_a_corpus_without_what_a_task_reads(corpus):
    (loaded,) = load_tasks(["is_a_recall"])
    with pytest.raises(
        ValueError,
        match=r"task is_a_recall reads questions.jsonl of a corpus, but no corpus is given",
    ):
        read_rows(loaded, None)
    with pytest.raises(
        FileNotFoundError, match=r"task is_a_recall: the corpus in .* has no questions.jsonl"
    ):
        read_rows(loaded, corpus / "held_out")
    (corpus / "questions.jsonl").write_text(
        json.dumps({**GOOD, "task": "other", "split": "recall"}) + "\n"
    )
    with pytest.raises(
        ValueError,
        match=r"holds no row with task=is_a, split=recall: found task=other, split=recall",
    ):
        read_rows(loaded, corpus)


def test_the_corpus_stage_is_read(corpus):
    sizes = {
        entry.name: len(kind_of(entry).read(entry, corpus))
        for entry in load_tasks(["ontology", "corpus_questions"])
    }
    assert sizes == {
        "definition_to_term_recall": 4,
        "definition_to_term_generalisation": 4,
        "is_a_recall": 4,
        "is_a_generalisation": 4,
        "held_out_perplexity": 4,
        "corpus_questions": 16,
    }


def test_a_limit_takes_the_same_items_from_any_order():
    items = [multiple_choice.Question(str(number), "p", ["a", "b"], 0) for number in range(50)]
    chosen = subset(items, 7)
    assert len(chosen) == 7 and [int(item.id) for item in chosen] == sorted(
        int(item.id) for item in chosen
    )
    assert {item.id for item in subset(items[::-1], 7)} == {item.id for item in chosen}
    assert {item.id for item in subset(items, 5)} < {item.id for item in chosen}
    assert subset(items, None) == subset(items, 50) == items


def test_torch_stays_out_until_a_model_is_scored():
    code = (
        "import sys, ipt.evaluation.run, ipt.evaluation.results; sys.exit('torch' in sys.modules "
        "or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
