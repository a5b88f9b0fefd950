"""Scores and answers of vLLM are those of the Hugging Face backend. One engine with real weights: a
minute or two on two cores.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
from evaluation_cases import DOCUMENTS

from ipt.config import EvaluationConfig
from ipt.evaluation.backends.base import load_backend
from ipt.evaluation.backends.vllm import check_vllm
from ipt.evaluation.task import Task
from ipt.evaluation.task_types import generation, multiple_choice, perplexity
from ipt.evaluation.task_types.generation import Item
from tests.forked_engines import fork_engines

MODEL = "embedded:smollm2-135m"
CONFIG = EvaluationConfig(backend="vllm", max_length=64, batch_tokens=512, add_bos_token=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize": "8bit"}, "evaluation.quantize=8bit: vLLM quantises only"),
        ({"scoring": "tree"}, "evaluation.scoring=tree: vLLM scores each option separately"),
        ({"device": "cuda:1"}, "evaluation.device=cuda:1: vLLM selects its device"),
    ],
)
def test_what_vllm_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_vllm(replace(CONFIG, **change))


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_vllm_scores_and_answers_as_the_hugging_face_backend(request, questions, monkeypatch):
    fork_engines(request, monkeypatch)
    documents = [
        perplexity.ScoredDocument(str(number), text)
        for number, text in enumerate([*DOCUMENTS, " ".join(DOCUMENTS) * 3])
    ]
    items = [
        Item(str(number), text, "")
        for number, text in enumerate(
            ["The heart is", "Question: What is a nerve?\nAnswer:", "1, 2, 3,"]
        )
    ]
    choose, predict = Task("choose", "choice", "x"), Task("predict", "perplexity", "x")
    answer = Task("answer", "generation", "x", stop=["\n", "."], max_new_tokens=12)
    found, environment = {}, dict(os.environ)
    for name in ("vllm", "hf"):
        with load_backend(replace(CONFIG, backend=name), MODEL) as backend:
            assert backend.encoder.max_length == 64
            found[name] = (
                multiple_choice.score(choose, questions, backend),
                perplexity.score(predict, documents, backend),
                generation.score(answer, items, backend),
            )
    # library preloads and thread settings do not leak into later stages
    assert dict(os.environ) == environment
    (choices, likelihoods, answers), (expected_choices, expected_likelihoods, expected_answers) = (
        found["vllm"],
        found["hf"],
    )
    assert expected_likelihoods[-1]["windows"] > 1, "the fixture must have a document in windows"
    assert {row["finish"] for row in expected_answers} == {"stop", "length"}, (
        "the fixture must stop and be cut"
    )
    for row, expected in zip(choices, expected_choices, strict=True):
        np.testing.assert_allclose(row["sums"], expected["sums"], atol=1e-2)
        assert row["tokens"] == expected["tokens"]
    for row, expected in zip(likelihoods, expected_likelihoods, strict=True):
        assert row["nll"] == pytest.approx(expected["nll"], abs=0.05)
        assert {key: row[key] for key in row if key != "nll"} == {
            key: expected[key] for key in row if key != "nll"
        }
    assert answers == expected_answers
