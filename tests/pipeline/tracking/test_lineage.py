import json
import subprocess
import sys

import pytest

from ipt.config import Config, LoggerConfig
from ipt.pipeline.records import Record, SourceRecord
from ipt.pipeline.tracking.lineage import artifact_name, log_training
from ipt.stage import run_stage
from ipt.training.logger import build_loggers

STEPS = 5
RECORD = Record("arm", 0, {"raw": SourceRecord(10, 20, 2.0)}, 1, 2, 3, 4.0, None, 5.0)


@pytest.fixture
def stages(tmp_path):
    """A corpus, pairs that were made of it, and a training on them, all as small as can be."""
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


@pytest.fixture(params=[False, True], ids=["references", "upload"])
def logged(request, stages, tmp_path):
    """Whether data is uploaded, and all that an offline run of it holds, as `wandb leet inspect`
    reads it.
    """
    config = Config(
        name="test",
        logger=LoggerConfig(name="wandb", offline=True, upload=request.param, tags=["first"]),
    )
    output = tmp_path / "run"
    output.mkdir()
    (logger,) = build_loggers(config, "training arm", output, None)
    for step in range(1, STEPS + 1):
        logger.log_metrics({"tokens": 2**24 + step, "loss": 1 / step, "loss/raw": 2 / step}, step)
    log_training([logger], list(stages.values()), stages["training"], RECORD, request.param)
    (log,) = output.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True
    ).stdout.splitlines()
    return request.param, [json.loads(line) for line in lines]


def test_an_offline_run_is_complete(logged, stages):
    uploaded, records = logged
    of = lambda kind: [record[kind] for record in records if record["type"] == kind]  # noqa: E731
    (run,) = of("run")
    assert run["config"]["update"]["mixture"]["seq_len"] == Config().mixture.seq_len
    assert (
        run["job_type"] == "training"
        and run["run_group"] == "test"
        and run["display_name"] == "test training arm"
    )
    steps = [entry["item"] for entry in of("history")]
    assert [step["tokens"] for step in steps] == [2**24 + number for number in range(1, STEPS + 1)]
    assert [step["loss/raw"] for step in steps] == pytest.approx(
        [2 / number for number in range(1, STEPS + 1)]
    )
    summary = {name: value for entry in of("summary") for name, value in entry["update"].items()}
    assert (
        summary["record/sources/raw/repeats"] == 2.0
        and summary["record/trained_tokens"] == 20
        and summary["loss"] == 1 / STEPS
    )
    assert of("exit")[0]["exit_code"] == 0
    artifacts = {entry["name"]: entry for entry in of("artifact")}
    names = {name: artifact_name(stage.folder) for name, stage in stages.items()}
    assert set(artifacts) == set(names.values())
    made_from = {
        name: json.loads(artifacts[names[name]]["metadata"])["made_from"] for name in names
    }
    assert made_from == {
        "corpus": [],
        "synthesis": [names["corpus"]],
        "training": [names["synthesis"]],
    }
    for name, stage in stages.items():
        artifact = artifacts[names[name]]
        assert json.loads(artifact["metadata"])["digest"] == stage.digest
        files = {file["path"]: file for file in artifact["manifest"]["contents"]}
        assert set(files) == {"manifest.json", "data.txt"}
        assert ("ref" in files["data.txt"]) is not uploaded
