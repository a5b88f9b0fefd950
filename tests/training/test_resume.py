"""Runs that are stopped, killed, moved and spread anew, against the same run left alone."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipt.files import sealed
from ipt.training.checkpoint.signals import EXIT_CODE, Stopped
from ipt.training.checkpoint.storage import read_facts, whole_checkpoints
from ipt.training.metrics import StepMetrics
from tests.processes import run_ranks, run_together, started
from tests.training.jobs import (
    assert_same_steps,
    copy_run,
    read_metrics,
    reserved_port,
    run_jobs,
    train,
    write_job,
)


@pytest.fixture
def signal_after(monkeypatch):
    """Send this process a signal after a step of its training."""
    return partial(_signal_after, monkeypatch)


def _signal_after(patches: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    tell = StepMetrics.on_train_batch_end

    def signalling(self, trainer, *arguments):
        tell(self, trainer, *arguments)
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    patches.setattr(StepMetrics, "on_train_batch_end", signalling)


@pytest.fixture(scope="module")
def whole_forty(stores, make_config, tmp_path_factory):
    """A run that is long enough to be killed, left alone, and its config."""
    config, output = (
        make_config("trainer.max_steps=40", "checkpoint.every_n_train_steps=3"),
        tmp_path_factory.mktemp("forty") / "whole",
    )
    train(config, stores, output)
    return output, config


def _same_weights(left: Path, right: Path) -> bool:
    return (left / "export" / "model.safetensors").read_bytes() == (
        right / "export" / "model.safetensors"
    ).read_bytes()


def test_two_ranks_under_fsdp2_equal_one_process(uninterrupted, uninterrupted_two):
    assert_same_steps(uninterrupted_two, uninterrupted[0], tolerance=1e-3)
    one, two = (
        load_file(folder / "export" / "model.safetensors")
        for folder in (uninterrupted[0], uninterrupted_two)
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)


def test_sigterm_to_one_of_two_stops_both_after_the_same_step(stopped_two):
    assert [path.name for path in whole_checkpoints(stopped_two / "checkpoints")] == [
        "step-00000004"
    ]
    assert len(read_metrics(stopped_two)) == 4
    assert not (stopped_two / "summary.json").exists()


def test_two_go_on_as_two(stopped_two, uninterrupted_two, stores, two_ranks, tmp_path):
    """Started as `srun` starts them, with a process for each task and no torchrun."""
    output = copy_run(stopped_two, tmp_path / "run")
    tasks = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    with reserved_port() as port:
        shared = {
            **tasks,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "SLURM_JOB_NAME": "train",
            "SLURM_JOB_ID": "7",
        }
        environments = [{**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        ended = run_together(
            run_jobs, write_job(two_ranks, stores, output), environments=environments
        )
    assert ended.codes == [0, 0], ended.output
    assert_same_steps(output, uninterrupted_two)
    assert _same_weights(output, uninterrupted_two)


def test_two_go_on_as_one(stopped_two, uninterrupted, stores, make_config, tmp_path):
    output = copy_run(stopped_two, tmp_path / "run")
    train(make_config(), stores, output)
    assert_same_steps(output, uninterrupted[0], tolerance=1e-3)
    assert read_facts(output / "checkpoints" / "step-00000006")["processes"] == 1


@pytest.fixture(scope="module")
def requeued(stores, make_config, tmp_path_factory):
    """A run of one process that SLURM's signal before the time is up has ended after step 3, and
    what was asked of SLURM then.
    """
    folder = tmp_path_factory.mktemp("requeued")
    output, record, scontrol = folder / "run", folder / "record", folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {record}\n')
    scontrol.chmod(0o755)
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
        patches.setenv("SLURM_JOB_ID", "17")
        _signal_after(patches, 3, signal.SIGUSR1)
        with pytest.raises(Stopped) as stopped:
            train(make_config("checkpoint.every_n_train_steps=null"), stores, output)
    assert stopped.value.code == EXIT_CODE
    return output, record


@pytest.fixture(scope="module")
def of_two_copies(make_config):
    """HSDP: each process has all weights, and one of the two writes each."""
    return make_config(
        "trainer.devices=2",
        "trainer.micro_batch_size=1",
        "trainer.replicas=2",
        "checkpoint.keep_every_n_steps=4",
    )


@pytest.fixture(scope="module")
def resumed_by_two(requeued, of_two_copies, stores, two_ranks, tmp_path_factory):
    """A folder of what the same two processes ran: two copies of a model, whole and stopped and
    gone on with; a run of one process.
    """
    folder = tmp_path_factory.mktemp("resumed")
    spread = copy_run(requeued[0], folder / "spread")
    stopped = write_job(of_two_copies, stores, folder / "again", (3, 1, signal.SIGTERM))
    jobs = [
        write_job(of_two_copies, stores, folder / "whole"),
        stopped,
        write_job(of_two_copies, stores, folder / "again"),
    ]
    ended = run_ranks(run_jobs, *jobs, write_job(two_ranks, stores, spread))
    assert ended.codes == [0, 0], ended.output
    assert "resuming from step 4" in ended.output
    return folder


def test_two_copies_go_on_as_two_and_as_one(resumed_by_two, stores, make_config, tmp_path):
    whole, again, one = resumed_by_two / "whole", resumed_by_two / "again", tmp_path / "one"
    assert_same_steps(again, whole)
    assert _same_weights(again, whole)
    checkpoint = again / "checkpoints" / "step-00000004"
    copy_run(checkpoint, one / "checkpoints" / checkpoint.name)
    summary = train(make_config(), stores, one)
    assert_same_steps(one, whole, tolerance=1e-3)
    written = sum(
        tensor.nbytes for path in checkpoint.glob("shard-*") for tensor in load_file(path).values()
    )
    # weights and two moments, once
    assert written == pytest.approx(summary["parameters"] * (4 + 8), rel=0.01)


def test_one_goes_on_as_one_and_as_two(
    requeued, resumed_by_two, uninterrupted, stores, make_config, tmp_path
):
    """SLURM's signal before the time is up: saved, and back in the queue."""
    stopped, record = requeued
    assert record.read_text() == "requeue 17\n"
    assert [path.name for path in whole_checkpoints(stopped / "checkpoints")] == ["step-00000003"]
    output = copy_run(stopped, tmp_path / "run")
    train(make_config(), stores, output)
    assert_same_steps(output, uninterrupted[0])
    assert _same_weights(output, uninterrupted[0])
    assert_same_steps(resumed_by_two / "spread", uninterrupted[0], tolerance=1e-3)


@pytest.mark.parametrize("moment", ["any time", "while it saves"])
def test_killed_and_run_again_equals_uninterrupted(moment, whole_forty, stores, tmp_path):
    (whole, config), killed = whole_forty, tmp_path / "killed"
    # which ends no run
    job = write_job(config, stores, killed, slow_from=30 if moment == "any time" else 6)
    wanted = "step-*" if moment == "any time" else ".step-00000006.partial/shard-*"
    with started(run_jobs, job, log=tmp_path / "log") as process:
        while not list((killed / "checkpoints").glob(wanted)):
            assert process.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    if moment == "while it saves":
        assert [path.name for path in whole_checkpoints(killed / "checkpoints")] == [
            "step-00000003"
        ]
    train(config, stores, killed)
    assert_same_steps(killed, whole)
    assert _same_weights(killed, whole)
    assert not list((killed / "checkpoints").glob(".step-*"))


def test_ctrl_c_is_told_from_an_end(stores, make_config, signal_after, tmp_path):
    signal_after(2, signal.SIGINT)
    # a process in the background may have been told to ignore it
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_config(), stores, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_checkpoint_of_other_settings_is_refused(uninterrupted, stores, make_config, tmp_path):
    output = copy_run(uninterrupted[0], tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to a run with other data or settings"):
        train(make_config("optimizer.lr=1e-3"), stores, output)


def test_a_finished_run_goes_on_from_its_end_and_only_exports(
    uninterrupted, stores, make_config, tmp_path
):
    output = copy_run(uninterrupted[0], tmp_path / "run")
    train(make_config(), stores, output)
    assert_same_steps(output, uninterrupted[0])
    assert _same_weights(output, uninterrupted[0])


def test_seconds_are_those_of_all_starts(stores, make_config, signal_after, monkeypatch, tmp_path):
    with monkeypatch.context() as patches:
        signal_after(2, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(make_config(), stores, tmp_path)
        patches.undo()
    path = tmp_path / "checkpoints" / "step-00000002" / "checkpoint.json"
    facts = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
    assert 0 < facts["seconds"] < 1000
    path.write_text(json.dumps(sealed({**facts, "seconds": 1000.0 + facts["seconds"]}, {})))
    summary = train(make_config(), stores, tmp_path)
    last = read_facts(tmp_path / "checkpoints" / "step-00000006")["seconds"]
    assert 1000 + facts["seconds"] < last < summary["seconds"] + 0.05  # which is rounded
    assert summary["seconds"] < 2000


def test_copies_elsewhere_are_gone_on_from(
    uninterrupted, stores, make_config, signal_after, monkeypatch, tmp_path
):
    config = make_config("checkpoint.url=memory://copies", "checkpoint.async_save=false")
    with monkeypatch.context() as patches:
        signal_after(4, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, stores, tmp_path / "here")
        patches.undo()
    train(config, stores, tmp_path / "there")
    assert_same_steps(tmp_path / "there", uninterrupted[0])
    assert _same_weights(tmp_path / "there", uninterrupted[0])


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion", "muon"])
def test_other_optimizers_go_on_too(
    optimizer, stores, make_config, signal_after, monkeypatch, tmp_path
):
    config = make_config(f"optimizer.name={optimizer}", "optimizer.lr=1e-2")
    train(config, stores, tmp_path / "whole")
    with monkeypatch.context() as patches:
        signal_after(3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, stores, tmp_path / "run")
        patches.undo()
    train(config, stores, tmp_path / "run")
    assert_same_steps(tmp_path / "run", tmp_path / "whole")


def test_lora_checkpoints_hold_only_what_is_trained(
    stores, make_config, signal_after, monkeypatch, tmp_path
):
    config = make_config("lora.rank=2", "lora.dropout=0.1")
    train(config, stores, tmp_path / "whole")
    with monkeypatch.context() as patches:
        signal_after(3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, stores, tmp_path / "run")
        patches.undo()
    (checkpoint,) = whole_checkpoints(tmp_path / "run" / "checkpoints")
    weights = [name for name in read_facts(checkpoint)["tensors"] if name.startswith("model.")]
    assert weights
    assert all("lora_" in name for name in weights)
    train(config, stores, tmp_path / "run")  # dropout goes on with the random state that was saved
    assert_same_steps(tmp_path / "run", tmp_path / "whole")
