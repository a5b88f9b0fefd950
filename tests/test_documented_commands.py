"""The commands of the README and of docs/ exist, and their overrides compose. `make check` runs
them.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins

from ipt.arguments import plain_arguments
from ipt.config import Config, conf_dir, to_config
from tests.documented import ROOT, Documented, documented_commands, tutorial_files

COMMANDS = list(dict.fromkeys(documented_commands()))
CONFIGURED = [command for command in COMMANDS if command.command]
OTHERS = [command for command in COMMANDS if not command.command]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    for name, content in tutorial_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def overrides_of(command: Documented, folder: Path) -> list[str]:
    """What Hydra composes for one job; of the values of a sweep, the first."""
    keys = [
        word
        for word in command.arguments
        if not word.startswith("-") and not word.startswith("hydra")
    ]
    if "-m" in command.arguments:
        keys = [re.sub(r"=([^\[{(,]+),.*", r"=\1", key) for key in keys if "interval(" not in key]
    if any(word.startswith("--config-dir") for word in command.arguments):
        keys.append(f"hydra.searchpath=[file://{folder}/books]")
    return keys


def test_the_pages_have_commands():
    assert len(CONFIGURED) >= 30 and len(OTHERS) >= 10
    assert {command.command for command in CONFIGURED} >= {
        "synthesize",
        "train",
        "evaluate",
        "chat",
        "reproduce",
        "playground",
    }


@pytest.mark.parametrize("command", CONFIGURED, ids=str)
def test_its_overrides_compose(command, tutorial):
    Plugins.instance()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = to_config(
            compose(command.command, plain_arguments(overrides_of(command, tutorial), Config))
        )
    for word in overrides_of(command, tutorial):
        key, _, value = word.removeprefix("+").partition("=")
        if key == "output_dir":
            assert config.output_dir == value


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_what_it_runs_exists(command):
    if command.words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert command.words[1] in targets
    elif command.words[0].endswith(".sh"):
        assert (ROOT / command.words[0]).is_file()
    elif command.program[0] == "-m":
        assert importlib.util.find_spec(command.program[1])
    elif not command.program[0].startswith("books/"):  # the tutorial's own script
        assert (ROOT / command.program[0]).is_file()
