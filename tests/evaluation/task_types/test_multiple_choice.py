import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import TASK, make_scorer

from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types import multiple_choice
from ipt.evaluation.task_types.multiple_choice import Question


def prediction(sums, tokens, n_bytes, *right, published=None, unconditional=None, group=None):
    return {
        "gold": right[0],
        "right": list(right),
        "group": group,
        "scores": [total / n for total, n in zip(sums, tokens, strict=True)],
        "published": published or [total / n for total, n in zip(sums, tokens, strict=True)],
        "sums": sums,
        "per_byte": [total / n for total, n in zip(sums, n_bytes, strict=True)],
        "unconditional": unconditional,
        "tokens": tokens,
        "truncated": False,
    }


PREDICTIONS = [
    # right by the mean (-1 against -3) and by bytes (-0.4, -0.75), wrong by the sum
    prediction([-4.0, -3.0], [4, 1], [10, 4], 0),
    # right by the mean (-1.5 against -2), wrong by bytes (-0.5, -0.75) and the sum
    prediction([-2.0, -6.0], [1, 4], [4, 8], 1),
    prediction([-1.0, -9.0], [1, 3], [2, 9], 1),  # wrong in every way
    prediction([-1.0, -9.0], [1, 3], [2, 9], 0),  # right in every way
]


def answering(chosen, *right, group=None):
    """Of three options the model finds `chosen` the likeliest."""
    sums = [-2.0, -2.0, -2.0]
    sums[chosen] = -1.0
    return prediction(sums, [1, 1, 1], [1, 1, 1], *right, group=group)


def test_metrics_by_hand():
    found = multiple_choice.metrics(TASK, PREDICTIONS)
    names = [
        "paper",
        "correct",
        "accuracy",
        "accuracy_sum",
        "accuracy_bytes",
        "logprob",
        "probability",
        "bits_per_byte",
    ]
    assert list(found) == names
    assert found["paper"].value == found["correct"].value == found["accuracy"].value == 3 / 4
    assert found["accuracy_sum"].value == 1 / 4 and found["accuracy_bytes"].value == 2 / 4
    assert found["logprob"].value == pytest.approx((-1 - 1.5 - 3 - 1) / 4)
    sigmoid = [1 / (1 + math.exp(-margin)) for margin in (2, 0.5, -2, 2)]
    assert found["probability"].value == pytest.approx(sum(sigmoid) / 4)
    assert found["bits_per_byte"].value == pytest.approx(
        (4 / 10 + 6 / 8 + 9 / 9 + 1 / 2) / 4 / math.log(2)
    )
    assert {metric.n for metric in found.values()} == {4}


def test_several_right_options_by_hand():
    found = multiple_choice.metrics(
        replace(TASK, metric="multi_label"),
        [answering(2, 0, 2), answering(1, 0, 2), answering(1, 1)],
    )
    # one of the right options is enough
    assert found["paper"].value == found["accuracy"].value == pytest.approx(2 / 3)
    # micro-F1: 2 hits, 3 answers, 5 labels
    assert found["correct"].value == pytest.approx(2 * 2 / (3 + 5))
    assert found["logprob"].value == pytest.approx(((-2 - 1) / 2 + (-2 - 2) / 2 + -1) / 3)
    weights = np.exp([-1.0, -2.0, -2.0])
    assert found["probability"].value == pytest.approx(
        (weights[0] + weights[1] + 2 * weights[1] + weights[0]) / weights.sum() / 3
    )


def test_the_paper_counts_tokens_in_its_own_way():
    row = prediction([-4.0, -3.0], [4, 1], [10, 4], 0, published=[-4.0, -3.0])
    found = multiple_choice.metrics(TASK, [row])
    assert (found["paper"].value, found["correct"].value) == (0.0, 1.0)


def test_ties_go_to_the_first_option():
    tied = prediction([-1.0, -1.0, -2.0], [1, 1, 1], [1, 1, 1], 0)
    assert multiple_choice.metrics(TASK, [tied])["paper"].value == 1.0
    assert multiple_choice.metrics(TASK, [{**tied, "right": [1]}])["paper"].value == 0.0


def test_what_an_option_gains_over_saying_nothing():
    # likely in any case: the second
    row = prediction([-3.0, -2.0], [1, 1], [1, 1], 0, unconditional=[-9.0, -1.0])
    assert multiple_choice.metrics(TASK, [row])["accuracy_unconditional"].value == 1.0
    assert multiple_choice.metrics(TASK, [row])["accuracy"].value == 0.0


@pytest.mark.parametrize("metric", ["macro_f1", "weighted_f1"])
def test_f1_of_groups_is_the_mean_over_groups(metric):
    sklearn = pytest.importorskip("sklearn.metrics")
    answers, gold = np.random.default_rng(0).integers(0, 3, (2, 90))
    groups = ["a"] * 60 + ["b"] * 30
    rows = [
        answering(answer, right, group=group)
        for answer, right, group in zip(answers, gold, groups, strict=True)
    ]
    parts = [
        sklearn.f1_score(gold[part], answers[part], average=metric.removesuffix("_f1"))
        for part in (slice(60), slice(60, 90))
    ]
    found = multiple_choice.metrics(replace(TASK, metric=metric, group="class_id"), rows)
    assert found["paper"].value == found["correct"].value == pytest.approx(np.mean(parts))
    alone = multiple_choice.metrics(replace(TASK, metric=metric), rows)["paper"].value
    assert alone == pytest.approx(
        sklearn.f1_score(gold, answers, average=metric.removesuffix("_f1"))
    )
    assert alone != pytest.approx(np.mean(parts))


def test_micro_f1_of_single_labels_is_accuracy():
    rows = [answering(0, 0), answering(1, 0), answering(2, 2)]
    assert multiple_choice.metrics(replace(TASK, metric="micro_f1"), rows)[
        "paper"
    ].value == pytest.approx(2 / 3)


# Scoring
# ----------------------------------------------------------------------------------------------


def test_predictions_hold_what_the_metrics_need(scorer, questions):
    found = multiple_choice.score(TASK, questions, scorer)
    assert [set(row) for row in found] == [set(multiple_choice.SCHEMA.names)] * len(questions)
    for row, question in zip(found, questions, strict=True):
        whole = [
            scorer.encoder.tokenizer(question.prompt + option)["input_ids"]
            for option in question.options
        ]
        shared = len(scorer.encoder.question(question.prompt, question.options).prompt)
        assert row["tokens"] == [len(ids) - shared for ids in whole]
        assert row["scores"] == [
            total / n for total, n in zip(row["sums"], row["tokens"], strict=True)
        ]
        sizes = [len(option.encode()) for option in question.options]
        assert row["per_byte"] == [total / n for total, n in zip(row["sums"], sizes, strict=True)]
        assert row["right"] == [row["gold"]] and row["unconditional"] is None


@torch.no_grad()
def released(scorer, prompt, option):
    """The published rule: of the whole's tokens the last so many as it has more than the prompt
    alone. None: it has no more.
    """
    before, whole = (
        scorer.encoder.tokenizer(text)["input_ids"] for text in (prompt, prompt + option)
    )
    logprobs = scorer.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    taken = range(len(before), len(whole))
    return (
        sum(float(logprobs[place - 1, whole[place]]) for place in taken) / len(taken)
        if taken
        else None
    )


def test_the_published_rule(scorer, questions):
    found = multiple_choice.score(TASK, questions, scorer)
    for row, question in zip(found, questions, strict=True):
        expected = [released(scorer, question.prompt, option) for option in question.options]
        # Where nothing is left to the rule, all tokens that the option adds or changes are scored.
        expected = [
            row["scores"][place] if value is None else value for place, value in enumerate(expected)
        ]
        assert row["published"] == pytest.approx(expected, abs=1e-4)
    straddling = found[2]  # "The thy" + "mus": the border falls inside a token
    assert straddling["published"] != pytest.approx(straddling["scores"], abs=1e-2), (
        "the case is not exercised"
    )


def test_options_with_prompts_of_their_own(scorer):
    contexts = (
        "The court held the first. So",
        "The court held, after much, the second. So",
        "The jury",
    )
    question = Question("a", "A case. ", [" it is law."] * 3, 1, contexts=contexts)
    assert question.text == "A case. The court held, after much, the second. So it is law."
    assert len({question.prompt_hash, question._replace(contexts=contexts[::-1]).prompt_hash}) == 2
    encoded = scorer.encoder.question(question.prompts, question.options)
    assert len(scorer.option_rows(encoded)) == 1, "they share a row"
    (row,) = multiple_choice.score(TASK, [question], scorer)
    expected = [released(scorer, "A case. " + context, " it is law.") for context in contexts]
    assert row["published"] == pytest.approx(expected, abs=1e-4) and len(set(row["tokens"])) == 1
    (cut,) = multiple_choice.score(
        TASK, [question], make_scorer(scorer.model, scorer.encoder.tokenizer, max_length=9)
    )
    assert cut["truncated"] and cut["tokens"] == row["tokens"]


def test_saying_nothing_is_scored_once_for_each_option(scorer):
    questions = [
        Question(str(n), f"Question {n}?\nAnswer:", [" yes", " no"], 0, unconditional="Answer:")
        for n in range(3)
    ]
    asked = []

    class Counting:
        encoder, option_rows = scorer.encoder, scorer.option_rows

        def logprobs(self, rows, description):
            asked.append(len(rows))
            return scorer.logprobs(rows, description)

    for row in multiple_choice.score(TASK, questions, Counting()):
        assert row["unconditional"] == pytest.approx(
            [released(scorer, "Answer:", option) for option in (" yes", " no")], abs=1e-4
        )
    assert asked == [3 + 2]


def test_prompt_hash_covers_prompt_and_options():
    question = Question("a", "p", [" x", " y"], 0)
    assert question.prompt_hash == question._replace(id="b", gold=1).prompt_hash
    others = [
        question._replace(prompt="q"),
        question._replace(options=[" y", " x"]),
        question._replace(options=[" x y"]),
    ]
    others.append(question._replace(unconditional="q"))
    assert len({other.prompt_hash for other in others} | {question.prompt_hash}) == 5


def test_truncated_prompts_are_counted():
    assert multiple_choice.counts([*PREDICTIONS, {**PREDICTIONS[0], "truncated": True}]) == {
        "truncated_prompts": 1
    }


# Reading
# ----------------------------------------------------------------------------------------------


def read(folder, rows, **keys):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(json.dumps({"kind": "choice", "data": "x.jsonl", **keys}))
    return multiple_choice.read(load_tasks([str(folder / "mine.yaml")])[0], None)


GOOD = {"prompt": "p", "options": ["x", "y", "z"], "gold": 0}


def test_several_right_options_are_read(tmp_path):
    rows = [{**GOOD, "gold": ["z", "x"]}, {**GOOD, "gold": ["y"]}]
    several, one = read(tmp_path, rows, metric="multi_label")
    assert (several.gold, several.right) == (2, (2, 0)) and (one.gold, one.right) == (1, ())


def test_the_form_of_casehold_is_read(tmp_path):
    rows = [{"inputs": ["first: ", "second: "], "output": "same", "gold": 1, "kind": 3}]
    (question,) = read(
        tmp_path,
        rows,
        prompt="{{ option }}",
        options="inputs",
        option="{{ output }}",
        group="kind",
        unconditional="So:",
    )
    assert question.prompts == ["first: ", "second: "] and question.options == ["same", "same"]
    assert question.text == "second: same" and (question.group, question.unconditional) == (
        "3",
        "So:",
    )


def test_a_field_called_option_is_no_option(tmp_path):
    (question,) = read(tmp_path, [{**GOOD, "option": "of the row"}], prompt="{{ option }}:")
    assert question.prompts == "of the row:"


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            {},
            {"metric": "f1"},
            r"task mine: metric is 'f1', expected accuracy or micro_f1 or macro_f1 or weighted_f1 "
            r"or multi_label",
        ),
        (
            {"options": ["y", "x", "z"]},
            {"metric": "macro_f1"},
            r"task mine: metric macro_f1 needs the same options for all items, but item 1",
        ),
        (
            {"gold": [0, 1]},
            {"metric": "weighted_f1"},
            r"task mine: item 1 has several right options: replace metric \w+ by multi_label",
        ),
        (
            {"gold": [0, 3]},
            {},
            r"x.jsonl line 2: field gold is \[0, 3\], expected an index from 0 to 2 or the text "
            r"of an option",
        ),
        (
            {},
            {"group": "class_id"},
            r"x.jsonl line 1: there is no field class_id, which the task's key `group` names",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, change, keys, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [GOOD, {**GOOD, **change}], **keys)
