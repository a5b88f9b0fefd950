"""Sweeps on the tiny model: killed, stopped and gone on with, as a user sees them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ipt.stage import hash_folder
from tests.commands import ROOT, run, run_here

RATIOS, STEPS = ("0.5", "1"), 20
TINY = [
    "experiment=tiny",
    "synthesis=rule_based",
    "tasks=[held_out_perplexity]",
    "evaluation.limit=2",
    f"trainer.max_steps={STEPS}",
]
TINY += [
    "mixture.seq_len=64",
    "trainer.micro_batch_size=1",
    "checkpoint.every_n_minutes=null",
    "checkpoint.every_n_train_steps=100000",
]
KEYS = ["-m", *TINY, f"mixture.ratios.instruction={','.join(RATIOS)}"]
SWEEP = [str(ROOT / "train.py"), *KEYS]
SIDE_BY_SIDE = "hydra.launcher.n_jobs=2"
# sums depend on the number of threads in their last bits
CPU = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts commands. Those that a failing test leaves running are killed."""
    started = []

    def start(*command: str, cwd: Path) -> "subprocess.Popen[str]":
        environment = {**os.environ, **CPU}
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=cwd,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
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


def _logs(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in _sweep(folder).glob("jobs/*/log.txt")}


def _steps(folder: Path) -> dict[Path, int]:
    """Size of the metrics of each training that has taken a step."""
    sizes = {
        path: path.stat().st_size for path in folder.glob("outputs/stages/training-*/metrics.jsonl")
    }
    return {path: size for path, size in sizes.items() if size}


def _wait_until(condition: Callable[[], bool], seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _wait_for_a_step(folder: Path) -> None:
    """Until a training that is started again has taken a step. It may first cut its metrics to
    those of its checkpoint.
    """
    before = _steps(folder)
    _wait_until(lambda: _steps(folder) != before)
    begun = _steps(folder)
    _wait_until(lambda: any(size > begun.get(path, 0) for path, size in _steps(folder).items()))


def _kill_all(process: "subprocess.Popen[str]") -> None:
    """As when a machine goes down: the launcher and all below it at once."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()


def _tell_while_it_holds(job: psutil.Process, told: psutil.Process, signal_number: int) -> None:
    """Send a signal to the process that has started the job. Until that passes it on as SIGTERM,
    the job takes no further step.
    """
    job.suspend()
    told.send_signal(signal_number)
    status = Path(f"/proc/{job.pid}/status")
    _wait_until(lambda: _is_pending(status, signal.SIGTERM))
    job.resume()


def _is_pending(status: Path, number: int) -> bool:
    (mask,) = (
        line.split()[1]
        for line in status.read_text(encoding="utf-8").splitlines()
        if line.startswith("ShdPnd:")
    )
    return bool(int(mask, 16) >> (number - 1) & 1)


@dataclass(frozen=True)
class Swept:
    """A sweep that was killed twice, stopped once, and finished; and what was seen of it on the
    way.
    """

    folder: Path
    first_logs: list[str]  # when it was killed for the first time
    stop_code: int
    stop_error: str
    stop_log: str
    stop_statuses: list[str]
    stop_checkpoints: set[str]  # new ones


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, start: Start) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    process = start(*SWEEP, SIDE_BY_SIDE, cwd=folder)
    _wait_until(lambda: len(_steps(folder)) == len(RATIOS))
    assert process.poll() is None
    _kill_all(process)
    first_logs = list(_logs(folder).values())

    process = start(*SWEEP, cwd=folder)
    _wait_for_a_step(folder)
    jobs = psutil.Process(process.pid).children()
    assert process.poll() is None and jobs
    process.kill()
    process.communicate()
    _wait_until(lambda: not any(job.is_running() for job in jobs))  # none lives on

    stop = _stopped(start(*SWEEP, cwd=folder), folder)
    result = run(*SWEEP, SIDE_BY_SIDE, cwd=folder, **CPU)
    assert result.returncode == 0, result.stderr
    return Swept(folder, first_logs, *stop)


def _stopped(
    process: "subprocess.Popen[str]", folder: Path
) -> tuple[int, str, str, list[str], set[str]]:
    """Press Ctrl-C during a training, and tell what came of it."""
    checkpoints, logs = _checkpoints(folder), _logs(folder)
    _wait_for_a_step(folder)
    (job,) = psutil.Process(process.pid).children()
    _tell_while_it_holds(job, psutil.Process(process.pid), signal.SIGINT)
    _, error = process.communicate(timeout=500)
    log = "".join(text.removeprefix(logs.get(path, "")) for path, text in _logs(folder).items())
    return (
        process.returncode,
        error,
        log,
        [job["status"] for job in _jobs(folder)],
        _checkpoints(folder) - checkpoints,
    )


def _checkpoints(folder: Path) -> set[str]:
    return {str(path) for path in folder.glob("outputs/stages/training-*/checkpoints/*")}


def test_killed_twice_and_stopped_the_same_sweep_finishes_with_the_same_models_and_scores(
    swept, tmp_path, monkeypatch
):
    jobs = _jobs(swept.folder)
    assert [job["name"] for job in jobs] == [
        f"mixture.ratios.instruction={ratio}" for ratio in RATIOS
    ]
    for interrupted, ratio in zip(jobs, RATIOS, strict=True):
        place = tmp_path / ratio
        place.mkdir()
        monkeypatch.setenv("IPT_JOB_FOLDER", str(place))
        result = run_here("train", *TINY, f"mixture.ratios.instruction={ratio}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        whole = json.loads((place / "result.json").read_text())
        both = ((swept.folder, interrupted), (tmp_path, whole))
        exports = [hash_folder(folder / job["training"] / "export") for folder, job in both]
        assert exports[0] == exports[1]
        results = [
            (folder / job["evaluation"] / "results.json").read_text() for folder, job in both
        ]
        assert results[0] == results[1]
        assert interrupted["figures"] == whole["figures"]
    # the ratio was not ignored
    assert len({job["figures"]["final loss"] for job in jobs}) == len(RATIOS)


def test_ctrl_c_lets_the_running_job_save_and_the_sweep_end(swept):
    assert swept.stop_code == 130, swept.stop_error
    assert (
        swept.stop_error.strip().splitlines()[-1]
        == "error: interrupted: run the same command again to resume"
    )
    assert "stopping: waiting for 1 running jobs to save" in swept.stop_error
    assert swept.stop_statuses == ["interrupted", "interrupted"]
    assert "SIGTERM: saved after step" in swept.stop_log
    assert swept.stop_checkpoints


def test_what_all_jobs_need_was_made_once_and_a_finished_sweep_starts_no_process(swept):
    for stage in ("build corpus", "synthesize pairs"):
        reused = re.compile(f"{stage}: (cached|done by another process), ")
        assert sum(bool(reused.search(log)) for log in swept.first_logs) == len(RATIOS) - 1
    logs = _logs(swept.folder)
    result = run(*SWEEP, cwd=swept.folder, **CPU)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("skipped, already finished") == len(RATIOS)
    assert _logs(swept.folder) == logs
    assert {job["status"] for job in _jobs(swept.folder)} == {"skipped"}


def test_a_finished_job_whose_model_is_gone_is_done_again_and_is_in_the_group_of_the_sweep_in_wandb(
    swept,
):
    training = swept.folder / _jobs(swept.folder)[1]["training"]
    shutil.rmtree(training)
    # the logger changes nothing in the jobs
    same = f"hydra.sweep.dir={_sweep(swept.folder).relative_to(swept.folder)}"
    result = run(*SWEEP, "logger=wandb", same, cwd=swept.folder, **CPU)
    assert result.returncode == 0, result.stderr
    assert [entry["status"] for entry in _jobs(swept.folder)] == ["skipped", "finished"]
    assert (training / "export" / "model.safetensors").exists()
    (log,) = training.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    records = subprocess.run(inspect, capture_output=True, text=True, timeout=300)
    assert '"sweep-mixture_ratios_instruction"' in records.stdout
    assert "loss/" in records.stdout


def test_a_failing_job_leaves_the_other_done_and_a_second_sweep_finds_the_model_of_the_first(
    swept, tmp_path
):
    stages = f"stages_dir={swept.folder / 'outputs' / 'stages'}"
    ratios = "mixture.ratios.instruction=-1,1"
    result = run(*SWEEP[:-1], stages, ratios, "hydra.launcher.retries=1", cwd=tmp_path, **CPU)
    assert result.returncode == 1
    assert [job["status"] for job in _jobs(tmp_path)] == ["failed", "finished"]
    assert (
        "mixture.ratios.instruction=-1.0: a ratio must be zero or more"
        in _jobs(tmp_path)[0]["error"]
    )
    assert "running (try 2)" in result.stderr
    assert (
        result.stderr.strip().splitlines()[-1]
        == "error: 1 of 2 jobs failed; run the same command again to rerun only those"
    )
    table = result.stderr[result.stderr.index("Sweep") :]
    rows = [line.split() for line in table.splitlines() if line.startswith("│")]
    assert [row[5] for row in rows] == ["failed", "finished"]
    assert sum("train: cached, " in log for log in _logs(tmp_path).values()) == 1


def test_a_sweep_runs_once_at_a_time_and_jobs_do_not_share_a_folder(tmp_path):
    both = run_here("train", *KEYS, "output_dir=here", cwd=tmp_path)
    assert both.returncode == 1
    assert (
        both.stderr.strip()
        .splitlines()[-1]
        .startswith("error: output_dir=here is the same for several jobs")
    )
    interval = run_here(
        "train", *KEYS[:-1], "mixture.ratios.instruction=interval(0,1)", cwd=tmp_path
    )
    assert interval.returncode == 1
    assert "a grid needs values" in interval.stderr


def test_under_submitit_a_preempted_job_saves_and_goes_on(swept, start, tmp_path):
    # what trainings share stays
    ignored = shutil.ignore_patterns("training-*", "evaluation-*", "contamination-*", ".*")
    shutil.copytree(
        swept.folder / "outputs" / "stages", tmp_path / "outputs" / "stages", ignore=ignored
    )
    command = [*SWEEP[:-1], "tasks=[]", "hydra/launcher=submitit_local", "seed=1"]
    process = start(*command, cwd=tmp_path)
    _wait_until(lambda: bool(_steps(tmp_path)))
    (worker,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "submitit.core._submit" in child.cmdline()
    ]
    (job,) = worker.children()
    _tell_while_it_holds(job, worker, signal.SIGUSR2)
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    (job,) = _jobs(tmp_path)
    assert job["status"] == "finished"
    (log,) = _logs(tmp_path).values()
    assert log.count(" -m ipt train ") == 2  # begun twice
    assert "SIGTERM: saved after step" in log
    lines = (tmp_path / job["training"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
