"""A W&B whose server, process or disk does not do its part: the training goes on all the same."""

import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from ipt.config import LoggerConfig
from ipt.training.logger import build_loggers
from tests.training.jobs import train

CALLS = 2000


@pytest.fixture
def server(request, monkeypatch):
    """A server that answers no request ("hang"), each with 500 ("fail"), or that is not there
    ("refuse").
    """
    import wandb

    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            if request.param == "hang":
                released.wait()
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    wandb.teardown()  # its settings are read once
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        if request.param != "refuse":
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.socket.close()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_SILENT", "true")
        yield request.param
        released.set()
        wandb.teardown()
        if request.param != "refuse":
            server.shutdown()


@pytest.fixture
def begun(make_config, tmp_path):
    """A training's logger, offline, and W&B's process."""
    tmp_path.joinpath("run").mkdir()
    config = make_config("logger.name=wandb", "logger.offline=true", "logger.timeout=1")
    (logger,) = build_loggers(config, "training", tmp_path / "run", None)
    logger.send(lambda run: None)
    assert logger._relay.wait(60)
    children = [
        child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE
    ]
    (process,) = [child for child in children if child.name() == "wandb-core"]
    yield config, logger, process
    logger.close()


@pytest.mark.parametrize("server", ["hang", "fail", "refuse"], indirect=True)
def test_a_run_is_offline_where_the_server_does_not_answer(server, tmp_path, capfd):
    from ipt.training.wandb_run import open_run

    started = time.monotonic()
    logger = open_run(LoggerConfig(name="wandb", timeout=1), tmp_path, False, id="abc", name="run")
    assert logger is not None and logger.run.offline
    assert time.monotonic() - started < 90  # W&B's own limit
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 0
    assert "W&B: offline (" in capfd.readouterr().err


def hang(process):
    process.suspend()


def die(process):
    process.kill()


def fill_disk(process):
    size = 2**12
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("trouble", [hang, die, fill_disk])
def test_a_training_goes_on_whatever_becomes_of_wandb(trouble, begun, stores, tmp_path):
    config, logger, process = begun
    trouble(process)
    output = tmp_path / "run"
    assert train(config, stores, output, lambda: [logger])["steps"] == 6
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 6
    started = time.monotonic()
    logger.close()
    assert time.monotonic() - started < 90


@pytest.mark.parametrize("trouble", [hang, die])
def test_logging_does_not_wait(trouble, begun, capfd):
    _, logger, process = begun
    trouble(process)
    record = {f"loss/{number}": 0.1 for number in range(20)}
    seconds = []
    for step in range(CALLS):
        started = time.monotonic()
        logger.log_metrics(record, step)
        seconds.append(time.monotonic() - started)
    assert (
        sorted(seconds)[CALLS // 2] < 0.1
    )  # a call that waited for W&B would take a second (logger.timeout)
    logger.close()
    assert "records are not in" in capfd.readouterr().err
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
