"""The config group `logger`, and what reaches the loggers of a run."""

import csv
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from ipt.config import Config, compose_config
from ipt.errors import UserError
from ipt.training.logger import check_loggers, has_wandb_key, log_metrics, open_loggers
from tests import warm
from tests.processes import run_together

KEY = "0" * 40
CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": None, "name": "csv"}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home folder without any settings of W&B, and W&B as in a new process."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["logger=null"], []),
        (["logger=[]"], []),
        (["logger=wandb"], ["wandb"]),
        (["logger=[wandb,csv]"], ["wandb", "csv"]),
        (["logger=[wandb,csv]", "logger.wandb=null"], ["csv"]),
        (["+logger.own={_target_: a.Logger, key: 1}"], ["own"]),
    ],
)
def test_several_loggers_and_none(overrides, names):
    assert list(compose_config("train", overrides).loggers) == names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+logger.project=trials", "logger.project is now called logger.wandb.project"),
        ("+logger.upload=true", "logger.upload is now called logger.wandb.log_model"),
        ("+logger.other=1", "there is no key logger.other: choose logger=other first"),
        ("+logger.own.save_dir=x", "logger.own: _target_ must name the class"),
    ],
)
def test_entries_that_are_no_loggers_raise_an_error(override, message):
    with pytest.raises(UserError, match=message):
        compose_config("train", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+logger.wandb.colour=red", "logger.wandb: .*'colour'"),
        ("+logger.wandb.settings.colour=red", "logger.wandb: .*colour Extra inputs"),
        ("logger.wandb.settings.init_timeout=soon", "logger.wandb: .*init_timeout"),
        ("logger.wandb._target_=lightning.pytorch.Trainer", "not a Lightning logger"),
        ("logger.wandb._target_=lightning.pytorch.Missing", "logger.wandb: .*Missing"),
        ("+logger.csv={_target_: lightning.pytorch.loggers.CSVLogger}", "logger.csv: .*save_dir"),
        ("logger.wandb.project=a/b", "logger.wandb: Invalid project name"),
    ],
)
def test_wrong_arguments_raise_an_error_before_any_work(home, override, message):
    with pytest.raises(UserError, match=message):
        check_loggers(compose_config("train", ["logger=wandb", override]))


def test_an_offline_run_cannot_upload_the_model(home):
    overrides = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.log_model=true"]
    with pytest.raises(UserError, match="log_model=True"):
        check_loggers(compose_config("train", overrides))


@pytest.mark.parametrize(
    ("variables", "online"),
    [
        ({}, False),
        ({"WANDB_API_KEY": KEY}, True),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, False),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, False),
        # W&B alone would ask for a key
        ({"WANDB_MODE": "online"}, False),
        ({"NETRC": "key", "WANDB_BASE_URL": "http://127.0.0.1:8123"}, True),
        ({"NETRC": "key"}, False),
    ],
)
def test_a_key_is_needed_to_be_online(home, monkeypatch, variables, online):
    (home / "key").write_text(f"machine 127.0.0.1:8123 login user password {KEY}\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_wandb_key() == online


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "ofline"), ("WANDB_API_KEY", "short"), ("NETRC", "netrc")]
)
def test_settings_that_wandb_cannot_read_raise_an_error(home, monkeypatch, name, value):
    (home / "netrc").write_bytes(b"\xff\xfe machine")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape("logger.wandb: W&B: ")):
        check_loggers(compose_config("train", ["logger=wandb"]))


@pytest.fixture
def requests(monkeypatch):
    """The requests to a server that W&B believes to be its own."""
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.path)
            self.send_error(404)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield received
        server.shutdown()


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        ({}, [], "W&B has no API key. To upload the run later: wandb sync"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, [], ""),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, [], ""),
        ({"WANDB_API_KEY": KEY}, ["logger.wandb.offline=true"], ""),
    ],
    ids=["no key", "offline", "disabled", "argument"],
)
def test_nothing_is_sent(home, monkeypatch, requests, variables, overrides, message, caplog):
    import wandb

    caplog.set_level("INFO", "ipt")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", variables.get("WANDB_MODE", "online"))
    config = compose_config("train", ["logger=wandb", *overrides])
    check_loggers(config)
    with open_loggers(config, "training", home) as loggers:
        log_metrics(loggers, {"loss": 1.0}, 1)
    wandb.teardown()
    assert requests == []
    lines = [record.message for record in caplog.records if record.name.startswith("ipt")]
    assert len(lines) == bool(message) and message in "".join(lines)
    written = list(home.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == (variables.get("WANDB_MODE") != "disabled")


def test_a_logger_that_fails_is_dropped_and_the_others_get_all_steps(tmp_path, caplog):
    broken = {**CSV, "name": "broken", "flush_logs_every_n_steps": 1}
    with open_loggers(Config(logger={"a": broken, "b": CSV}), "training", tmp_path) as loggers:
        kept = list(loggers)
        log_metrics(kept, {"loss": 1.0}, 1)
        shutil.rmtree(tmp_path / "broken")
        for step in (2, 3):
            log_metrics(kept, {"loss": 1.0}, step)
        assert kept == loggers[1:]
    assert "CSVLogger failed (" in caplog.text
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_arguments_that_are_null_are_filled_in(tmp_path):
    config = Config(name="test", logger={"csv": {**CSV, "version": "here", "name": None}})
    with open_loggers(config, "training arm", tmp_path) as (logger,):
        assert isinstance(logger, CSVLogger)
    assert (tmp_path / "test training arm" / "here" / "hparams.yaml").exists()


def test_without_it_nothing_is_imported():
    """In a process that imported all modules that use W&B (tests/warm.py), and none that only tests
    need.
    """
    ended = run_together(print_imported, environments=[{}])
    assert (ended.codes, ended.output) == ([0], "[]\n")


def print_imported() -> None:
    assert set(warm.MODULES) <= sys.modules.keys()
    with open_loggers(Config(), "training", Path()) as loggers:
        assert loggers == []
    print([name for name in sys.modules if name.partition(".")[0] in ("wandb", "wandb_workspaces")])
