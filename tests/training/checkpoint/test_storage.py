"""Checkpoints as files, without a training."""

import errno
import random

import numpy as np
import pytest
import torch

from ipt.config import CheckpointConfig
from ipt.training.checkpoint import storage as module
from ipt.training.checkpoint.remote import fetch, upload
from ipt.training.checkpoint.state import random_state, set_random_state
from ipt.training.checkpoint.storage import (
    Snapshot,
    check_files,
    checkpoint_name,
    is_whole,
    prune,
    read_facts,
    read_random,
    read_tensors,
    read_whole_tensors,
    remove_leftovers,
    superseded,
    whole_checkpoints,
    write_checkpoint,
)


def _snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model.weight": torch.randn(5, 3, generator=generator),
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.weight.state1": torch.arange(15, dtype=torch.uint8).view(5, 3),
    }
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    facts = {"format": 1, "step": step, "processes": 2, "tensors": shapes}
    return Snapshot(tensors, {"python": step}, facts, b'{"step": 1}\n')


def _write(folder, step: int):
    path = folder / checkpoint_name(step)
    write_checkpoint(path, _snapshot(step), None)
    return path


def test_what_is_written_is_read_and_nothing_is_a_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 50)  # so that there are several files
    path = _write(tmp_path, 3)
    assert len(list(path.glob("*.safetensors"))) > 1
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".jsonl"}
    expected = _snapshot(3).tensors
    tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    read_tensors(path, tensors, None)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert read_random(path, 0) == {"python": 3}
    whole = read_whole_tensors(path, "model.", torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in whole.items()} == {
        "weight": torch.bfloat16,
        "half": torch.bfloat16,
    }
    assert torch.equal(whole["weight"], expected["model.weight"].bfloat16())


@pytest.mark.parametrize("kind", ["*.safetensors", "rng-*.json", "metrics.jsonl"])
def test_a_file_with_a_changed_byte_is_refused_by_name(tmp_path, kind):
    path = _write(tmp_path, 3)
    check_files(path, None)
    (file, *_) = path.glob(kind)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert is_whole(path)  # as far as its size tells
    with pytest.raises(ValueError, match=f"{file.name} was changed after it was written"):
        check_files(path, None)


def test_a_checkpoint_whose_facts_were_changed_is_not_whole(tmp_path):
    facts = _write(tmp_path, 3) / "checkpoint.json"
    facts.write_text(facts.read_text().replace('"step": 3', '"step": 4'))
    assert whole_checkpoints(tmp_path) == []


def test_only_whole_checkpoints_count(tmp_path):
    paths = [_write(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    (paths[1] / "metrics.jsonl").write_bytes(b"")
    next(paths[2].glob("*.safetensors")).unlink()
    (paths[3] / "checkpoint.json").unlink()
    (paths[4] / "checkpoint.json").write_text("{")
    paths[0].with_name("step-00000009").mkdir()
    assert whole_checkpoints(tmp_path) == [paths[0]]


def test_a_save_that_fails_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    def full(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device", str(rest))

    first = _write(tmp_path, 1)
    with monkeypatch.context() as patches:
        patches.setattr(module, "_write_file", full)
        with pytest.raises(OSError, match="No space left"):
            _write(tmp_path, 2)
    with monkeypatch.context() as patches:
        patches.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
        with pytest.raises(OSError, match="No space left"):
            _write(tmp_path, 2)
    assert whole_checkpoints(tmp_path) == [first]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [first]


def test_tensors_of_another_model_are_refused(tmp_path):
    path = _write(tmp_path, 1)
    with pytest.raises(ValueError, match=r"does not contain model\.other"):
        read_tensors(path, {"model.other": torch.zeros(1)}, None)
    with pytest.raises(
        ValueError,
        match=r"has shape \[5, 3\], expected \[3, 5\]: the checkpoint belongs to another model",
    ):
        read_tensors(path, {"model.weight": torch.zeros(3, 5)}, None)
    with pytest.raises(ValueError, match="resume with 2 processes"):
        read_tensors(path, {"process-0-of-3.optimizer.weight.state1": torch.zeros(3)}, None)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint\.json"):
        read_facts(tmp_path)


def test_retention(tmp_path):
    names = [checkpoint_name(step) for step in (10, 20, 25, 30, 40)]
    assert superseded(names, CheckpointConfig(keep_last=1)) == names[:-1]
    assert superseded(names, CheckpointConfig(keep_last=2, keep_every_n_steps=20)) == [
        names[0],
        names[2],
    ]
    assert superseded(names[:1], CheckpointConfig(keep_last=3)) == []
    paths = [_write(tmp_path, step) for step in (1, 2, 3, 4)]
    prune(tmp_path, CheckpointConfig(keep_last=1, keep_every_n_steps=3), keep=paths[0])
    assert sorted(tmp_path.iterdir()) == [paths[0], paths[2], paths[3]]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_copies(tmp_path, scheme):
    url = f"file://{tmp_path}/remote" if scheme == "file" else "memory://remote/run"
    config = CheckpointConfig(keep_last=1, keep_every_n_steps=2)
    paths = [_write(tmp_path / "here", step) for step in (1, 2, 3)]
    for path in paths:
        upload(path, url, config)
    fetch(url, tmp_path / "there")
    (copy,) = whole_checkpoints(tmp_path / "there")
    assert copy.name == "step-00000003"
    for file in paths[2].iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    fetch("file:///nowhere/at/all", tmp_path / "there")  # has one of its own: nothing is asked for

    import fsspec

    system, root = fsspec.url_to_fs(url)
    assert sorted(path.rpartition("/")[2] for path in system.ls(root, detail=False)) == [
        "step-00000002",
        "step-00000003",
    ]
    system.rm_file(f"{root}/step-00000003/checkpoint.json")  # as if copying had not come to its end
    fetch(url, tmp_path / "elsewhere")
    assert [path.name for path in whole_checkpoints(tmp_path / "elsewhere")] == ["step-00000002"]


def test_damaged_and_unreachable_copies_are_told(tmp_path):
    upload(_write(tmp_path / "here", 1), f"file://{tmp_path}/remote", CheckpointConfig())
    (tmp_path / "remote" / "step-00000001" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="do not have the sizes"):
        fetch(f"file://{tmp_path}/remote", tmp_path / "there")
    with pytest.raises(ValueError, match="nosuch://x: "):
        fetch("nosuch://x", tmp_path / "elsewhere")


def test_random_states_go_on_where_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1)

    draw()
    state = random_state()
    expected = [draw(), draw()]
    set_random_state(state)
    assert [draw(), draw()] == expected
