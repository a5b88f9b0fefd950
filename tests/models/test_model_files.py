"""Damaged model folders: each fault is one line that names the file and comes before anything is
loaded.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipt.errors import UserError
from ipt.models import adapter_identity, check_model, load_model
from ipt.models.files import read_header

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_named(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        check_model(str(folder))


@pytest.mark.parametrize("name", FILES[:5])
@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_damaged_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        check_model(str(folder))


def test_a_link_to_nothing_is_named(folder):
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(folder / "gone")
    with pytest.raises(
        UserError, match=r"generation_config.json is a link to .*gone, which does not"
    ):
        check_model(str(folder))


def _pointer(folder):
    (folder / "model.safetensors").write_text(POINTER)


def _cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _cut_off_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _no_header(folder):
    (folder / "model.safetensors").write_bytes((7).to_bytes(8, "little") + b"garbage")


def _none(folder):
    (folder / "model.safetensors").unlink()


def _sharded(folder, **names):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-1.safetensors", {"format": "pt"})
    places = dict.fromkeys(weights, "model-1.safetensors") | names
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _missing_shard(folder):
    _sharded(folder, **{"model.norm.weight": "model-2.safetensors"})


def _damaged_index(folder):
    _sharded(folder)
    (folder / INDEX).write_text('{"weight_map": 3}')


def _pickled_and_cut_off(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])


WEIGHTS = {
    _pointer: "model.safetensors is a Git LFS pointer",
    _cut_off: "model.safetensors is truncated or was changed: it has .* bytes, but its header",
    _cut_off_header: "model.safetensors is not a safetensors file or is truncated",
    _no_header: "model.safetensors is not a safetensors file: its header is damaged",
    _none: "the folder has no weights",
    _missing_shard: f"model-2.safetensors is missing, but {INDEX} names it",
    _damaged_index: f"{INDEX} is damaged, it has no weight_map",
    _pickled_and_cut_off: "pytorch_model.bin is empty or truncated",
}


@pytest.mark.parametrize("damage", WEIGHTS, ids=lambda damage: damage.__name__)
def test_damaged_weights_are_named(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match=WEIGHTS[damage]):
        load_model(str(folder), torch.float32)


def test_an_adapter_in_place_of_a_model(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(
        UserError, match=r"contains a LoRA adapter of owner/base, not a complete model"
    ):
        check_model(str(folder))


def test_weights_and_an_adapter_in_one_folder(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(UserError, match="move the adapter to a folder of its own"):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_an_adapter_is_named(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert adapter_identity(str(tmp_path))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer"):
        adapter_identity(str(tmp_path))


def test_a_header_says_names_and_shapes(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {"a": (2, 3), "b": (0,)}
