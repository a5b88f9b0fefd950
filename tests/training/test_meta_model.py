"""Models without weights: known ones have the published numbers of parameters, folders and unknown
names are treated as said.
"""

import pytest

from ipt.config import Config
from ipt.models import load_model
from ipt.training.model import known_architectures, meta_model, model_config

PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "instruction-pretrain/InstructLM-500M": 567_854_592,
    "instruction-pretrain/InstructLM-1.3B": 1_347_504_128,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_parameters(name):
    assert (
        sum(parameter.numel() for parameter in meta_model(Config(model=name)).parameters())
        == PUBLISHED[name]
    )


@pytest.mark.parametrize("name", ["embedded:tiny", "embedded:tiny-synthesizer"])
def test_embedded_models_are_what_is_said_of_them(name):
    import torch

    made = {key: value.shape for key, value in load_model(name, torch.float32).named_parameters()}
    assert made == {
        key: value.shape for key, value in meta_model(Config(model=name)).named_parameters()
    }
    assert {parameter.device.type for parameter in meta_model(Config(model=name)).parameters()} == {
        "meta"
    }


def test_a_folder_says_itself_what_it_is(tiny_model, tmp_path, monkeypatch):
    assert model_config(Config(model=tiny_model)).hidden_size == 16
    (tmp_path / "mistralai").mkdir()
    (tmp_path / "mistralai" / "Mistral-7B-v0.1").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    assert model_config(Config(model="mistralai/Mistral-7B-v0.1")).hidden_size == 16


def test_what_is_not_known_is_one_line():
    with pytest.raises(
        ValueError, match="model=owner/unheard-of: a dry run does not use the network"
    ) as error:
        model_config(Config(model="owner/unheard-of"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="architecture: "):
        model_config(Config(architecture={"model_type": "unheard-of"}))
    assert "owner/unheard-of" not in known_architectures()
