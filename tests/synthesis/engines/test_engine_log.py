import subprocess
import sys
from pathlib import Path

CODE = """
import subprocess, sys
from ipt.synthesis.engines.subprocess import EngineLog
log = EngineLog()
print("out before", flush=True)
with log.child_output():
    script = "sleep 0.5; echo child out; echo 'x ValueError: no room' >&2"
    child = subprocess.Popen(["sh", "-c", script])
    print("out during"); print("err during", file=sys.stderr)
print("out after"); print("err after", file=sys.stderr)
child.wait()
assert "child out" in log.path.read_text()
if sys.argv[1] == "fail":
    print(log.cause())
log.close()
print(log.path.exists())
"""


def test_children_print_to_the_log_and_this_process_where_it_did():
    result = subprocess.run(
        [sys.executable, "-c", CODE, "well"], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["out before", "out during", "out after", "False"]
    assert result.stderr.splitlines() == ["err during", "err after"]


def test_the_log_stays_where_an_error_points_to_it():
    result = subprocess.run(
        [sys.executable, "-c", CODE, "fail"], capture_output=True, text=True, check=True
    )
    cause, exists = result.stdout.splitlines()[-2:]
    error, path = cause.split("; its log is ")
    assert error == "ValueError: no room"
    assert exists == "True"
    Path(path).unlink()
