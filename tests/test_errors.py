"""How commands print errors: those of the user as one line, all others with their traceback."""

import copy
import pickle

import pytest

from ipt.chat_templates import TemplateFails
from ipt.cli import exit_on_user_error
from ipt.errors import MissingFileError, UserError
from ipt.synthesis.engines import EngineDied
from tests.commands import run_here


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError, KeyError])
def test_an_error_of_the_package_keeps_its_traceback(kind, tmp_path, monkeypatch):
    from ipt.pipeline import validation

    def broken(path):
        raise kind("of ours")

    monkeypatch.setitem(broken.__globals__, "__name__", "ipt.pipeline.validation")  # as if it were defined there
    monkeypatch.setattr(validation, "check_model", broken)
    process = run_here("evaluate", "model=embedded:smollm2", "tasks=[ontology]", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback") and "in check_evaluate" in process.stderr and "of ours" in process.stderr


@pytest.mark.parametrize("kind", [UserError, MissingFileError, EngineDied])
def test_an_error_of_the_user_is_one_line(kind, tmp_path, monkeypatch):
    from ipt.pipeline import validation

    def fails(path):
        raise kind("a.jsonl, line 3: found 1,\nexpected text")

    monkeypatch.setattr(validation, "check_model", fails)
    process = run_here("evaluate", "model=embedded:smollm2", "tasks=[ontology]", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (1, "error: a.jsonl, line 3: found 1, expected text\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "missing"), "missing holds no manifest.json"),
        (("runs", "missing"), "missing is no folder"),
        (("report", "missing"), "missing holds no training"),
        (("dashboard", "colour=red"), "colour=red is none of project="),
    ],
)
def test_all_commands_print_errors_of_the_user_in_the_same_way(arguments, message, tmp_path):
    process = run_here(*arguments, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {message}") and process.stderr.count("\n") == 1


def test_a_command_without_config_keeps_the_traceback_of_other_errors(tmp_path, monkeypatch):
    from ipt.pipeline import verify

    def broken(folder):
        raise ValueError("of ours")

    monkeypatch.setattr(verify, "verify", broken)
    process = run_here("verify", "a", cwd=tmp_path)
    assert process.returncode == 1 and process.stderr.startswith("Traceback") and "ValueError: of ours" in process.stderr


@pytest.mark.parametrize(
    "error",
    [UserError("a: b"), MissingFileError("a: b"), EngineDied("a: b"), TemplateFails("a: b", reason="b")],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_user_cross_processes(error):
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error) and str(other) == "a: b" and vars(other) == vars(error)


def test_a_missing_file_has_no_errno():
    """The number would make it an error of the disk, such as a folder that cannot be written."""
    error = MissingFileError("a: no such file")
    assert isinstance(error, FileNotFoundError) and error.errno is None
    with pytest.raises(SystemExit), exit_on_user_error():
        raise error
