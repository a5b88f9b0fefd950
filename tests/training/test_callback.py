"""Runs that are scored on the way, against the same runs left alone, and their scores against those
of what they export.
"""

import csv
import signal

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from ipt.config import EvaluationConfig
from ipt.evaluation.callback import DuringTraining, as_in_inference, check_during_training
from ipt.evaluation.results import average, late_scores, load_results
from ipt.evaluation.run import evaluate
from ipt.training.checkpoint.signals import Stopped
from ipt.training.checkpoint.state import random_state
from ipt.training.module import PretrainingModule
from tests.training.jobs import assert_same_steps, read_metrics, train
from tests.training.ranks import batch_of

SCORED = [2, 4, 6]


@pytest.fixture(scope="module")
def scored(stores, make_config, during, tmp_path_factory):
    """The run of `uninterrupted`, scored on the way."""
    output = tmp_path_factory.mktemp("scored") / "one"
    train_scored(make_config(*during), stores, output)
    return output


@pytest.fixture(scope="module")
def scored_two(runs_of_two):
    """The run of `uninterrupted_two`, scored on the way."""
    return runs_of_two / "scored"


def train_scored(config, stores, output):
    return train(config, stores, output, score=DuringTraining(config, None, output))


def assert_same_run(left, right):
    assert_same_steps(left, right)
    assert (left / "export" / "model.safetensors").read_bytes() == (
        right / "export" / "model.safetensors"
    ).read_bytes()


def scores_of(output):
    """Step -> what stands in its record beside the training's own figures, but for times."""
    records = {
        record["step"]: {key: value for key, value in record.items() if key.startswith("eval/")}
        for record in read_metrics(output)
    }
    return {step: scores for step, scores in records.items() if scores}


def test_scores_change_nothing_in_the_training(scored, uninterrupted):
    assert_same_run(scored, uninterrupted[0])
    assert list(scores_of(scored)) == SCORED


def test_scores_change_nothing_in_the_training_of_two(scored_two, uninterrupted_two):
    assert_same_run(scored_two, uninterrupted_two)
    assert list(scores_of(scored_two)) == SCORED


def test_two_processes_score_as_one(scored, scored_two):
    for step, scores in scores_of(scored_two).items():
        assert scores == pytest.approx(scores_of(scored)[step], rel=1e-2), step


@pytest.mark.parametrize("run", ["scored", "scored_two"])
def test_the_last_scores_are_those_of_the_export(run, tasks, tmp_path, request):
    output = request.getfixturevalue(run)
    evaluate(EvaluationConfig(), str(output / "export"), tasks, None, tmp_path / "after")
    found, expected = (
        load_results(output / "scores" / "step-00000006"),
        load_results(tmp_path / "after"),
    )
    assert found.keys() == expected.keys() == {"choices", "texts", "answers"}
    for task, metrics in expected.items():
        for name, entry in metrics.items():
            assert found[task][name]["n"] == entry["n"]
            assert found[task][name]["value"] == pytest.approx(entry["value"], rel=1e-4), (
                task,
                name,
            )
            assert scores_of(output)[6][f"eval/{task}/{name}"] == found[task][name]["value"]
    first = load_results(output / "scores" / "step-00000002")
    # of another model
    assert first["choices"]["logprob"]["value"] != pytest.approx(
        expected["choices"]["logprob"]["value"], rel=1e-3
    )


def test_a_stopped_run_goes_on_with_the_same_scores(
    scored, stores, make_config, during, monkeypatch, tmp_path
):
    """Stopped after a step that was scored, whose scores are in the checkpoint, and with others to
    come.
    """
    config = make_config(*during, "checkpoint.every_n_train_steps=null")
    with monkeypatch.context() as patches:
        stop_after(patches, 4)
        with pytest.raises(Stopped):
            train_scored(config, stores, tmp_path / "run")
    assert list(scores_of(tmp_path / "run")) == SCORED[:2]
    train_scored(config, stores, tmp_path / "run")
    assert_same_run(tmp_path / "run", scored)
    assert scores_of(tmp_path / "run") == scores_of(scored)


def stop_after(patches, step):
    score = DuringTraining.__call__

    def stopping(self, module, number):
        scores = score(self, module, number)
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return scores

    patches.setattr(DuringTraining, "__call__", stopping)


def test_dropout_and_recomputed_blocks_go_on_as_before(stores, make_config, during, tmp_path):
    settings = ["lora.rank=2", "lora.dropout=0.5", "trainer.activation_checkpointing=full"]
    train(make_config(*settings), stores, tmp_path / "alone")
    train_scored(make_config(*settings, *during), stores, tmp_path / "scored")
    assert_same_run(tmp_path / "scored", tmp_path / "alone")
    steps = read_metrics(tmp_path / "scored")
    assert len({step["loss"] for step in steps}) == len(steps)


def test_a_model_in_inference_and_after(make_config):
    module = PretrainingModule(
        make_config("lora.rank=2", "lora.dropout=0.5", "trainer.activation_checkpointing=full"),
        ["raw"],
    )
    module.configure_model()
    module.model.base_model.model.model.embed_tokens.eval()  # somebody's wish, which is to be kept
    before = state_of(module)
    with torch.no_grad(), as_in_inference(module):
        inside = [module.loss(batch_of(0), 1.0, True)[0].item() for _ in range(2)]
        torch.rand(3)
    assert inside[0] == inside[1]  # no dropout
    assert state_of(module) == before
    module.loss(batch_of(0), 1.0, True)[0].backward()
    assert sum(parameter.grad is not None for parameter in module.parameters()) > 0


def state_of(module):
    modes = [part.training for part in module.modules()]
    assert {True, False} == set(modes)
    forwards = [part.forward for part in module.modules() if "forward" in vars(part)]
    assert forwards
    return modes, forwards, module.model.config._attn_implementation, random_state()


def test_time_for_scores_counts_for_no_step_and_loggers_get_all_of_them(
    stores, make_config, tmp_path, clock
):
    def slow(module, step):
        clock.advance(1000)
        return {"eval/pause/one": 1.0}

    config = make_config("trainer.max_steps=3", "trainer.log_every_n_steps=2")
    train(
        config, stores, tmp_path / "run", lambda: [CSVLogger(tmp_path, name="logged")], score=slow
    )
    steps = read_metrics(tmp_path / "run")
    with next(tmp_path.glob("logged/*/metrics.csv")).open() as file:
        assert [row["eval/pause/one"] for row in csv.DictReader(file)] == ["1.0"] * 3
    assert all(step["eval/pause/one"] == 1.0 for step in steps)
    for step in steps:
        # 128 tokens a step; a second for each reading of the clock
        seconds = 128 / step["tokens_per_second"]
        assert 0 < step["data_wait"] * seconds < seconds < 10


def test_late_scores_are_averaged(scored):
    assert [folder.name for folder in late_scores(scored, 2)] == ["step-00000004", "step-00000006"]
    entry = average([scored], last=2)["choices"]["logprob"]
    values = [scores_of(scored)[step]["eval/choices/logprob"] for step in SCORED[1:]]
    assert entry["value"] == pytest.approx(sum(values) / 2)
    assert entry["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (entry["n"], entry["runs"]) == (9, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluation.during_training.every_n_train_steps=0"],
            r"during_training.every_n_train_steps is 0, expected 1 or more, or null",
        ),
        (["evaluation.during_training.limit=0"], r"during_training.limit is 0"),
        (["evaluation.during_training.tasks=[]"], r"during_training.tasks is empty: name tasks"),
        (["evaluation.during_training.tasks=[nothing]"], r"no task or group is called 'nothing'"),
    ],
)
def test_what_cannot_be_scored_is_told_before_the_training(settings, message, make_config, during):
    with pytest.raises(ValueError, match=message):
        check_during_training(make_config(*during, *settings))
    assert check_during_training(make_config()) == []
