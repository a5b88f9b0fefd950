"""Tasks of lm-evaluation-harness under our command, against the harness's own command and its own
model.
"""

import gzip
import json
import math
from itertools import islice

import numpy as np
import pytest
from evaluation_cases import make_scorer
from harness_cases import write_harness_tasks

from ipt.evaluation.data import subset
from ipt.evaluation.task import Task
from ipt.evaluation.task_types import lm_eval as harness
from ipt.evaluation.task_types.registry import item_texts

lm_eval = pytest.importorskip("lm_eval")
REAL = """
task: arc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TASKS = ["choice", "contexts", "last_word", "documents", "answers"]
SHOTS = {"choice": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_harness_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def make_task(folder, name, **keys):
    return Task(name, "harness", str(folder), harness=name, **keys)


def by_harness(model, tokenizer, folder, name, **options):
    """What the harness says with its own Hugging Face model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    return lm_eval.simple_evaluate(
        own, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize("name", TASKS)
def test_values_and_answers_are_those_of_the_harness(scorer, model, tokenizer, folder, name):
    task = make_task(folder, name, num_fewshot=SHOTS.get(name))
    predictions = harness.score(task, harness.read(task, None), scorer)
    theirs = by_harness(model, tokenizer, folder, name, num_fewshot=SHOTS.get(name))
    assert len(predictions) == 12
    for row in predictions:
        (expected,) = [
            entry
            for entry in theirs["samples"][name][: len(predictions)]
            if str(entry["doc_id"]) == row["id"]
        ]
        assert json.loads(row["doc"]) == expected["doc"]
        for ours, wanted in zip(json.loads(row["outputs"]), expected["resps"], strict=True):
            if isinstance(ours, str):
                assert ours == wanted[0]
            elif isinstance(ours, list):
                assert ours[0] == pytest.approx(wanted[0][0], abs=2e-3)
                if name != "choice":
                    assert ours[1] == wanted[0][1]
            else:
                assert ours == pytest.approx(wanted[0], abs=5e-3)
    found = harness.metrics(task, predictions)
    for key, value in theirs["results"][name].items():
        metric, _, kind = key.partition(",")
        if kind and "stderr" not in metric:
            assert found[metric if kind == "none" else key].value == pytest.approx(value, rel=1e-4)
    assert {"paper", "correct"} <= found.keys()


def test_the_fixture_has_right_and_wrong_and_greedy_answers(scorer, folder):
    """What the other tests compare is not all the same."""
    task = make_task(folder, "choice")
    assert (
        0
        < harness.metrics(task, harness.score(task, harness.read(task, None), scorer))["acc"].value
        < 1
    )


@pytest.mark.parametrize("by_size", [True, False])
def test_group_is_put_together_as_in_the_harness(scorer, model, tokenizer, tmp_path, by_size):
    folder = write_harness_tasks(tmp_path / "tasks", by_size)
    task = make_task(folder, "organs")
    predictions = harness.score(task, harness.read(task, None), scorer)
    assert {row["subtask"] for row in predictions} == {"choice", "choice_long"}
    theirs = by_harness(model, tokenizer, folder, "organs")
    found = harness.metrics(task, predictions)
    assert (
        found["paper"].value
        == found["acc"].value
        == pytest.approx(theirs["results"]["organs"]["acc,none"])
    )
    assert found["acc/choice_long"].value == pytest.approx(
        theirs["results"]["choice_long"]["acc,none"]
    )
    assert "acc_norm" not in found  # the group has no rule for it
    parts = [found["acc/choice"], found["acc/choice_long"]]
    weights = [12 / 31, 19 / 31] if by_size else [0.5, 0.5]
    expected = math.sqrt(
        sum((weight * part.stderr) ** 2 for weight, part in zip(weights, parts, strict=True))
    )
    assert found["acc"].stderr == pytest.approx(expected, rel=0.05)


@pytest.mark.shared
@pytest.mark.parametrize("shots", [0, 3])
def test_real_questions_score_as_in_the_harness(
    scorer, model, tokenizer, shared_data, tmp_path, shots
):
    with gzip.open(shared_data / "general_eval" / "arc_easy.jsonl.gz", "rt") as lines:
        (tmp_path / "arc.jsonl").write_text("".join(islice(lines, 20)))
    (tmp_path / "arc.yaml").write_text(REAL.format(file=tmp_path / "arc.jsonl"))
    task = make_task(tmp_path, "arc", num_fewshot=shots)
    predictions = harness.score(task, harness.read(task, None), scorer)
    theirs = by_harness(model, tokenizer, tmp_path, "arc", num_fewshot=shots)
    found = harness.metrics(task, predictions)
    for row, expected in zip(predictions, theirs["samples"]["arc"], strict=True):
        ours = [answer[0] for answer in json.loads(row["outputs"])]
        assert ours == pytest.approx([answers[0][0] for answers in expected["resps"]], abs=2e-3)
    for name in ("acc", "acc_norm"):
        assert found[name].value == pytest.approx(theirs["results"]["arc"][f"{name},none"])
    assert found["paper"].value == found["correct"].value == found["acc_norm"].value


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="task mine needs lm-evaluation-harness: install the extra lm-eval"
    ):
        harness.read(Task("mine", "harness", harness="arc_easy"), None)


def test_a_subset_keeps_documents_and_their_outputs(scorer, folder):
    """Without shots, what a document is answered does not depend on the others."""
    task = make_task(folder, "organs")
    documents = harness.read(task, None)
    every = {row["id"]: row for row in harness.score(task, documents, scorer)}
    some = harness.score(task, subset(documents, 9), scorer)
    assert len(some) == 9
    for row in some:
        assert (
            row["doc"] == every[row["id"]]["doc"]
            and row["prompt_hash"] == every[row["id"]]["prompt_hash"]
        )
        for ours, whole in zip(
            json.loads(row["outputs"]), json.loads(every[row["id"]]["outputs"]), strict=True
        ):
            assert ours == pytest.approx(whole, abs=1e-3)


def test_standard_error_of_what_is_no_mean(scorer, folder):
    """The jackknife against the delta method for a perplexity, and the bootstrap for an F1."""
    from lm_eval.api.metrics import f1_score, perplexity

    values = (-2 - np.random.default_rng(1).random(1000)).tolist()
    numbers = harness._numbers(values, perplexity, perplexity(values))
    assert sum(numbers) / 1000 == pytest.approx(perplexity(values))
    spread = harness.statistics.mean(numbers).stderr
    assert spread == pytest.approx(
        perplexity(values) * harness.statistics.mean(values).stderr, rel=0.15
    )
    pairs = [(index % 2, int(index % 7 < 3)) for index in range(150)]
    found = harness.statistics.mean(harness._numbers(pairs, f1_score, f1_score(pairs))).stderr
    from lm_eval.api.metrics import _bootstrap_internal_no_mp, sample_stddev

    assert found == pytest.approx(
        sample_stddev(_bootstrap_internal_no_mp(f1_score, pairs, 300)), rel=0.2
    )


def test_a_context_that_does_not_fit_is_cut_as_in_the_harness(model, tokenizer, folder):
    short = make_scorer(model, tokenizer, max_length=24)
    task = make_task(folder, "choice")
    predictions = harness.score(task, harness.read(task, None), short)
    assert 0 < harness.counts(predictions)["truncated_prompts"] < len(predictions)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=24)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        own, tasks=["choice"], task_manager=manager, bootstrap_iters=0
    )["samples"]["choice"]
    for row, expected in zip(predictions, theirs, strict=False):
        ours = [answer[0] for answer in json.loads(row["outputs"])]
        assert ours == pytest.approx([answers[0][0] for answers in expected["resps"]], abs=2e-3)


def test_texts_hold_question_and_right_answer(folder):
    assert (
        item_texts(make_task(folder, "choice"), None)[1]
        == "Question: What is number 1 of heart, lung?\nAnswer: bone tissue"
    )
    assert item_texts(make_task(folder, "contexts"), None)[0].endswith("which is part of the body.")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"harness": "choise"}, "has no task 'choise': did you mean choice"),
        ({"harness": "gone"}, "cannot load gone or its data"),
        (
            {"harness": "choice", "metric": "bleu"},
            "metric is 'bleu', but the harness has acc, mcc, acc_norm",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(scorer, tmp_path, task, message):
    folder = write_harness_tasks(tmp_path / "tasks")
    gone = (
        (folder / "choice.yaml")
        .read_text()
        .replace("choice.jsonl", "nowhere.jsonl")
        .replace("task: choice", "task: gone")
    )
    (folder / "gone.yaml").write_text(gone)
    with pytest.raises(ValueError, match=message) as error:
        made = Task("mine", "harness", str(folder), **task)
        harness.metrics(made, harness.score(made, harness.read(made, None), scorer))
    assert "\n" not in str(error.value)


def test_sampling_is_refused(scorer, tmp_path):
    folder = write_harness_tasks(tmp_path / "tasks")
    path = folder / "answers.yaml"
    path.write_text(
        path.read_text().replace(
            "max_gen_toks: 7", "max_gen_toks: 7, do_sample: true, temperature: 0.7"
        )
    )
    task = make_task(folder, "answers")
    with pytest.raises(ValueError, match="answers samples its answers"):
        harness.score(task, harness.read(task, None), scorer)
