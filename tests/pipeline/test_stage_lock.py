"""A stage that several processes need at the same time is worked on by one of them."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ipt.stage import STARTED, find_stage, run_stage

WORKER = """
import sys, time
from pathlib import Path
from ipt.console import setup_logging
from ipt.stage import run_stage
setup_logging()
def work(folder):
    (folder / f"begun-{sys.argv[1]}").touch()
    print("at work", flush=True)
    while sys.argv[1] == "first" and not Path("go").exists():
        time.sleep(0.05)
    (folder / "data").write_text("done")
    return {}
stage = run_stage("slow", Path("slow"), work, config={}, inputs={})
print("reused" if stage.reused else "made", flush=True)
"""


def _worker(folder: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, name]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_others_say_whom_they_wait_for_and_then_reuse(tmp_path):
    first = _worker(tmp_path, "first")
    assert first.stdout.readline() == "at work\n"
    second = _worker(tmp_path, "second")
    assert f"slow: waiting for process {first.pid} on " in second.stderr.readline()
    (tmp_path / "go").touch()
    assert second.communicate(timeout=300)[0] == "reused\n"
    assert first.communicate(timeout=300)[0] == "made\n"


def test_a_killed_holder_holds_nobody_up(tmp_path):
    first = _worker(tmp_path, "first")
    assert first.stdout.readline() == "at work\n"
    second = _worker(tmp_path, "second")
    assert "waiting for process" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=300)[0] == "at work\nmade\n"
    assert (tmp_path / "slow" / "begun-first").exists()  # it went on in the same folder


def test_a_run_killed_while_it_writes_its_first_record_can_be_repeated(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / f".{STARTED}.a1b2c3d4").touch()  # the temporary file of an atomic write
    stage = run_stage("some", folder, lambda folder: {}, config={}, inputs={})
    assert not stage.reused and not list(folder.glob(f"*{STARTED}*"))


def test_a_stage_is_found_only_when_it_is_finished(tmp_path):
    identity = {"config": {"a": 1}, "inputs": {}, "stages_dir": tmp_path}
    assert find_stage("some", None, **identity) is None
    stage = run_stage("some", None, lambda folder: {}, **identity)
    assert find_stage("some", None, **identity).folder == stage.folder
    assert find_stage("some", None, **identity | {"config": {"a": 2}}) is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_a_stage_has_held_goes_back(tmp_path):
    process, last = psutil.Process(), []
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have left free would be taken first
    before = process.memory_info().rss

    def work(folder):
        blocks = [bytearray(b"x" * 100_000) for _ in range(5000)]
        # behind them: without a hint the C library keeps what is free before it
        last.append(bytearray(b"x" * 100_000))
        held.append(process.memory_info().rss)
        return {"blocks": len(blocks)}

    held = []
    run_stage("large", tmp_path / "large", work, config={}, inputs={})
    assert held[0] - before > 400e6
    assert process.memory_info().rss - before < 100e6
