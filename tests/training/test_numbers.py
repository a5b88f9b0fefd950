"""What a run says of itself, and what may change without its being another run."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipt.config import TrainerConfig
from ipt.files import sealed
from ipt.mixture.batches import PackedSequences
from ipt.training.checkpoint.storage import read_facts, whole_checkpoints
from ipt.training.logger import run_id
from ipt.training.metrics import StepMetrics, step_note
from ipt.training.run_key import run_key, trainer_settings
from ipt.training.train import cluster_environment
from ipt.training.validation import check_launch, check_training, slurm_tasks
from tests.training.jobs import copy_run, read_metrics, train

ROOT = Path(__file__).resolve().parents[2]
BY_SOURCE = {"loss/raw", "loss/instruction", "tokens/raw", "tokens/instruction"}
MEASURED = {"tokens_per_second", "mfu", "skipped", "data_wait", "memory"}


def test_metrics_have_their_keys_and_plausible_values(uninterrupted):
    for step in read_metrics(uninterrupted[0]):
        assert step.keys() == {"step", "tokens", "loss", "lr", "grad_norm"} | BY_SOURCE | MEASURED
        assert step["mfu"] is None  # of a CPU no peak is known
        assert 0 <= step["data_wait"] < 1
        assert 0.1 < step["memory"] < 20
        assert step["skipped"] == 0


def test_waiting_for_data_is_seen(stores, make_config, tmp_path, monkeypatch, clock):
    fill = PackedSequences.fields

    def slow(self, indices):
        clock.advance(300)
        return fill(self, indices)

    monkeypatch.setattr(PackedSequences, "fields", slow)
    train(
        make_config("trainer.max_steps=3", "trainer.accumulate_grad_batches=2"),
        stores,
        tmp_path / "run",
    )
    for step in read_metrics(tmp_path / "run")[1:]:
        seconds = 64 * 2 * 2 / step["tokens_per_second"]
        waited = step["data_wait"] * seconds
        # two batches, and a second for each reading of the clock
        assert 600 < waited < seconds < 610


def test_the_note_beside_the_bar():
    record = {
        "loss": 2.1428,
        "tokens_per_second": 8512.3,
        "mfu": 0.514,
        "memory": 96.31,
        "data_wait": 0.01,
        "skipped": 0,
    }
    assert step_note(record, 8) == "loss 2.143  8 x 8,512 tokens/s  MFU 51%  96.3 GiB"
    slow = {**record, "mfu": None, "data_wait": 0.2, "skipped": 3}
    assert step_note(slow, 1) == "loss 2.143  8,512 tokens/s  96.3 GiB  data wait 20%  skipped 3"


@pytest.mark.parametrize("profiler", ["simple", "pytorch"])
def test_a_profile_is_written_to_the_folder_of_the_run(profiler, stores, make_config, tmp_path):
    config = make_config(f"trainer.profiler={profiler}", "checkpoint.keep_after_training=false")
    train(config, stores, tmp_path / "run")
    written = {path.suffix: path for path in (tmp_path / "run" / "profile").iterdir()}
    assert "run_training_batch" in written[".txt"].read_text()
    if profiler == "pytorch":
        events = json.loads(written[".json"].read_text())["traceEvents"]
        assert any("Optimizer.step#" in str(event.get("name")) for event in events)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_saving_by_time_and_keeping_for_good(stores, make_config, tmp_path, monkeypatch):
    """The first step takes two minutes by the clock that checkpoints look at: twice before it, then
    again and again.
    """
    now = iter([0.0, 0.0, *[120.0] * 100])
    monkeypatch.setattr("ipt.training.checkpoint.callback.monotonic", lambda: next(now))
    seen = []
    tell = StepMetrics.on_train_batch_end

    def spy(self, trainer, *arguments):
        tell(self, trainer, *arguments)
        seen.append([path.name for path in whole_checkpoints(tmp_path / "run" / "checkpoints")])

    monkeypatch.setattr(StepMetrics, "on_train_batch_end", spy)
    settings = [
        "every_n_train_steps=null",
        "every_n_minutes=1.5",
        "keep_every_n_steps=3",
        "async_save=false",
        "keep_last=1",
    ]
    config = make_config(*[f"checkpoint.{setting}" for setting in settings])
    train(config, stores, tmp_path / "run")
    assert seen[1] == ["step-00000001"]
    assert seen[-1] == ["step-00000003"]
    names = [path.name for path in whole_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000003", "step-00000006"]


def test_a_copy_that_fails_is_told_and_does_not_end_the_run(stores, make_config, tmp_path, caplog):
    (tmp_path / "file").touch()
    # a file, where a folder would have to be
    config = make_config(f"checkpoint.url=file://{tmp_path}/file")
    assert train(config, stores, tmp_path / "run")["steps"] == 6
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_uploads"] > 0
    assert "step-00000006 was not uploaded" in caplog.text


def test_wandb_goes_on_where_the_checkpoint_says(uninterrupted, tmp_path):
    (tmp_path / "new").mkdir()
    drawn = run_id(tmp_path / "new")
    assert drawn == run_id(tmp_path / "new")
    moved = copy_run(uninterrupted[0], tmp_path / "moved")
    (checkpoint,) = whole_checkpoints(moved / "checkpoints")
    facts = read_facts(checkpoint)
    facts = {name: value for name, value in facts.items() if name != "seal"} | {
        "about": {**facts["about"], "wandb_id": drawn}
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(sealed(facts, {})))
    assert run_id(moved) == drawn


def test_spreading_and_saving_do_not_make_another_run(make_config):
    one = make_config("trainer.micro_batch_size=2", "trainer.accumulate_grad_batches=4")
    two = make_config(
        "trainer.devices=2",
        "trainer.accumulate_grad_batches=4",
        "trainer.micro_batch_size=1",
        "checkpoint.keep_last=7",
        "trainer.profiler=pytorch",
    )
    assert trainer_settings(one.trainer) == trainer_settings(two.trainer)
    assert run_key(one, {"raw": 1}) == run_key(two, {"raw": 1}) != run_key(one, {"raw": 2})
    for change in (
        "trainer.max_steps=7",
        "trainer.accumulate_grad_batches=8",
        "optimizer.lr=1",
        "seed=1",
        "mixture.packing=best_fit",
    ):
        other = make_config(
            "trainer.micro_batch_size=2", "trainer.accumulate_grad_batches=4", change
        )
        assert run_key(other, {"raw": 1}) != run_key(one, {"raw": 1}), change


def test_starting_too_few_or_too_many_processes_is_told(monkeypatch):
    one, four = TrainerConfig(), TrainerConfig(devices=4)
    check_launch(one)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="finds no GPU here; use trainer=cpu"):
            check_launch(TrainerConfig(accelerator="gpu"))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=4"):
        check_launch(four)
    with pytest.raises(ValueError, match="--nnodes=2 "):
        check_launch(replace(four, num_nodes=2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_launch(four)
    with pytest.raises(ValueError, match=r"4 processes were started: set trainer\.devices=4"):
        check_launch(one)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # in the batch script alone it means nothing
    check_launch(one)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    check_launch(four)


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NAME": "train",
}


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),
        # of a batch script
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_JOB_NAME": "job",
            },
            1,
        ),
        (STEP, 4),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 1),  # srun --ntasks=1 in an allocation for four
        (STEP | {"SLURM_JOB_NAME": "interactive"}, 4),  # srun in a shell of salloc
        (STEP | {"SLURM_JOB_NAME": "bash"}, 1),
        # srun --pty my-shell
        (STEP | {"SLURM_JOB_NAME": "my-shell", "SLURM_PTY_PORT": "40000"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, 1),
        (STEP | {"SLURM_STEP_ID": "4294967290"}, 1),  # the shell of salloc where it is a step
        (STEP | {"SLURM_STEP_ID": "4294967291"}, 1),  # a batch script where it is a step
        (STEP | {"SLURM_STEP_ID": "batch"}, 1),
    ],
)
def test_a_single_process_is_told_from_the_tasks_of_srun(monkeypatch, variables, tasks):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm_tasks() == tasks
    check_launch(TrainerConfig(devices=tasks))
    environment = cluster_environment(TrainerConfig(devices=tasks))
    assert type(environment).__name__ == (
        "LightningEnvironment" if tasks == 1 else "SLURMEnvironment"
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1"},
        STEP | {"SLURM_JOB_NAME": "bash"},
    ],
)
def test_lightning_takes_a_single_process_in_a_slurm_job(monkeypatch, variables):
    import lightning as L

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=cluster_environment(TrainerConfig()),
        logger=False,
        enable_progress_bar=False,
    )
    assert trainer.world_size == 1 and trainer.is_global_zero


@pytest.mark.parametrize(
    "key",
    [
        "checkpoint.keep_last=0",
        "checkpoint.every_n_train_steps=0",
        "checkpoint.every_n_minutes=-1",
        "trainer.profiler=nsight",
        "trainer.export_dtype=fp8",
    ],
)
def test_values_that_no_run_could_use(key, make_config):
    with pytest.raises(ValueError, match=key):
        check_training(make_config(key))


def test_the_slurm_script_is_a_script_and_asks_for_the_signal_that_is_handled():
    path = ROOT / "conf" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert f"#SBATCH --signal={signal.SIGUSR1.name.removeprefix('SIG')}@" in path.read_text()
