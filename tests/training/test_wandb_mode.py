"""Who decides whether Weights & Biases is reached: the config, then W&B's variables and files, then
whether there is a key.
"""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ipt.config import Config, LoggerConfig
from ipt.training.logger import build_loggers
from ipt.training.wandb_mode import DISABLED, OFFLINE, ONLINE, has_key, wandb_mode

KEY = "0" * 40
SERVICE = "WANDB_SERVICE"
VARIABLES = (
    "WANDB_MODE",
    "WANDB_DISABLED",
    "WANDB_API_KEY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_BASE_URL",
    "WANDB_CONFIG_DIR",
    "NETRC",
)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home folder and a current folder without anything of W&B's. The environment is as before
    afterwards.
    """
    before = dict(os.environ)
    for name in (*VARIABLES, "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    service = os.environ.get(SERVICE)  # of W&B's own process, which a test may have ended
    os.environ.clear()
    os.environ.update(before)
    os.environ.pop(SERVICE, None)
    if service:
        os.environ[SERVICE] = service


@pytest.mark.parametrize(
    ("variables", "offline", "mode"),
    [
        ({}, None, OFFLINE),
        ({"WANDB_API_KEY": KEY}, None, ONLINE),
        ({"WANDB_API_KEY": " "}, None, OFFLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, None, OFFLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, None, OFFLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, None, DISABLED),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, None, ONLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "shared"}, None, ONLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "ofline"}, None, OFFLINE),
        ({"WANDB_MODE": "online"}, None, OFFLINE),  # W&B would ask for a key, or wait
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, None, DISABLED),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "false"}, None, ONLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, False, ONLINE),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "1"}, True, OFFLINE),
        ({"WANDB_IDENTITY_TOKEN_FILE": "/token"}, None, ONLINE),
    ],
)
def test_the_variables_decide_where_the_config_does_not(
    home, monkeypatch, variables, offline, mode
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(offline).mode == mode


@pytest.mark.parametrize("place", [".config/wandb", "wandb"])
def test_settings_that_wandb_writes_decide_too(home, monkeypatch, place):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (home / place).mkdir(parents=True)
    for content, mode in {
        "mode = offline": OFFLINE,
        "disabled = true": OFFLINE,
        "mode = online": ONLINE,
        "entity = 100%": ONLINE,
    }.items():
        (home / place / "settings").write_text(f"[default]\n{content}\n")
        assert wandb_mode(None).mode == mode


def test_a_key_in_netrc(home, monkeypatch):
    (home / ".netrc").write_text(f"machine 127.0.0.1:8123 login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)
    assert not has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8123")
    assert has_key() and wandb_mode(None).mode == ONLINE
    monkeypatch.setenv("NETRC", str(home / "other"))
    assert not has_key()


def fill_folder(path):
    path.mkdir(parents=True)


def fill_bytes(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xfe machine")


def fill_half(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[default\nmachine a password")


@pytest.mark.parametrize("fill", [fill_folder, fill_bytes, fill_half])
@pytest.mark.parametrize("name", [".netrc", ".config/wandb/settings", "wandb/settings"])
def test_a_file_that_cannot_be_read_means_offline(home, monkeypatch, name, fill):
    if name != ".netrc":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    fill(home / name)
    mode, reason = wandb_mode(None)
    assert mode == OFFLINE and f"{name} cannot be read (" in reason and "\n" not in reason


@pytest.fixture
def requests(monkeypatch):
    """The requests that a server gets, which W&B takes for its own."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.path)
            self.send_error(404)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield got
        server.shutdown()


@pytest.mark.parametrize("case", ["offline", "disabled", "broken"])
def test_nothing_is_sent_and_one_line_says_why(home, monkeypatch, requests, case, capfd):
    import wandb

    wandb.teardown()  # its settings are read once
    output = home / "run"
    output.mkdir()
    if case == "broken":
        fill_bytes(home / ".config/wandb/settings")
    else:
        monkeypatch.setenv("WANDB_MODE", case)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    loggers = build_loggers(
        Config(logger=LoggerConfig(name="wandb", timeout=1)), "training", output, None
    )
    for logger in loggers:
        logger.log_metrics({"loss": 1.0}, 1)
        logger.close()
    wandb.teardown()
    assert len(loggers) == (case != "disabled")
    assert requests == []
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("W&B: ")]
    assert len(lines) == (case != "offline"), lines
