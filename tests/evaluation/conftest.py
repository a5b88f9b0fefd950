import json

import pyarrow as pa
import pytest
import torch
from evaluation_cases import DOCUMENTS, make_scorer, opinionated

from ipt.config import EvaluationConfig
from ipt.evaluation.run import evaluate
from ipt.evaluation.task_types.multiple_choice import Question
from ipt.files import write_parquet
from ipt.models import load_model, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("embedded:tiny")


@pytest.fixture(scope="session")
def model():
    """The tiny random Llama with larger weights, so that what a token sees moves its
    log-probabilities by whole nats.
    """
    return opinionated(load_model("embedded:tiny", torch.float32))


@pytest.fixture(scope="session")
def scorer(model, tokenizer):
    return make_scorer(model, tokenizer)


@pytest.fixture(scope="session")
def questions():
    """Different lengths of prompts and options, options that begin alike, and options of one
    token.
    """
    return [
        Question(
            "a",
            "Which organ pumps the blood?\nAnswer:",
            [" the heart", " the liver of the body", " the heart muscle", " a lung"],
            0,
        ),
        Question("b", "Is the femur a bone?", [" yes", " no"], 0),
        Question("c", "The thy", ["roid gland", "mus", "me"], 1),
        Question(
            "d",
            "Cells that carry oxygen through the vessels are called",
            [" red blood cells", " red", " neurons"],
            0,
        ),
    ]


@pytest.fixture
def corpus(tmp_path):
    """What the evaluation room reads of a finished corpus stage."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, tiny_model):
    """A finished evaluation of the tiny model on the whole `ontology` group, and the statistics;
    not to be changed.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    statistics = evaluate(
        EvaluationConfig(),
        tiny_model,
        ["ontology"],
        write_corpus(folder / "corpus"),
        folder / "out",
    )
    return folder / "out", statistics


def write_corpus(folder):
    schema = pa.schema([(name, pa.string()) for name in ("doc_id", "text", "source", "meta")])
    rows = [
        {"doc_id": f"d{number}", "text": text, "source": "test", "meta": "{}"}
        for number, text in enumerate(DOCUMENTS)
    ]
    write_parquet(folder / "held_out" / "part-00000.parquet", rows, schema)
    questions = [
        {
            "id": f"{task}-{split}-{number}",
            "task": task,
            "split": split,
            "prompt": f"{DOCUMENTS[number]} Question {number} of {split}:",
            "options": [" yes", " no"]
            if task == "is_a"
            else [" heart", " lung of a child", " bone", " nerve"],
            "gold": number % 2,
            "meta": {},
        }
        for task in ("definition_to_term", "is_a")
        for split in ("recall", "generalisation")
        for number in range(4)
    ]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a folder laid out as a data set of the hub: a file `test.json` for each
    configuration.
    """
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(configurations):
        folder = tmp_path / "hub"
        for name, rows in configurations.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "test.json").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
        configs = [
            {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test.json"}]}
            for name in configurations
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        return folder

    return write
