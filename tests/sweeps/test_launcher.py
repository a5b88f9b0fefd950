"""How the jobs of a sweep are started and share a machine; tests/sweeps/test_sweep.py runs some."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import Config, TrainerConfig, compose_config
from ipt.sweeps.gpu_allocation import GpuAllocator, gpu_share, job_environment, visible_gpus
from ipt.sweeps.job import Job, load_job, save_job, varying_name
from ipt.sweeps.process import processes
from ipt.sweeps.progress import last_metrics

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("train", ["experiment=tiny"], []),
        ("train", ["experiment=tiny", "trainer.devices=4"], TORCHRUN),
        ("synthesize", ["trainer.devices=4"], []),
    ],
)
def test_a_job_of_several_processes_is_started_by_torchrun(command, overrides, expected):
    assert processes(command, compose_config(command, overrides)) == expected


def test_jobs_take_whole_gpus_or_share_one_and_give_them_back():
    slots = GpuAllocator(jobs=8, free=dict.fromkeys("abcd", 1.0))
    assert slots.take(0.5) == ["a"]
    assert slots.take(2) == ["b", "c"]
    assert slots.take(0.5) == ["a"]  # the begun one
    assert slots.take(2) is None  # one is left
    assert slots.take(1) == ["d"]
    assert slots.take(0.25) is None
    slots.give(["b", "c"], 2)
    assert slots.take(2) == ["b", "c"]


@given(
    st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0, 2.0]), max_size=12),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_no_gpu_is_given_away_twice_and_all_come_back(shares, gpus, jobs):
    slots = GpuAllocator(jobs, dict.fromkeys(map(str, range(gpus)), 1.0))
    taken = [(share, names) for share in shares if (names := slots.take(share)) is not None]
    for gpu in slots.free:
        assert sum(min(share, 1.0) for share, names in taken if gpu in names) <= 1 + 1e-6
    assert len(taken) <= jobs
    for share, names in taken:
        slots.give(names, share)
    assert slots.jobs == jobs
    assert all(free == pytest.approx(1) for free in slots.free.values())


def test_the_gpus_of_a_job_are_those_of_the_sweep():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert job_environment({}, ["5"], 2)["CUDA_VISIBLE_DEVICES"] == "5"
    assert gpu_share("train", Config(trainer=TrainerConfig(devices=4)), None) == 4
    assert gpu_share("train", Config(trainer=TrainerConfig(accelerator="cpu")), 1) == 0


def test_side_by_side_jobs_share_the_cores_unless_told_otherwise():
    assert "OMP_NUM_THREADS" not in job_environment({}, [], 1)
    assert int(job_environment({}, [], 2)["OMP_NUM_THREADS"]) == max(
        1, len(os.sched_getaffinity(0)) // 2
    )
    assert job_environment({"OMP_NUM_THREADS": "7"}, [], 2)["OMP_NUM_THREADS"] == "7"
    assert job_environment({"SLURM_PROCID": "3", "SLURM_JOB_ID": "12"}, [], 1).keys() & {
        "SLURM_PROCID",
        "SLURM_JOB_ID",
    } == {"SLURM_JOB_ID"}


def test_a_job_is_kept_as_it_is(tmp_path):
    job = Job(
        "seed=1",
        ("seed=1", "model=a"),
        "finished",
        training=tmp_path / "training",
        figures={"final loss": 2.5},
        number=3,
    )
    save_job(tmp_path, job)
    assert load_job(tmp_path, 3) == job
    assert load_job(tmp_path, 4) is None
    assert varying_name(["a.b=1", "+c=x=2", "seed=1"], ["a.b", "+c"]) == "a.b=1 c=x=2"


def test_the_last_metrics_of_a_job_are_read_while_they_are_written(tmp_path):
    assert last_metrics(tmp_path) == {}
    (tmp_path / "training").write_text(str(tmp_path))
    lines = [json.dumps({"step": step, "loss": 2.0}) for step in range(1, 1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert last_metrics(tmp_path) == {"step": 999, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1000, "lo')
    assert last_metrics(tmp_path) == {}


@pytest.mark.parametrize("saves", [False, True])
def test_a_job_ends_when_its_launcher_is_killed_and_saves_first_if_it_can(saves, tmp_path):
    job = (
        "import signal, sys, time; from ipt.sweeps.job import obey_launcher\n"
        f"if {saves}: signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), "
        "sys.exit()))\n"
        "obey_launcher(); open('ready', 'w').close()\n"
        "while True: time.sleep(0.1)"
    )
    launcher = (
        "import os, subprocess, sys, time\n"
        "environment = {**os.environ, 'IPT_LAUNCHER': str(os.getpid())}\n"
        f"process = subprocess.Popen([sys.executable, '-c', {job!r}], process_group=0, "
        "env=environment)\n"
        "print(process.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    _wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until(lambda: not _is_alive(child))
    assert (tmp_path / "saved").exists() == saves


def _is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
