"""Which figures stand for a task in the report and in a sweep's table."""

import json

from ipt.pipeline.commands import main_scores_of
from ipt.report.measures import measure_of
from ipt.report.scores import Score, main_scores


def scores(**values):
    return [
        Score("arm", "task", metric, value, None, None, None, 10, None)
        for metric, value in values.items()
    ]


def chosen(**values):
    return [metric for _, metric in main_scores(scores(**values))]


def test_accuracy_goes_by_its_name_and_other_scores_as_what_is_correct():
    assert chosen(paper=0.5, correct=0.5, accuracy=0.5, logprob=-1.0) == ["accuracy", "logprob"]
    assert chosen(paper=0.5, correct=0.3, accuracy=0.5, logprob=-1.0) == ["correct", "logprob"]
    assert chosen(paper=0.5, correct=0.3) == ["correct"]
    assert chosen(nll=2.0, perplexity=7.0, bits_per_byte=1.0) == ["bits_per_byte"]


def test_how_metrics_read():
    assert measure_of("correct_clean").better == 1 and measure_of("paper").percent
    assert (
        measure_of("contaminated").better == 0 and measure_of("contaminated").show(0.125) == "12.5%"
    )


def test_one_figure_a_task_in_a_sweep(tmp_path):
    results = {
        "choice": {"paper": {"value": 0.5}, "correct": {"value": 0.5}, "logprob": {"value": -1.0}},
        "generation": {"paper": {"value": 0.4}, "correct": {"value": 0.2}},
        "perplexity": {"nll": {"value": 2.0}, "perplexity": {"value": 7.4}},
        "other": {"similarity": {"value": 0.1}},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main_scores_of(tmp_path) == {
        "choice logprob": -1.0,
        "generation correct": 0.2,
        "perplexity nll": 2.0,
        "other similarity": 0.1,
    }
