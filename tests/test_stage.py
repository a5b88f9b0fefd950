"""When a stage is reused, and what its digest and the check of its outputs depend on."""

import json
import logging
from pathlib import Path

import pytest

from ipt.errors import UserError
from ipt.stage import MANIFEST, check_outputs, find_stage, run_stage

IDENTITY = {"config": {"a": 1, "b": 2}, "inputs": {"corpus": "digest"}, "seed": 3}


def _make(stages_dir: Path, content: str = "content", name: str = "some", **identity):
    def work(folder: Path) -> dict[str, int]:
        (folder / "data").write_text(content, encoding="utf-8")
        return {}

    return run_stage(name, None, work, stages_dir=stages_dir, **IDENTITY | identity)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"config": {"a": 1, "b": 3}},
        {"inputs": {"corpus": "another digest"}},
        {"inputs": {"pairs": "digest"}},
        {"seed": 4},
    ],
    ids=str,
)
def test_a_stage_is_reused_for_the_same_work_only(tmp_path, change):
    made = _make(tmp_path)
    again = _make(tmp_path, config={"b": 2, "a": 1})  # the order of the keys does not matter
    assert again.reused
    assert (again.folder, again.digest) == (made.folder, made.digest)
    changed = {"name": "some"} | IDENTITY | change
    assert find_stage(changed.pop("name"), None, stages_dir=tmp_path, **changed) is None
    other = _make(tmp_path, **change)
    assert not other.reused
    assert other.folder != made.folder


def test_the_digest_is_that_of_the_content_whatever_made_it(tmp_path):
    made = _make(tmp_path, "content")
    assert _make(tmp_path, "content", seed=4).digest == made.digest
    assert _make(tmp_path, "CONTENT", seed=5).digest != made.digest  # as long, but something else


@pytest.mark.parametrize("content", ["CONTENT", "content and more", None])
def test_outputs_that_have_changed_since_are_named(tmp_path, content):
    stage = _make(tmp_path)
    check_outputs(stage)
    data = stage.folder / "data"
    data.unlink() if content is None else data.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{data}"):
        check_outputs(stage)


def _run(folder: Path, **changes):
    work = {"config": {"a": 1}, "inputs": {}} | changes
    return run_stage("some", folder, lambda _: {}, **work)


@pytest.mark.parametrize("version", [None, "0.0.9"])
def test_a_run_of_another_config_names_the_version_that_wrote_it(tmp_path, version):
    folder = tmp_path / "run"
    _run(folder)
    if version:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest["versions"]["ipt"] = version
        manifest["git_commit"] = "1234567890"
        (folder / MANIFEST).write_text(json.dumps(manifest | {"key": "old"}), encoding="utf-8")
        (folder / "stats.json").unlink()  # the seal would no longer fit
    written = r", written by ipt 0\.0\.9 \(commit 1234567\)" if version else ""
    remedy = "delete the folder or choose another output_dir$"
    with pytest.raises(UserError, match=rf"\(different: config\.a\){written}: {remedy}"):
        _run(folder, config={"a": 2})


def test_debug_records_say_why_a_stage_is_not_reused(tmp_path, caplog):
    _make(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="ipt.stage"):
        _make(tmp_path, config={"a": 1, "b": 3})
    assert "is not reused (different: config.b)" in caplog.text
