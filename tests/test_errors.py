"""How commands print errors: those of the user as one line, all others with their traceback."""

import copy
import pickle

import pytest

from ipt.chat_templates import TemplateFails
from ipt.cli import exit_on_user_error
from ipt.config import Config, SourceConfig
from ipt.distributed import launcher_number
from ipt.errors import MissingFileError, UserError
from ipt.files import read_json, read_json_lines, read_parts
from ipt.pipeline.validation import check_source
from ipt.synthesis.engines import EngineDied
from tests.commands import run_here


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError, KeyError])
def test_an_error_of_the_package_keeps_its_traceback(kind, tmp_path, monkeypatch):
    from ipt.pipeline import validation

    def broken(path):
        raise kind("of ours")

    # as if it were defined there
    monkeypatch.setitem(broken.__globals__, "__name__", "ipt.pipeline.validation")
    monkeypatch.setattr(validation, "check_model", broken)
    process = run_here("evaluate", "model=embedded:smollm2", "tasks=[ontology]", cwd=tmp_path)
    assert process.returncode == 1
    assert (
        process.stderr.startswith("Traceback")
        and "in check_evaluate" in process.stderr
        and "of ours" in process.stderr
    )


@pytest.mark.parametrize("kind", [UserError, MissingFileError, EngineDied])
def test_an_error_of_the_user_is_one_line(kind, tmp_path, monkeypatch):
    from ipt.pipeline import validation

    def fails(path):
        raise kind("a.jsonl, line 3: found 1,\nexpected text")

    monkeypatch.setattr(validation, "check_model", fails)
    process = run_here("evaluate", "model=embedded:smollm2", "tasks=[ontology]", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (
        1,
        "error: a.jsonl, line 3: found 1, expected text\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "missing"), "missing holds no manifest.json"),
        (("runs", "missing"), "missing is not a folder"),
        (("report", "missing"), "missing has no training run"),
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
    assert (
        process.returncode == 1
        and process.stderr.startswith("Traceback")
        and "ValueError: of ours" in process.stderr
    )


@pytest.mark.parametrize(
    "error",
    [
        UserError("a: b"),
        MissingFileError("a: b"),
        EngineDied("a: b"),
        TemplateFails("a: b", reason="b"),
    ],
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


def test_the_error_of_a_source_names_its_own_key_and_leaves_the_path_alone(tmp_path):
    path = tmp_path / "my.corpus.jsonl"
    path.write_text('{"body": "a"}\n', encoding="utf-8")
    config = Config()
    config.mixture.sources["web"] = SourceConfig(kind="texts", path=str(path))
    with pytest.raises(UserError) as error:
        check_source("web", config)
    assert str(error.value) == (
        f"{path}, line 1: no field 'text', only 'body': set mixture.sources.web.text_field to "
        "the text's"
    )
    config.mixture.sources["web"] = SourceConfig(kind="texts", path=f"{tmp_path}/corpus.d")
    with pytest.raises(MissingFileError) as error:
        check_source("web", config)
    assert (
        str(error.value) == f"mixture.sources.web.path={tmp_path}/corpus.d: no such file or folder"
    )


def test_files_that_ipt_wrote_and_that_are_damaged_are_named(tmp_path):
    lines, table = tmp_path / "metrics.jsonl", tmp_path / "part-0.parquet"
    lines.write_text('{"step": 1}\n{"st', encoding="utf-8")
    table.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_json_lines(lines)
    with pytest.raises(UserError, match=r"part-0\.parquet: not a readable Parquet file"):
        list(read_parts(tmp_path))
    with pytest.raises(MissingFileError, match=r"other\.json: no such file"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize("value", ["two", "1.5", "-1"])
def test_a_launchers_variable_must_be_a_number(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match=f"WORLD_SIZE is '{value}', expected a number"):
        launcher_number("WORLD_SIZE")
