import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipt.synthesis.engines.subprocess import MARK, ProcessReaper

# A run with an engine that ends only by a signal, like vLLM's. It prints the process ids.
RUN = """
import subprocess, time
from ipt.synthesis.engines.subprocess import ProcessReaper
before = subprocess.Popen(["sleep", "600"])
reaper = ProcessReaper()
engine = subprocess.Popen(
    ["sh", "-c", "sleep 600 & echo $!; wait"],
    start_new_session=True,
    stdout=subprocess.PIPE,
    text=True,
)
print(before.pid, engine.pid, engine.stdout.readline().strip(), reaper.scratch, flush=True)
time.sleep(600)
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_killed_run_takes_its_engine_and_the_engines_children_with_it():
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    *pids, scratch = process.stdout.readline().split()
    before, *engine = map(int, pids)
    Path(scratch, "socket").touch()
    assert len(engine) == 2 and all(lives(pid) for pid in (before, *engine))
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while any(lives(pid) for pid in engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(lives(pid) for pid in engine)
    while Path(scratch).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(scratch).exists()
    assert lives(before)  # started before the reaper
    os.kill(before, signal.SIGKILL)


def test_closing_ends_what_is_left_and_takes_the_mark_back():
    reaper = ProcessReaper()
    engine = subprocess.Popen(["sleep", "600"])
    reaper.close()
    assert engine.wait(timeout=120) == -signal.SIGKILL
    assert MARK not in os.environ and not Path(reaper.scratch).exists()
