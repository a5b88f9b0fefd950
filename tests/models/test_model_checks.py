"""Only the weights of the folder are used: what is missing, renamed, unexpected or of another shape
is an error.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ipt.errors import UserError
from ipt.models import load_model, resolve_model
from ipt.models.checks import check_adapter, check_weights
from ipt.training.model import stored_weights

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
NORM = "model.layers.1.input_layernorm.weight"


def make(folder: Path, model_type: str = "llama", tied: bool = True, **config) -> Path:
    values = {**SMALL, **config} if "vocab_size" not in config else config
    config = AutoConfig.for_model(model_type, **values, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def change(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    weights = edit(load_file(path))
    save_file({name: value.clone() for name, value in weights.items()}, path, {"format": "pt"})


def without(part: str):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def with_prefix(prefix: str):
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def adding(name: str):
    return lambda weights: {**weights, name: torch.zeros(16)}


def reshaped(name: str):
    return lambda weights: {**weights, name: torch.zeros(3)}


def integers(weights):
    return {name: value.to(torch.int8) for name, value in weights.items()}


FAULTS = {
    "missing": (without(NORM), f"weight {NORM} is missing from the files \\(1 in total\\)"),
    "half": (without("layers.1."), "weight model.layers.1.self_attn.q_proj.weight is missing"),
    "compiled": (
        with_prefix("_orig_mod."),
        "they contain _orig_mod.model.embed_tokens.weight: remove that prefix",
    ),
    "wrapped": (
        with_prefix("module."),
        "they contain module.model.embed_tokens.weight: remove that prefix",
    ),
    "of a trainer": (with_prefix("state.net."), "they contain state.net.model.embed_tokens.weight"),
    "one more layer": (
        adding("model.layers.2.input_layernorm.weight"),
        "contain model.layers.2.input_",
    ),
    "a bias": (
        adding("model.layers.0.mlp.up_proj.bias"),
        "contain model.layers.0.mlp.up_proj.bias",
    ),
    "LoRA": (adding("model.layers.0.mlp.up_proj.lora_A.weight"), "contain .*lora_A.weight, which"),
    "integers": (
        integers,
        r"weight model\.\S+ is stored as (I8|torch\.int8), expected floating-point",
    ),
    "another shape": (
        reshaped(NORM),
        rf"{NORM} has shape \[3\] in the files, .* implies \[16\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_wrong_weights_are_named(fault, kind, tmp_path):
    edit, message = FAULTS[fault]
    folder = make(tmp_path / "model")
    change(folder, edit)
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        check_weights(str(folder))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_floating_point_weights_of_any_width_pass(dtype, tmp_path):
    folder = make(tmp_path / "model")
    change(folder, lambda weights: {name: value.to(dtype) for name, value in weights.items()})
    check_weights(str(folder))


def test_a_checkpoint_that_wraps_its_weights_is_named(tmp_path):
    folder = make(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    torch.save({"state_dict": weights, "step": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=r"pytorch_model.bin: state_dict is not a tensor: save only the model's state_dict",
    ):
        check_weights(str(folder))


def test_loading_and_sharded_loading_check_too(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(folder, without(NORM))
    for load in (lambda name: load_model(name, torch.float32), stored_weights):
        with pytest.raises(UserError, match=f"weight {NORM} is missing"):
            load(str(folder))


def test_a_quantisation_that_transformers_cannot_load_is_one_line(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "vptq"}  # its package is no dependency
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"model=.*: it cannot be loaded: "):
        load_model(str(folder), torch.float32)


def test_a_head_that_is_not_tied_must_be_there(tmp_path):
    folder = make(tmp_path / "model", tied=False)
    change(folder, without("lm_head"))
    with pytest.raises(UserError, match=r"weight lm_head.weight is missing"):
        check_weights(str(folder))


def test_tied_weights_that_differ(tmp_path):
    folder = make(tmp_path / "model", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        check_weights(str(folder))
    change(
        folder, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    )
    check_weights(str(folder))


@pytest.mark.parametrize("name", ["model.visual.merger.weight", "v_head.weight", "mtp.norm.weight"])
def test_parts_beside_the_language_model_are_logged(name, tmp_path, caplog):
    folder = make(tmp_path / "model")
    change(folder, adding(name))
    check_weights(str(folder))
    assert name in caplog.text


def test_names_that_transformers_ignores_or_converts_pass(tmp_path):
    """Buffers of older versions, weights of a model without its head's prefix, and one file per
    expert.
    """
    folder = make(tmp_path / "old")
    change(folder, adding("model.layers.0.self_attn.rotary_emb.inv_freq"))
    check_weights(str(folder))
    small = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    folder = make(tmp_path / "gpt2", "gpt2", **small)
    change(folder, lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items()})
    change(folder, adding("h.0.attn.bias"))
    check_weights(str(folder))
    check_weights(str(make(tmp_path / "experts", "mixtral", num_local_experts=4)))
    check_weights(str(make(tmp_path / "qwen", "qwen3_moe", num_experts=4, moe_intermediate_size=8)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1.block_sparse_moe.experts.1.w1"), "experts.1.w1.weight is missing"),
        (without("layers.1.block_sparse_moe.experts.3"), "experts.* has shape"),
        (reshaped("model.layers.0.block_sparse_moe.experts.2.w3.weight"), r"experts.2.w3.* \[3\]"),
    ],
)
def test_a_missing_part_of_experts_is_named(edit, message, tmp_path):
    folder = make(tmp_path / "model", "mixtral", num_local_experts=4)
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        check_weights(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, "transformers does not accept config.json"),
        ({"hidden_size": "wide"}, "transformers does not accept config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"pad_token_id": 99}, "transformers cannot build a language model"),
        ({"model_type": "vit"}, "transformers cannot build a language model"),
    ],
)
def test_a_config_that_describes_no_model(changes, message, tmp_path):
    folder = make(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        check_weights(str(folder))


@pytest.fixture
def adapter(tmp_path):
    """A base model and a LoRA adapter of it."""
    from peft import LoraConfig, get_peft_model

    base = make(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    return str(base), tmp_path / "adapter"


def _change_adapter(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1.mlp.up_proj.lora_B"), "layers.1.mlp.up_proj.lora_B.weight is missing"),
        (with_prefix("module."), "q_proj.lora_A.weight is missing"),
        (
            adding("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"),
            "no place for .*layers.7",
        ),
        (reshaped("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), r"the shape \[3\]"),
    ],
)
def test_an_adapter_must_fit_its_model(adapter, edit, message):
    base, folder = adapter
    check_adapter(base, str(folder))
    _change_adapter(folder, edit)
    with pytest.raises(UserError, match=message):
        check_adapter(base, str(folder))


def test_merging_checks_the_adapter(tiny_model, adapter, monkeypatch, tmp_path):
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="the adapter is of another model"):
        resolve_model(tiny_model, str(adapter[1]))


def test_a_hubs_model_is_checked_once_its_files_are_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    check_weights("owner/name")
    repository = tmp_path / "models--owner--name"
    snapshot = make(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    check_weights("owner/name")
    change(snapshot, without(NORM))
    with pytest.raises(UserError, match=f"weight {NORM} is missing"):
        check_weights("owner/name")
    (snapshot / "model.safetensors").unlink()
    check_weights("owner/name")
