"""Items that are planted in training data are found there, and what a model scores on the others is
told apart.
"""

import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import Config, EvaluationConfig, TokensConfig
from ipt.evaluation.contamination import (
    _decoder,
    check_data,
    clean_metrics,
    find_contamination,
    is_looked_for,
    load_contaminated,
)
from ipt.evaluation.metrics.statistics import wilson
from ipt.evaluation.results import load_results, read_predictions
from ipt.evaluation.task import Task, load_tasks
from ipt.evaluation.task_types.multiple_choice import Question
from ipt.evaluation.task_types.registry import kind_of
from ipt.pipeline.stages import Stages
from ipt.tokens.store import TokenStore
from ipt.tokens.tokenize import tokenize_texts
from tests.examples import examples

WORDS = [
    f"{first}{second}"
    for first in ("ba", "ko", "li", "mu", "re", "su", "ti")
    for second in ("den", "fal", "gor", "mip", "nas", "pel")
]
PLANTED = (3, 8, 17)


def sentence(seed, words=20):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def items():
    """20 questions of 20 words each, and one that is too short to look for."""
    questions = [
        Question(f"q{number}", sentence(number), [" ja", " nein"], number % 2)
        for number in range(20)
    ]
    return [*questions, Question("short", "Why?", [" so", ""], 0)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, items):
    """Documents of other words, some of which quote 15 words of an item in other case and
    punctuation.
    """
    folder = tmp_path_factory.mktemp("texts")
    rows = [f"Chapter {number}. {sentence(1000 + number, 200)}" for number in range(60)]
    for place, number in enumerate(PLANTED):
        quoted = items[number].prompt.split()[2:17]
        rows[20 * place + 7] += f" – {', '.join(quoted).upper()}! {sentence(99 + place)}"
    for part in range(2):
        table = pa.table({"text": rows[30 * part : 30 * (part + 1)]})
        pq.write_table(table, folder / f"part-{part:05d}.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, texts, tiny_model):
    folder = tmp_path_factory.mktemp("store")
    tokenize_texts(TokensConfig(shard_tokens=4000, workers=1), texts, tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def decode(tokenizer):
    return _decoder(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("data", ["texts", "store"])
def test_planted_items_are_found_and_no_others(
    items, tiny_model, tmp_path, request, monkeypatch, data, workers
):
    monkeypatch.setattr("ipt.evaluation.contamination.UNIT", 3000)  # several parts
    path = request.getfixturevalue(data)
    stats = find_contamination(
        {"quiz": items, "none": items[:1]}, str(path), tiny_model, tmp_path, workers=workers
    )
    found = json.loads((tmp_path / "contamination.json").read_text())
    assert found == {"quiz": [f"q{number}" for number in PLANTED], "none": []}
    assert stats["texts"] == 60 and stats["bytes"] > 60 * 1000
    assert stats["tasks"]["quiz"] == {"items": 21, "contaminated": 3, "too_short_to_look_for": 1}


@examples(50)
@given(st.text())
def test_tokens_are_decoded_as_by_their_tokenizer(tokenizer, decode, text):
    ids = tokenizer(text)["input_ids"]
    assert decode([*ids, tokenizer.eos_token_id]) == tokenizer.backend_tokenizer.decode(ids)


def test_an_ngram_that_is_longer_than_the_quotation_finds_nothing(
    items, texts, tiny_model, tmp_path
):
    assert (
        find_contamination({"quiz": items}, str(texts), tiny_model, tmp_path, ngram=18)["tasks"][
            "quiz"
        ]["contaminated"]
        == 0
    )


def test_clean_metrics_are_those_of_the_other_items(evaluated):
    folder, _ = evaluated
    (task,) = load_tasks(["is_a_recall"])
    predictions = read_predictions(folder, "is_a_recall")
    found = clean_metrics(task, predictions, [predictions[0]["id"], "of another item"])
    n = len(predictions)
    assert found["contaminated"]["value"] == 1 / n and found["contaminated"]["ci95"] == list(
        wilson(1, n)
    )
    others = kind_of(task).metrics(task, predictions[1:])
    assert found["accuracy_clean"] == others["accuracy"].as_dict()
    # none is left
    assert set(clean_metrics(task, predictions, [row["id"] for row in predictions])) == {
        "contaminated"
    }


def test_questions_about_the_training_corpus_are_not_looked_for(evaluated):
    tasks = {
        task.name: is_looked_for(task) for task in load_tasks(["ontology", "corpus_questions"])
    }
    assert tasks == {
        "definition_to_term_recall": False,
        "definition_to_term_generalisation": True,
        "is_a_recall": False,
        "is_a_generalisation": True,
        "held_out_perplexity": True,
        "corpus_questions": False,
    }
    (task,) = load_tasks(["is_a_recall"])
    found = clean_metrics(task, read_predictions(evaluated[0], "is_a_recall"), None)
    assert found == {"contaminated": {"value": None, "stderr": None, "ci95": [None, None], "n": 4}}


def test_what_is_found_in_several_data_sets_counts_together(tmp_path):
    for name, ids in (("a", ["1", "2"]), ("b", ["2", "5"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "contamination.json").write_text(json.dumps({"quiz": ids}))
    tasks = [
        Task("quiz", "choice", "quiz.jsonl"),
        Task("recall", "choice", "corpus:questions.jsonl"),
    ]
    assert load_contaminated([tmp_path / "a", tmp_path / "b"], tasks) == {
        "quiz": ["1", "2", "5"],
        "recall": None,
    }


def test_evaluation_reports_it_beside_the_score(tmp_path, items, store, tiny_model, monkeypatch):
    """Two models on one corpus: the data is looked through once."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": item.id, "prompt": item.prompt, "options": item.options, "gold": item.gold}
        for item in items[:20]
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "quiz.yaml").write_text("kind: choice\ndata: quiz.jsonl\n")
    config = Config(
        model=tiny_model,
        tasks=["quiz.yaml"],
        evaluation=EvaluationConfig(contamination=[str(store)], limit=12),
    )
    stages = [Stages(config), Stages(config)]
    folders = [
        made.evaluation(tiny_model, identity).folder
        for made, identity in zip(stages, ["one", "other"], strict=True)
    ]
    assert folders[0] != folders[1]
    assert [
        stage.reused
        for made in stages
        for identity, stage in made.done.items()
        if identity.name == "contamination"
    ] == [False, True]
    results = load_results(folders[0])["quiz"]
    ids = {row["id"] for row in read_predictions(folders[0], "quiz")}
    found = len(ids & {f"q{number}" for number in PLANTED})
    assert results["contaminated"]["value"] == pytest.approx(found / 12) and found
    assert results["accuracy_clean"]["n"] == 12 - found
    assert json.loads((folders[0] / "contamination.json").read_text()) == {
        "quiz": sorted(f"q{number}" for number in PLANTED)
    }


def test_results_without_data_to_look_through_say_nothing_of_it(evaluated):
    assert all("contaminated" not in metrics for metrics in load_results(evaluated[0]).values())


def test_mistakes_are_told_in_one_line(tmp_path, store):
    with pytest.raises(
        FileNotFoundError, match=r"evaluation\.contamination: .*nowhere is not a folder"
    ):
        check_data(str(tmp_path / "nowhere"), "embedded:tiny")
    with pytest.raises(
        FileNotFoundError, match=r"evaluation\.contamination: .*give a token store or a folder"
    ):
        check_data(str(tmp_path), "embedded:tiny")
    copied = shutil.copytree(store, tmp_path / "copied")
    for index in copied.glob("shard-*/index.json"):
        index.write_text(
            index.read_text().replace(TokenStore(store).fingerprint, "0123456789abcdef")
        )
    with pytest.raises(
        ValueError,
        match="has tokenizer 0123456789abcdef, but model=embedded:tiny has",
    ):
        check_data(str(copied), "embedded:tiny")
