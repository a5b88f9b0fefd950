"""Tables, averages and comparisons of finished evaluations."""

import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ipt.evaluation.__main__ import main
from ipt.evaluation.results import (
    average,
    group_average,
    groups_of,
    load_results,
    main_metrics,
    predictions_path,
    read_predictions,
)
from ipt.evaluation.tables import markdown, scores_table
from ipt.evaluation.task import load_tasks
from ipt.files import write_json, write_parquet


def entry(value, stderr=0.02, n=100):
    return {
        "value": value,
        "stderr": stderr,
        "ci95": [value - 2 * stderr, value + 2 * stderr],
        "n": n,
    }


@pytest.fixture
def published(tmp_path):
    """An evaluation on all tasks of the paper, with figures that are made up."""
    results = {}
    for number, task in enumerate(load_tasks(["all"])):
        results[task.name] = {
            "paper": entry(0.5 + number / 100),
            "correct": entry(0.4 + number / 100),
            "logprob": entry(-2.0 - number),
        }
        schema = pa.schema([("id", pa.string())]).with_metadata(
            {"task": json.dumps(task.definition)}
        )
        write_parquet(predictions_path(tmp_path, task.name), [], schema)
    write_json(tmp_path / "results.json", results)
    return tmp_path


@pytest.fixture
def seeds(evaluated, tmp_path):
    """Three runs of one recipe on two tasks: their scores apart by a number of the run and one of
    each item.
    """
    random = np.random.default_rng(0)
    shifts = random.normal(size=(3, 1)) + random.normal(size=(3, 4)) / 10
    for seed in range(3):
        folder = shutil.copytree(evaluated[0], tmp_path / f"seed-{seed}")
        path = predictions_path(folder, "is_a_recall")
        rows = read_predictions(folder, "is_a_recall")
        for row, shift in zip(rows, shifts[seed], strict=True):
            row["scores"] = [score + shift for score in row["scores"]]
        write_parquet(path, rows, pq.read_schema(path))
    return [tmp_path / f"seed-{seed}" for seed in range(3)]


def shown(view, width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def logprobs(folder):
    rows = read_predictions(folder, "is_a_recall")
    expected = load_results(folder)["is_a_recall"]["logprob"]["n"]
    assert len(rows) == expected
    return np.array([row["scores"][row["right"][0]] for row in rows])


def test_average_over_seeds_by_hand(seeds):
    values = np.array([logprobs(folder) for folder in seeds])  # (seeds, items)
    found = average(seeds)["is_a_recall"]["logprob"]
    assert found["value"] == pytest.approx(values.mean())
    assert found["spread"] == pytest.approx(values.mean(axis=1).std(ddof=1))
    of_items = values.mean(axis=0)  # an item is asked three times, and is one item all the same
    assert found["stderr"] == pytest.approx(of_items.std(ddof=1) / 2)
    assert (found["n"], found["runs"]) == (4, 3)
    assert average(seeds[:1])["is_a_recall"]["logprob"]["spread"] is None


def test_average_over_late_scores_of_several_runs(seeds, tmp_path):
    """Within a run first: its spread is that of runs, not of checkpoints."""
    runs = [tmp_path / "run-0", tmp_path / "run-1"]
    for run, members in zip(runs, ((seeds[0], seeds[1]), (seeds[1], seeds[2])), strict=True):
        for step, folder in enumerate(members):
            shutil.copytree(folder, run / "scores" / f"step-{step:08d}")
    means = [logprobs(folder).mean() for folder in seeds]
    of_runs = [(means[0] + means[1]) / 2, (means[1] + means[2]) / 2]
    found = average(runs)["is_a_recall"]["logprob"]
    assert found["value"] == pytest.approx(sum(of_runs) / 2)
    assert found["spread"] == pytest.approx(abs(of_runs[0] - of_runs[1]) / math.sqrt(2))
    newest = average(runs, last=1)["is_a_recall"]["logprob"]
    assert newest["value"] == pytest.approx((means[1] + means[2]) / 2)


def test_averages_of_groups():
    results = {
        "a": {"paper": entry(0.5, 0.03)},
        "b": {"paper": entry(0.7, 0.04, n=50), "correct": entry(0.1)},
    }
    found = group_average(results, ["a", "b"], "paper")
    assert found["value"] == pytest.approx(0.6)
    assert found["stderr"] == pytest.approx(0.025)
    assert found["n"] == 150
    assert group_average(results, ["a", "b"], "correct") is None
    alone = group_average(
        {"a": {"paper": {**entry(0.5), "stderr": None}}, "b": results["b"]}, ["a", "b"], "paper"
    )
    assert alone["value"] == pytest.approx(0.6) and alone["stderr"] is None


def test_groups_that_are_there_whole(tmp_path):
    assert "ontology" in groups_of(task.name for task in load_tasks(["ontology"]))
    assert "ontology" not in groups_of(["is_a_recall", "held_out_perplexity"])
    (tmp_path / "own.yaml").write_text("tasks: [is_a_recall, is_a_generalisation]\n")
    assert groups_of(["is_a_recall", "is_a_generalisation"], [str(tmp_path / "own.yaml")]) == {
        "own": ["is_a_recall", "is_a_generalisation"]
    }


def test_main_metrics():
    assert main_metrics(["accuracy", "bits_per_byte", "correct", "logprob", "paper"]) == [
        "paper",
        "correct",
        "logprob",
    ]
    assert main_metrics(["nll", "perplexity", "bits_per_byte"]) == ["perplexity", "bits_per_byte"]
    assert main_metrics(["similarity", "length"]) == ["similarity"]


def test_markdown_shows_published_figures_and_averages_as_the_paper_does(published):
    lines = markdown(published, "A model").splitlines()
    (header,) = [line for line in lines if "Instruct PT-8B (published)" in line]
    column = header.split(" | ").index("Instruct PT-8B (published)")
    (medicine,) = [line.split(" | ") for line in lines if "average of medicine" in line]
    assert medicine[column].strip("| ") == "61.3"  # Table 3
    assert medicine[:4] == ["| **average of medicine**", "5 tasks", "52.0 ±0.9", "42.0 ±0.9"]
    (chemprot,) = [line for line in lines if line.startswith("| chemprot | 100")]
    assert chemprot.startswith("| chemprot | 100 | 51.0 ±2.0 | 41.0 ±2.0 |")
    assert chemprot.split(" | ")[column].strip("| ") == "47.2"
    assert "| chemprot | logprob | -3.000 ±0.020 | -3.040 to -2.960 | 100 |" in lines
    widths = {
        len(line.split(" | ")) for line in lines[lines.index(header) : lines.index(header) + 5]
    }
    assert len(widths) == 1


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("models", [1, 3])
def test_tables_of_many_tasks_fit(published, width, models):
    results = load_results(published)
    text = shown(scores_table({f"model-{number}": results for number in range(models)}), width)
    assert max(map(len, text.splitlines())) <= width
    for task in results:
        assert task in text
    assert text.count("±") >= 3 * models * len(results)  # no figure is cut
    assert "average of" in text and "medicine" in text


def test_the_published_rule_is_shown_where_it_says_something_else(published):
    results = load_results(published)
    assert "paper ↑" in shown(scores_table({"a": results}), 80)
    for metrics in results.values():
        metrics["paper"] = metrics["correct"]
    assert "paper ↑" not in shown(scores_table({"a": results}), 80)


def test_commands(seeds, capsys):
    first, second = map(str, seeds[:2])
    main(["table", first, second])
    assert "seed-0" in capsys.readouterr().out
    main(["compare", first, second])
    out = capsys.readouterr().out
    assert "difference" in out and "is_a_recall" in out
    main(["average", "--json", first, second])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(average(seeds[:2])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["table", "nowhere"],
            "error: .*nowhere is not a finished evaluation: it has no results.json",
        ),
        (["average", "nowhere", "--last", "0"], "error: --last is 0, expected 1 or more"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)
