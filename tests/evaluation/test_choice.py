import math

import pytest
from evaluation_cases import TASK

from ipt.evaluation import choice
from ipt.evaluation.choice import Question


def prediction(sums, tokens, n_bytes, gold):
    return {
        "gold": gold,
        "scores": [total / n for total, n in zip(sums, tokens, strict=True)],
        "sums": sums,
        "per_byte": [total / n for total, n in zip(sums, n_bytes, strict=True)],
        "tokens": tokens,
        "truncated": False,
    }


PREDICTIONS = [
    prediction([-4.0, -3.0], [4, 1], [10, 4], 0),  # right by the mean (-1 against -3), wrong by the sum
    prediction([-2.0, -6.0], [1, 4], [4, 8], 1),  # right by the mean (-1.5 against -2), wrong by the sum
    prediction([-1.0, -9.0], [1, 3], [2, 9], 1),  # wrong both ways
    prediction([-1.0, -9.0], [1, 3], [2, 9], 0),  # right both ways
]


def test_metrics_by_hand():
    found = choice.metrics(TASK, PREDICTIONS)
    assert list(found) == ["accuracy", "accuracy_sum", "logprob", "probability", "bits_per_byte"]
    assert found["accuracy"].value == 3 / 4 and found["accuracy_sum"].value == 1 / 4
    assert found["logprob"].value == pytest.approx((-1 - 1.5 - 3 - 1) / 4)
    sigmoid = [1 / (1 + math.exp(-margin)) for margin in (2, 0.5, -2, 2)]
    assert found["probability"].value == pytest.approx(sum(sigmoid) / 4)
    assert found["bits_per_byte"].value == pytest.approx((4 / 10 + 6 / 8 + 9 / 9 + 1 / 2) / 4 / math.log(2))
    assert {metric.n for metric in found.values()} == {4}


def test_predictions_hold_what_the_metrics_need(scorer, questions):
    found = choice.score(TASK, questions, scorer)
    assert [set(row) for row in found] == [set(choice.SCHEMA.names)] * len(questions)
    for row, question in zip(found, questions, strict=True):
        whole = [scorer.encoder.tokenizer(question.prompt + option)["input_ids"] for option in question.options]
        shared = len(scorer.encoder.question(question.prompt, question.options).prompt)
        assert row["tokens"] == [len(ids) - shared for ids in whole]
        assert row["scores"] == [total / n for total, n in zip(row["sums"], row["tokens"], strict=True)]
        sizes = [len(option.encode()) for option in question.options]
        assert row["per_byte"] == [total / n for total, n in zip(row["sums"], sizes, strict=True)]


def test_prompt_hash_covers_prompt_and_options():
    question = Question("a", "p", [" x", " y"], 0)
    assert question.prompt_hash == question._replace(id="b", gold=1).prompt_hash
    others = [question._replace(prompt="q"), question._replace(options=[" y", " x"]), question._replace(options=[" x y"])]
    assert len({other.prompt_hash for other in others} | {question.prompt_hash}) == 4


def test_truncated_prompts_are_counted():
    assert choice.counts([*PREDICTIONS, {**PREDICTIONS[0], "truncated": True}]) == {"truncated_prompts": 1}
