"""What a job logs about its stages, and its estimate of the time that is left."""

import json
import logging

import pytest

from ipt.config import Config, CorpusConfig
from ipt.pipeline.plan import TO_DO, PlannedStage, _estimate, start_job
from ipt.pipeline.stages import Key, StageNotFinished, Stages
from ipt.stage import Stage, StageId


@pytest.fixture
def config(tmp_path) -> Config:
    rows = [{"text": f"Document {number} has a few words."} for number in range(8)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(path=str(path), held_out_fraction=0.0)
    return Config(model="embedded:tiny", corpus=corpus, stages_dir=str(tmp_path / "stages"))


def _store(stages: Stages) -> None:
    stages.store("raw")


def _log_of_a_job(config: Config, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        job = start_job([(config, _store), (config, _store)])
        for _ in range(2):  # two arms with the same stages
            _store(Stages(config, log=job))
    return [record.message for record in caplog.records if record.name.startswith("ipt.pipeline")]


def test_each_stage_is_logged_once_with_its_number(config, caplog):
    plan, to_do, *lines = _log_of_a_job(config, caplog)
    assert plan == "plan: 2 stages, 0 cached"
    assert to_do == "to do: build corpus, tokenize raw"
    starts = ["[1/2] build corpus: ", "[1/2] build corpus: done in ", "[2/2] tokenize raw"]
    starts.append("[2/2] tokenize raw: done in ")
    assert len(lines) == 4
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))

    plan, *lines = _log_of_a_job(config, caplog)
    assert plan == "plan: all 2 stages are cached"
    assert [line.rpartition("-")[0] for line in lines] == [
        f"[1/2] build corpus: cached, {config.stages_dir}/corpus",
        f"[2/2] tokenize raw: cached, {config.stages_dir}/tokens",
    ]


def test_a_plan_runs_nothing_and_survives_missing_input(config, caplog, tmp_path):
    config.corpus.path = str(tmp_path / "nowhere.jsonl")
    with caplog.at_level(logging.INFO):
        start_job([(config, _store)])
    assert "plan: 2 stages, 0 cached" in caplog.messages
    assert not (tmp_path / "stages").exists()


def test_stages_of_other_phases_are_not_in_the_plan(config, caplog):
    def visit(stages: Stages) -> None:
        stages.only = {"tokens"}
        stages.store("raw")

    with caplog.at_level(logging.INFO):
        start_job([(config, visit)])
    assert "to do: tokenize raw" in caplog.messages
    with pytest.raises(StageNotFinished, match="corpus"):
        visit(Stages(config))


def test_the_estimate_scales_with_the_trained_tokens(tmp_path):
    def settings(steps: int) -> dict:
        trainer = {"global_batch": 2, "max_steps": steps}
        return {"model": "m", "trainer": trainer, "mixture": {"seq_len": 8}}

    def planned(steps: int, model: str = "m") -> list[PlannedStage]:
        key = Key(settings(steps) | {"model": model}, {"model": model}, 0, tmp_path)
        stage = Stage(tmp_path / "none", "", {}, 0.0, reused=False)
        return [PlannedStage(StageId("training"), stage, TO_DO, key=key)]

    assert _estimate(planned(10)) is None
    manifest = {"stage": "training", "seconds": 5.0, "config": settings(10)}
    (tmp_path / "training-1").mkdir()
    path = tmp_path / "training-1" / "manifest.json"
    path.write_text(json.dumps(manifest | {"inputs": {"model": "m"}}), encoding="utf-8")
    assert _estimate(planned(30)) == pytest.approx(15.0)
    assert _estimate(planned(30, "other")) is None
