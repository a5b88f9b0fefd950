"""What an offline W&B run of a training holds, as W&B's own reader shows it."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import Config, compose_config
from ipt.files import write_json
from ipt.pipeline.provenance import Record, SourceRecord
from ipt.pipeline.tracking.lineage import artifact_name, log_pairs, log_training
from ipt.stage import run_stage
from ipt.synthesis.shards import SCHEMA
from ipt.training.logger import log_metrics, open_loggers

STEPS = 5
RECORD = Record("arm", 0, {"raw": SourceRecord(10, 20, 2.0)}, 1, 2, 3, 4.0, None, 5.0)
STATS = {
    "pairs": 2,
    "grounded_rate": 0.5,
    "judge": {"accuracy": 0.75, "failed": {}},
    "frames": {"what is _": 2},
    "histograms": {"a": [1]},
}


@pytest.fixture
def stages(tmp_path):
    """A corpus, pairs made from it, and a training on them, each a single small file."""
    made = {}
    for name, source in (("corpus", None), ("synthesis", "corpus"), ("training", "synthesis")):

        def work(folder, name=name):
            (folder / "data.txt").write_text(name)
            return {}

        inputs = {source: made[source].digest} if source else {}
        made[name] = run_stage(
            name, None, work, config={}, inputs=inputs, stages_dir=tmp_path / "stages"
        )
    return made


@pytest.fixture
def pairs(tmp_path):
    row = {"chain_id": 0, "round": 0, "inherits_previous": False, "finish_reason": "stop"}
    row |= {"prompt_tokens": 1, "output_tokens": 1, "raw_output": "", "rewrite": ""}
    asked = [{"question": "What pumps blood?", "answer": "The heart"}]
    rows = [{**row, "doc_id": "a", "text": "The heart pumps blood.", "pairs": asked}]
    rewritten = {"pairs": [], "rewrite": "Kidneys filter."}
    rows.append({**row, "doc_id": "b", "text": "Kidneys.", **rewritten})
    folder = tmp_path / "synthesis" / "pairs"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "part-00000.parquet")
    write_json(folder.parent / "stats.json", STATS)
    return folder


@pytest.fixture(params=[False, True], ids=["references", "upload"])
def logged(request, stages, pairs, tmp_path):
    """Whether the model is uploaded, the folder of the run, and its records by type."""
    overrides = ["name=test", "logger=wandb", "logger.wandb.tags=[first]"]
    overrides.append(f"logger.wandb.log_model={request.param}")
    config = compose_config("train", overrides)
    output = tmp_path / "run"
    output.mkdir()
    with open_loggers(config, "training arm", output) as loggers:
        log_pairs(loggers, pairs, config.seed)
        for step in range(1, STEPS + 1):
            values = {"tokens": 2**24 + step, "loss": 1 / step, "loss/raw": 2 / step}
            log_metrics(loggers, values, step)
        log_training(config, loggers, list(stages.values()), stages["training"], RECORD)
    (file,) = output.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    records: dict[str, list] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return request.param, file.parent, records


def test_an_offline_run_is_complete(logged, stages):
    uploaded, folder, records = logged
    _check_run(records)
    _check_steps(records)
    _check_artifacts(records, stages, uploaded)
    (table,) = folder.glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [
        ["a", "The heart pumps blood.", "What pumps blood?", "The heart", ""],
        ["b", "Kidneys.", "", "", "Kidneys filter."],
    ]


def _check_run(records):
    (run,) = records["run"]
    assert (run["job_type"], run["run_group"]) == ("training", "test")
    assert (run["display_name"], run["tags"]) == ("test training arm", ["first"])
    config = {}
    for entry in records["config"]:
        config |= entry["update"]
    assert config["mixture"]["seq_len"] == compose_config("train", []).mixture.seq_len
    assert records["metric"][-1]["step_metric"] == "tokens"
    assert records["exit"][0]["exit_code"] == 0


def _check_steps(records):
    steps = [entry["item"] for entry in records["history"] if "loss" in entry["item"]]
    numbers = range(1, STEPS + 1)
    assert [step["tokens"] for step in steps] == [2**24 + number for number in numbers]
    assert [step["loss/raw"] for step in steps] == pytest.approx([2 / one for one in numbers])
    summary = {}
    for entry in records["summary"]:
        summary |= entry["update"]
    assert summary["record/sources/raw/repeats"] == 2.0 and summary["loss"] == 1 / STEPS
    assert summary["record/trained_tokens"] == 20
    figures = {name: value for name, value in summary.items() if name.startswith("synthesis/")}
    assert figures == {
        "synthesis/pairs": 2,
        "synthesis/grounded_rate": 0.5,
        "synthesis/judge/accuracy": 0.75,
    }


def _check_artifacts(records, stages, uploaded):
    artifacts = {entry["name"]: entry for entry in records["artifact"] if "metadata" in entry}
    names = {name: artifact_name(stage.folder) for name, stage in stages.items()}
    assert set(artifacts) == set(names.values())
    sources = {"corpus": [], "synthesis": [names["corpus"]], "training": [names["synthesis"]]}
    for name, stage in stages.items():
        artifact = artifacts[names[name]]
        metadata = json.loads(artifact["metadata"])
        assert (metadata["digest"], metadata["made_from"]) == (stage.digest, sources[name])
        files = {file["path"]: file for file in artifact["manifest"]["contents"]}
        assert set(files) == {"manifest.json", "data.txt"}
        # only the model is uploaded
        assert ("ref" in files["data.txt"]) == (name != "training" or not uploaded)


def test_without_wandb_nothing_is_logged(stages, pairs):
    log_pairs([], pairs, 0)
    log_training(Config(), [], list(stages.values()), stages["training"], RECORD)
