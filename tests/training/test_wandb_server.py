"""The command `train` with W&B servers that are dead, hang, or stop answering during the run."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ipt.cli import COMMANDS, QUIET
from ipt.config import conf_dir
from tests.processes import Ended, run_together

KINDS = ("refuses", "hangs", "stops")
ARGUMENTS = ["experiment=tiny", "synthesis=rule_based", "trainer.max_steps=3", "tasks=[]"]
ARGUMENTS += ["logger=[wandb,csv]", "logger.wandb.settings.init_timeout=5"]
ARGUMENTS += ["logger.wandb.settings.finish_timeout=1"]
# W&B's answer to the request that creates a run
CREATED = {"project": {"name": "ipt", "entity": {"name": "me"}}, "config": "{}"}
CREATED |= {"id": "1", "displayName": "run", "historyLineCount": 0}


class Server(ThreadingHTTPServer):
    """Hangs at once ("hangs"), or after a run is created ("stops")."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hangs = kind == "hangs"
        self.requests = 0
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests += 1
        if self.server.hangs:
            self.server.released.wait()
            return
        data: dict[str, object] = {}
        if b"mutation UpsertBucket" in body:
            bucket = {**CREATED, "name": json.loads(body)["variables"]["name"]}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            self.server.hangs = True
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    with Server(kind) as server:
        if kind == "refuses":
            server.socket.close()
            yield server
            return
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def train(folder: Path) -> None:
    """The command, with what a Python process does when it exits."""
    sys.argv[1:] = [*ARGUMENTS, f"stages_dir={folder / 'stages'}"]
    sys.argv.append(f"output_dir={folder / os.environ['KIND']}")
    COMMANDS["train"]()
    atexit._run_exitfuncs()


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, Ended, list[int]]:
    """Commands that ran at the same time, each with its server; the folder of their results, and
    the number of requests to each server.
    """
    folder = tmp_path_factory.mktemp("wandb")
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(kind)) for kind in KINDS]
        environments = []
        for kind, server in zip(KINDS, servers, strict=True):
            environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
            environment["WANDB_SERVICE"] = ""  # not that of earlier tests
            environment |= {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}
            environments.append({**environment, "WANDB_HTTP_TIMEOUT": "2", "KIND": kind})
        result = run_together(train, folder, environments=environments)
    return folder, result, [server.requests for server in servers]


@pytest.mark.parametrize("number", range(3), ids=KINDS)
def test_training_finishes_and_one_warning_has_the_command_that_uploads_the_run(ended, number):
    folder, result, requests = ended
    run, output = folder / KINDS[number], result.outputs[number]
    assert result.codes[number] == 0, output
    assert (requests[number] > 0) == (KINDS[number] != "refuses")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(next(run.glob("csv/*/metrics.csv")).read_text().splitlines()) == 4
    (warning,) = [line for line in output.splitlines() if "wandb sync" in line]
    uploaded = Path(warning.partition("wandb sync ")[2])
    assert uploaded.name.startswith("run-" if KINDS[number] == "stops" else "offline-run-")
    records = inspect(next(uploaded.glob("*.wandb")))
    steps = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [step["tokens"] for step in steps if "loss" in step] == [512, 1024, 1536]


def inspect(file: Path) -> list[dict]:
    """The records of a W&B file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_server_delays_a_command_by_less_than_a_minute():
    """The sum of what it can wait for: the start, two requests for artifacts, and the end."""
    settings = OmegaConf.load(conf_dir() / "logger" / "wandb.yaml").wandb.settings
    requests = 2 * float(QUIET["WANDB_HTTP_TIMEOUT"])
    assert max(settings.init_timeout, requests) + settings.finish_timeout < 60
