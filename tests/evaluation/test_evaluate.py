import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from ipt.config import EvaluationConfig
from ipt.evaluation.backends import huggingface as scorer_module
from ipt.evaluation.results import compare, load_results, read_predictions
from ipt.evaluation.run import check_tasks, evaluate
from ipt.evaluation.tables import table
from ipt.evaluation.task_types.multiple_choice import SCHEMA
from ipt.files import note_hash, write_parquet
from ipt.models import load_model, load_tokenizer

TASKS = ["ontology"]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory, tiny_model):
    """A second model to compare with: the tiny one after a push."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    model = load_model(tiny_model, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


def run(model, corpus, output, tasks=TASKS, **config):
    return evaluate(EvaluationConfig(**config), model, tasks, corpus, output)


def test_results_predictions_and_statistics(evaluated):
    folder, statistics = evaluated
    json.dumps(statistics)
    results = load_results(folder)
    assert list(results) == list(statistics["tasks"])
    assert statistics["items"] == 20 and all(
        not entry["reused"] for entry in statistics["tasks"].values()
    )
    assert set(results["is_a_recall"]) >= {
        "paper",
        "correct",
        "accuracy",
        "logprob",
        "probability",
        "bits_per_byte",
    }
    assert set(results["held_out_perplexity"]) == {"nll", "perplexity", "bits_per_byte"}
    for scores in results.values():
        for entry in scores.values():
            assert set(entry) == {"value", "stderr", "ci95", "n"}
            assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    written = pq.read_table(folder / "predictions" / "is_a_recall.parquet")
    assert written.schema.remove_metadata() == SCHEMA
    assert written["id"].to_pylist() == [f"is_a-recall-{number}" for number in range(4)]


def test_a_finished_task_is_not_scored_again(evaluated, tiny_model, corpus, tmp_path, monkeypatch):
    output = shutil.copytree(evaluated[0], tmp_path / "out")
    whole = load_results(output)
    (output / "results.json").unlink()
    (output / "predictions" / "is_a_recall.parquet").unlink()
    # As if the run had died after writing others of these figures, so that reuse shows.
    marked = [
        {**row, "scores": [0.0, -1.0, -1.0, -1.0]}
        for row in read_predictions(output, "definition_to_term_recall")
    ]
    kept = pq.read_schema(output / "predictions" / "definition_to_term_recall.parquet")
    write_parquet(output / "predictions" / "definition_to_term_recall.parquet", marked, kept)
    statistics = run(tiny_model, corpus, output)
    assert [name for name, entry in statistics["tasks"].items() if not entry["reused"]] == [
        "is_a_recall"
    ]
    assert load_results(output)["is_a_recall"]["logprob"]["value"] == pytest.approx(
        whole["is_a_recall"]["logprob"]["value"], abs=1e-5
    )
    assert load_results(output)["definition_to_term_recall"] != whole["definition_to_term_recall"]
    # Nothing left to score: the model is not even loaded.
    monkeypatch.setattr(
        scorer_module, "load_scorer", lambda *_: pytest.fail("the model was loaded")
    )
    run(tiny_model, corpus, output)


def test_damaged_predictions_are_scored_anew(evaluated, tiny_model, corpus, tmp_path):
    output = shutil.copytree(evaluated[0], tmp_path / "out")
    file = output / "predictions" / "is_a_recall.parquet"
    note_hash(file)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    statistics = run(tiny_model, corpus, output)
    assert [name for name, entry in statistics["tasks"].items() if not entry["reused"]] == [
        "is_a_recall"
    ]
    assert [path.name for path in output.rglob(".*")] == []  # no note is left


def test_predictions_of_other_items_are_scored_anew(tiny_model, corpus, tmp_path):
    run(tiny_model, corpus, tmp_path / "out", ["is_a_recall"], limit=2)
    statistics = run(tiny_model, corpus, tmp_path / "out", ["is_a_recall"], limit=3)
    assert statistics["tasks"]["is_a_recall"] == {
        **statistics["tasks"]["is_a_recall"],
        "items": 3,
        "reused": False,
    }
    assert len(read_predictions(tmp_path / "out", "is_a_recall")) == 3


def test_one_item_has_a_value_and_no_spread(tiny_model, corpus, tmp_path):
    run(tiny_model, corpus, tmp_path / "out", ["is_a_recall"], limit=1)
    entry = load_results(tmp_path / "out")["is_a_recall"]["logprob"]
    assert entry["n"] == 1 and entry["stderr"] is None and entry["ci95"] == [None, None]
    assert "is_a_recall" in shown({"one": tmp_path / "out"})


def test_two_models_are_compared_on_the_same_items(evaluated, other_model, corpus, tmp_path):
    first, second = evaluated[0], tmp_path / "b"
    run(other_model, corpus, second, ["is_a_recall", "held_out_perplexity"])
    found = compare(first, second)
    assert list(found) == ["is_a_recall", "held_out_perplexity"]
    for task, metrics in found.items():
        for metric, entry in metrics.items():
            values = [load_results(folder)[task][metric]["value"] for folder in (first, second)]
            assert entry["difference"] == pytest.approx(values[0] - values[1])
            assert set(entry) == {"difference", "stderr", "ci95", "p", "n"} and entry["n"] == 4
    # By hand, from the predictions: mean and spread of the differences between the right answers'
    # scores.
    pairs = zip(
        read_predictions(first, "is_a_recall"), read_predictions(second, "is_a_recall"), strict=True
    )
    differences = torch.tensor(
        [a["scores"][a["gold"]] - b["scores"][b["gold"]] for a, b in pairs], dtype=torch.float64
    )
    assert found["is_a_recall"]["logprob"]["stderr"] == pytest.approx(float(differences.std()) / 2)
    with_itself = compare(first, first)["is_a_recall"]["logprob"]
    assert (with_itself["difference"], with_itself["stderr"], with_itself["p"]) == (0.0, 0.0, 1.0)


def rewritten(folder, output, change):
    """A copy of an evaluation that has the task is_a_recall only, its predictions changed."""
    results = {"is_a_recall": load_results(folder)["is_a_recall"]}
    path = output / "predictions" / "is_a_recall.parquet"
    write_parquet(
        path,
        change(read_predictions(folder, "is_a_recall")),
        pq.read_schema(folder / "predictions" / "is_a_recall.parquet"),
    )
    (output / "results.json").write_text(json.dumps(results))
    return output


def test_only_common_items_are_compared(evaluated, tmp_path):
    fewer = rewritten(evaluated[0], tmp_path / "fewer", lambda rows: rows[2:])
    assert compare(fewer, evaluated[0])["is_a_recall"]["accuracy"]["n"] == 2


def test_what_cannot_be_compared(evaluated, tmp_path):
    folder = evaluated[0]
    other_task = rewritten(folder, tmp_path / "task", lambda rows: rows)
    (other_task / "results.json").write_text(json.dumps({"other": {}}))
    with pytest.raises(ValueError, match="have no task in common"):
        compare(folder, other_task)
    other_ids = rewritten(
        folder, tmp_path / "ids", lambda rows: [{**row, "id": row["id"] + "x"} for row in rows]
    )
    with pytest.raises(ValueError, match=r"task is_a_recall: .* have no item in common"):
        compare(folder, other_ids)
    other_items = rewritten(
        folder, tmp_path / "items", lambda rows: [{**row, "prompt_hash": "0"} for row in rows]
    )
    with pytest.raises(ValueError, match="task is_a_recall: item is_a-recall-0 differs between"):
        compare(folder, other_items)
    with pytest.raises(FileNotFoundError, match=r"it has no results.json"):
        compare(folder, tmp_path / "nowhere")


def shown(results):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(results))
    return captured.get()


def test_the_table_fits_a_hundred_columns(evaluated, tmp_path):
    folder = evaluated[0]
    fewer = rewritten(folder, tmp_path / "fewer", lambda rows: rows)
    text = shown({"start": folder, "vanilla": folder, "attached": folder, "detached": fewer})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = [line for line in lines if "perplexity ↓" in line]
    value = load_results(folder)["held_out_perplexity"]["perplexity"]["value"]
    assert row.count(f"{value:.0f} ±") == 3 and "–" in row
    assert "definition_to_term_generalisation" in shown({"start": folder})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dtype": "fp8"}, r"evaluation.dtype=fp8: must be one of float32, bfloat16, float16"),
        ({"quantize": "2bit"}, r"evaluation.quantize=2bit: must be one of null, 4bit, 8bit"),
        ({"scoring": "fast"}, r"evaluation.scoring=fast: must be one of auto, tree, plain"),
        ({"batch_tokens": 0}, r"evaluation.batch_tokens is 0, expected 1 or more"),
        ({"limit": 0}, r"evaluation.limit is 0"),
        ({"max_length": 1}, r"evaluation.max_length is 1, expected 2 or more"),
        ({"device": "gpu"}, r"evaluation.device is 'gpu', expected auto, cpu"),
    ],
)
def test_bad_values_are_named_before_anything_loads(config, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(EvaluationConfig(**config), TASKS)


def test_tasks_are_checked_without_a_model(corpus, tmp_path):
    assert len(check_tasks(EvaluationConfig(), TASKS)) == 5
    assert len(check_tasks(EvaluationConfig(), TASKS, corpus)) == 5
    (tmp_path / "own.yaml").write_text("kind: choice\ndata: own.jsonl\n")
    with pytest.raises(FileNotFoundError, match=r"task own: data file .*own.jsonl does not exist"):
        check_tasks(EvaluationConfig(), [str(tmp_path / "own.yaml")])


def test_no_model_is_loaded_for_bad_inputs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scorer_module, "load_scorer", lambda *_: pytest.fail("the model was loaded")
    )
    with pytest.raises(
        ValueError, match=r"reads questions.jsonl of a corpus, but no corpus is given"
    ):
        run(tiny_model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown embedded model"):
        run("embedded:large", None, tmp_path / "out")


def test_real_weights_know_what_a_heart_does(tmp_path):
    """SmolLM2-135M as it is: three questions that it gets right, so that a scorer that is subtly
    wrong shows.
    """
    questions = [
        ("The capital of France is", [" Berlin", " Paris", " Madrid"], 1),
        (
            "Question: What pumps blood through the body?\nAnswer:",
            [" the heart", " the fingernails", " the hair"],
            0,
        ),
        ("Water is made of hydrogen and", [" sugar", " iron", " oxygen"], 2),
    ]
    rows = [
        {"prompt": prompt, "options": options, "gold": gold} for prompt, options, gold in questions
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("kind: choice\ndata: own.jsonl\n")
    run("embedded:smollm2-135m", None, tmp_path / "out", [str(tmp_path / "own.yaml")])
    scores = load_results(tmp_path / "out")["own"]
    assert scores["accuracy"]["value"] == 1.0
    assert scores["logprob"]["value"] > -4.0
