import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from evaluation_cases import make_scorer

from ipt.config import EvaluationConfig
from ipt.evaluation.backends.base import Generation
from ipt.evaluation.results import load_results
from ipt.evaluation.run import evaluate
from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types import generation
from ipt.evaluation.task_types.generation import counts, metrics, read, score

NUMBER = (
    "kind: generation\ndata: rows.jsonl\nparse: number\nprompt: 'Q: {{ q }} A:'\nanswer: ' {{ a "
    "}}'\n"
)
ROWS = [
    {"id": "a", "q": "Half of one?", "a": "0.5"},
    {"id": "b", "q": "A share?", "a": "0.042"},
    {"id": "c", "q": "Two?", "a": "2"},
]


@pytest.fixture
def make_task(tmp_path):
    def make(text=NUMBER, rows=ROWS):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "sums.yaml").write_text(text)
        (task,) = load_tasks([str(tmp_path / "sums.yaml")])
        return task

    return make


def predictions(pairs):
    return [
        {
            "id": str(number),
            "answer": answer,
            "output": output,
            "published_output": None,
            "parsed": output or None,
            "finish": "stop",
        }
        for number, (output, answer) in enumerate(pairs)
    ]


def test_items_are_prompt_and_answer(make_task):
    items = read(make_task(), None)
    assert items[0] == ("a", "Q: Half of one? A:", " 0.5", 0)
    assert items[0].text == "Q: Half of one? A: 0.5"
    shots = read(make_task(NUMBER + "num_fewshot: 1\nfewshot_delimiter: '; '\n"), None)
    assert all(
        item.prompt.count(" A:") == 2 and item.prompt.endswith(" A:") and "; Q:" in item.prompt
        for item in shots
    )
    assert [item.text for item in shots] == [item.text for item in items]


def test_what_is_no_way_to_read_an_answer_is_told(make_task):
    with pytest.raises(
        ValueError, match=r"sums: parse is 'date', expected text or number or entities"
    ):
        read(make_task(NUMBER.replace("parse: number", "parse: date")), None)


def test_an_evaluation_generates_and_scores(make_task, tmp_path, tiny_model):
    make_task()
    statistics = evaluate(
        EvaluationConfig(), tiny_model, [str(tmp_path / "sums.yaml")], None, tmp_path / "out"
    )
    assert set(load_results(tmp_path / "out")["sums"]) == {"paper", "correct"}
    written = pq.read_table(tmp_path / "out" / "predictions" / "sums.parquet")
    assert written.schema.remove_metadata() == generation.SCHEMA
    assert all(row["tokens"] <= 100 and "\n" not in row["output"] for row in written.to_pylist())
    assert set(statistics["tasks"]["sums"]) >= {
        "truncated_prompts",
        "unfinished_answers",
        "unread_answers",
    }


def test_a_prompt_that_the_published_scorer_cuts_is_answered_twice(make_task, model, tokenizer):
    task = make_task(NUMBER + "published_length: 5\nmax_new_tokens: 4\n")
    scorer = make_scorer(model, tokenizer, add_bos_token=True)
    items = [*read(task, None), generation.Item("d", "A:", " 1")]
    found = score(task, items, scorer)
    assert [row["published_output"] is None for row in found] == [False, False, False, True]
    for row, item in zip(found[:3], items, strict=False):
        ids = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        (expected,) = scorer.generate([[tokenizer.bos_token_id, *ids[-4:]]], ["\n"], 4, "test")
        assert row["published_output"] == expected.text
        assert (
            row["output"]
            == scorer.generate([[tokenizer.bos_token_id, *ids]], ["\n"], 4, "test")[0].text
        )
    assert any(row["published_output"] != row["output"] for row in found[:3]), (
        "the cut must change an answer"
    )
    rows = [{**row, "output": "0.5", "published_output": "7"} for row in found[:1]]
    assert [metrics(task, rows)[name].value for name in ("paper", "correct")] == [0.0, 1.0]


def test_numbers(make_task):
    rows = predictions([("0.034", "0.042"), ("4.2%", "0.042"), ("7 or 2", "2"), ("none", "2")])
    found = metrics(make_task(), rows)
    assert (found["paper"].value, found["correct"].value) == (0.75, 0.25)
    assert found["paper"].binary and found["correct"].n == 4


def test_entities_are_counted_over_all_items(make_task):
    task = replace(make_task(), parse="entities")
    pairs = [
        ("Ann (PER), Rome (LOC)", "Ann (PER)"),
        ("Lee (PER)", "Bob Lee (PER), Acme (ORG), Ann (PER)"),
        ("-", "none"),
    ]
    found = metrics(task, predictions(pairs))
    # One of three is right, of four: 2 * 1 / (3 + 4).
    assert found["correct"].value == pytest.approx(2 / 7)
    assert (found["precision"].value, found["recall"].value) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 4),
    )
    # nereval: 2 points of 4 and 2; 3 points of 2 and 6, one entity serving both persons; an item
    # without entities has none.
    assert found["paper"].value == pytest.approx((2 / 3 + 3 / 4 + 0) / 3)
    assert found["correct"].n == 3 and found["correct"].stderr > 0


def test_entities_that_nobody_names_have_no_f1(make_task):
    found = metrics(replace(make_task(), parse="entities"), predictions([("-", "none")] * 2))
    assert found["correct"].as_dict()["value"] is None and found["paper"].value == 0


def test_texts(make_task):
    found = metrics(
        replace(make_task(), parse="text"),
        predictions([("The heart.", "heart"), ("heart attack", "heart"), ("lung", "heart")]),
    )
    assert {name: round(metric.value, 3) for name, metric in found.items()} == {
        "paper": 0.333,
        "correct": 0.333,
        "exact_match": 0.333,
        "f1": round((1 + 2 / 3) / 3, 3),
        "contains": 0.667,
    }


def test_what_was_not_answered_is_counted(make_task):
    class Backend:
        encoder = SimpleNamespace(
            prompt=lambda text, room: ([1, 2, 3], text.startswith("Q: Two")), start=[1]
        )

        def generate(self, prompts, stop, max_new_tokens, description):
            assert (stop, max_new_tokens) == (["\n"], 100)
            return [
                Generation(" 0.5", 3, "stop"),
                Generation(" well", 100, "length"),
                Generation("", 1, "eos"),
            ]

    found = score(make_task(), read(make_task(), None), Backend())
    assert counts(found) == {"truncated_prompts": 1, "unfinished_answers": 1, "unread_answers": 2}
    assert [json.loads(row["parsed"]) if row["parsed"] else None for row in found] == [
        "0.5",
        None,
        None,
    ]


@pytest.mark.shared
def test_perfect_answers_to_real_tasks(shared_data):
    found = {}
    for task in load_tasks(["ner_local", "tatqa_local"], shared_data):
        rows = predictions([(item.answer, item.answer) for item in read(task, None)])
        found[task.name] = {
            name: round(metric.value, 3) for name, metric in metrics(task, rows).items()
        }
    assert found == {
        # what the released rule makes of perfection
        "ner_local": {"paper": 0.888, "correct": 1.0, "precision": 1.0, "recall": 1.0},
        "tatqa_local": {"paper": 1.0, "correct": 1.0},
    }
