"""Sweeps on the tiny model: killed, stopped and gone on with, as a user sees them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ipt.stage import hash_folder
from tests.commands import ROOT, run

RATIOS = ("0", "0.5", "1")
TINY = ["experiment=tiny", "synthesis=rule_based", "tasks=[held_out_perplexity]", "evaluation.limit=2", "trainer.max_steps=6"]
SWEEP = [str(ROOT / "train.py"), "-m", *TINY, f"mixture.ratios.instruction={','.join(RATIOS)}", "hydra.launcher.n_jobs=2"]
CPU = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # sums depend on the number of threads in their last bits


@pytest.fixture
def start():
    """Starts commands; what a failing test leaves running is killed."""
    started = []

    def start(*command: str, cwd: Path) -> subprocess.Popen:
        environment = {**os.environ, **CPU}
        started.append(subprocess.Popen([sys.executable, *command], cwd=cwd, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            _kill_all(process)


def _sweep(folder: Path) -> Path:
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    return sweep


def _jobs(folder: Path) -> list[dict]:
    return json.loads((_sweep(folder) / "sweep.json").read_text())["jobs"]


def _begun(folder: Path) -> int:
    """Trainings that have taken a step."""
    return len(list(folder.glob("outputs/stages/training-*/metrics.jsonl")))


def _wait_until(condition, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _kill_all(process: subprocess.Popen) -> None:
    """As when a machine goes down: the launcher and all below it at once."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model) -> Path:
    """A folder in which the sweep of all ratios has run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(*SWEEP, cwd=folder, **CPU)
    assert result.returncode == 0, result.stderr
    return folder


def _copy_what_trainings_share(whole: Path, folder: Path) -> None:
    """Copy the stages before the training, which are not what a test is about."""
    ignored = shutil.ignore_patterns("training-*", "evaluation-*", "contamination-*", ".*")
    shutil.copytree(whole / "outputs" / "stages", folder / "outputs" / "stages", ignore=ignored)


def test_killed_twice_the_same_command_finishes_with_the_same_models_and_scores(whole, start, tmp_path):
    _copy_what_trainings_share(whole, tmp_path)
    for kills in ("all", "launcher"):
        process = start(*SWEEP, cwd=tmp_path)
        begun = _begun(tmp_path)
        _wait_until(lambda begun=begun: _begun(tmp_path) > begun)
        assert process.poll() is None
        if kills == "all":
            _kill_all(process)
        else:
            jobs = psutil.Process(process.pid).children()
            process.kill()
            process.communicate()
            _wait_until(lambda jobs=jobs: not any(job.is_running() for job in jobs))  # none lives on
    result = run(*SWEEP, cwd=tmp_path, **CPU)
    assert result.returncode == 0, result.stderr
    interrupted, uninterrupted = _jobs(tmp_path), _jobs(whole)
    assert [job["name"] for job in interrupted] == [f"mixture.ratios.instruction={ratio}" for ratio in RATIOS]
    for left, right in zip(interrupted, uninterrupted, strict=True):
        exports = [hash_folder(folder / job["training"] / "export") for folder, job in ((tmp_path, left), (whole, right))]
        assert exports[0] == exports[1]
        results = [(folder / job["evaluation"] / "results.json").read_text() for folder, job in ((tmp_path, left), (whole, right))]
        assert results[0] == results[1]
        assert left["figures"] == right["figures"]
    assert len({job["figures"]["final loss"] for job in interrupted}) == len(RATIOS)  # the ratio was not ignored


def test_what_all_jobs_need_was_made_once_and_a_finished_sweep_starts_no_process(whole):
    logs = {path: path.read_text() for path in _sweep(whole).glob("jobs/*/log.txt")}
    assert sum("corpus: finished before" in log for log in logs.values()) == len(RATIOS) - 1
    assert sum("synthesis: finished before" in log for log in logs.values()) == len(RATIOS) - 2  # one ratio is zero
    result = run(*SWEEP, cwd=whole, **CPU)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("finished before") == 2 * len(RATIOS)  # each once as it is told, once in the table
    assert {path: path.read_text() for path in _sweep(whole).glob("jobs/*/log.txt")} == logs
    assert {job["status"] for job in _jobs(whole)} == {"skipped"}


def test_a_finished_job_whose_model_is_gone_is_done_again(whole):
    training = whole / _jobs(whole)[1]["training"]
    shutil.rmtree(training)
    result = run(*SWEEP, cwd=whole, **CPU)
    assert result.returncode == 0, result.stderr
    assert [entry["status"] for entry in _jobs(whole)] == ["skipped", "finished", "skipped"]
    assert (training / "export" / "model.safetensors").exists()


def test_a_failing_job_leaves_the_others_done(whole, tmp_path):
    stages = f"stages_dir={whole / 'outputs' / 'stages'}"
    ratios = "mixture.ratios.instruction=0,-1,1"
    command = [*SWEEP[:-2], stages, ratios, "hydra.launcher.n_jobs=2", "hydra.launcher.retries=1"]
    result = run(*command, cwd=tmp_path, **CPU)
    assert result.returncode == 1
    assert [job["status"] for job in _jobs(tmp_path)] == ["finished", "failed", "finished"]
    assert "mixture.ratios.instruction=-1.0: a ratio must be zero or more" in _jobs(tmp_path)[1]["error"]
    assert "running (try 2)" in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "error: 1 of 3 jobs failed; run the same command again to redo only those"


def test_ctrl_c_lets_the_running_job_save_and_the_sweep_end(whole, start, tmp_path):
    _copy_what_trainings_share(whole, tmp_path)
    command = [str(ROOT / "train.py"), "-m", *TINY[:2], "tasks=[]", "trainer.max_steps=1000", "trainer.checkpoint_minutes=null", "seed=1,2"]
    command += ["mixture.seq_len=64", "trainer.micro_batch_size=1"]
    process = start(*command, "trainer.checkpoint_steps=100000", cwd=tmp_path)
    _wait_until(lambda: list(tmp_path.glob("outputs/sweeps/*/jobs/0/training")))
    training = tmp_path / Path(next(tmp_path.glob("outputs/sweeps/*/jobs/0/training")).read_text())
    _wait_until((training / "metrics.jsonl").exists)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=500)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "error: stopped; the same command goes on from here"
    assert "stopping: 1 running jobs save first" in error
    assert [job["status"] for job in _jobs(tmp_path)] == ["interrupted", "interrupted"]
    assert "SIGTERM: saved after step" in (_sweep(tmp_path) / "jobs" / "0" / "log.txt").read_text()
    assert list((training / "checkpoints").iterdir())


def test_a_sweep_runs_once_at_a_time_and_jobs_do_not_share_a_folder(tmp_path):
    both = run(*SWEEP, "output_dir=here", cwd=tmp_path, **CPU)
    assert both.returncode == 1
    assert both.stderr.strip().splitlines()[-1].startswith("error: output_dir=here is the same for several jobs")
    interval = run(*SWEEP[:-2], "mixture.ratios.instruction=interval(0,1)", cwd=tmp_path, **CPU)
    assert interval.returncode == 1
    assert "a grid needs values" in interval.stderr


def test_under_submitit_a_preempted_job_saves_and_goes_on(whole, start, tmp_path):
    _copy_what_trainings_share(whole, tmp_path)
    steps = 120
    command = [str(ROOT / "train.py"), "-m", *TINY[:2], "tasks=[]", f"trainer.max_steps={steps}", "trainer.checkpoint_minutes=null"]
    command += ["mixture.seq_len=64", "trainer.micro_batch_size=1"]
    process = start(*command, "trainer.checkpoint_steps=100000", "hydra/launcher=submitit_local", "seed=1", cwd=tmp_path)
    _wait_until(lambda: list(tmp_path.glob("outputs/stages/training-*/metrics.jsonl")))
    (worker,) = [child for child in psutil.Process(process.pid).children(recursive=True) if "submitit.core._submit" in child.cmdline()]
    worker.send_signal(signal.SIGUSR2)
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    (job,) = _jobs(tmp_path)
    assert job["status"] == "finished"
    log = (_sweep(tmp_path) / "jobs" / "0" / "log.txt").read_text()
    assert log.count(" -m ipt train ") == 2  # begun twice
    assert "SIGTERM: saved after step" in log
    lines = (tmp_path / job["training"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
