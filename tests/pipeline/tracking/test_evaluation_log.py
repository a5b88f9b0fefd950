import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ipt.config import Config, EvaluationConfig, compose_config
from ipt.evaluation.results import load_results
from ipt.evaluation.run import evaluate
from ipt.pipeline.stages import Stages
from ipt.pipeline.tracking.evaluation_log import log_evaluation

LOGGERS = compose_config("evaluate", ["logger=[wandb,csv]", "logger.wandb.offline=true"]).logger


@pytest.fixture
def evaluation(tmp_path, tiny_model):
    rows = [
        {"prompt": f"Question {number}:", "options": [" yes", " no"], "gold": 0}
        for number in range(3)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("kind: choice\ndata: own.jsonl\n")
    evaluate(
        EvaluationConfig(), tiny_model, [str(tmp_path / "own.yaml")], None, tmp_path / "scores"
    )
    return tmp_path / "scores"


def test_an_evaluation_is_in_all_loggers(evaluation, tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / ".wandb_id").write_text("abc123")
    config = Config(
        name="test",
        model=str(tmp_path / "training" / "export"),
        logger=LOGGERS,
    )
    log_evaluation(config, evaluation, "identity")
    (log,) = evaluation.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    inspected = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    for entry in (
        '"trained_by":"abc123"',
        '"model_identity":"identity"',
        "own/logprob",
        "results.md",
    ):
        assert entry in inspected, entry
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in evaluation.glob("wandb/*/files/media/table/*.json")
    }
    assert len(tables["predictions"]["data"]) == 3
    value = load_results(evaluation)["own"]["logprob"]["value"]
    assert any(
        row[:3] == ["own", "logprob", pytest.approx(value)] for row in tables["results"]["data"]
    )
    with (evaluation / "csv" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["own/logprob"]) == pytest.approx(value)


def test_an_evaluation_that_was_finished_without_wandb_is_logged_once(
    evaluation, tmp_path, tiny_model
):
    config = Config(tasks=[str(tmp_path / "own.yaml")], stages_dir=str(tmp_path / "stages"))
    with_wandb = replace(config, logger=LOGGERS)
    logs = []
    for asked in (config, with_wandb, with_wandb):
        stage = Stages(asked).evaluation(tiny_model, "identity")
        logs.append(len(list(stage.folder.glob("wandb/offline-run-*"))))
    assert stage.reused
    assert logs == [0, 1, 1]


def test_without_a_logger_nothing_is_logged(evaluation):
    log_evaluation(Config(), evaluation, "identity")
    assert not (evaluation / "wandb").exists()
