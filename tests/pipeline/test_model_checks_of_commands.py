"""Each command checks its models before a stage runs."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ipt.config import Config
from ipt.errors import UserError
from ipt.pipeline import validation
from ipt.synthesis.engines import ENGINES


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory) -> str:
    """A model folder without the weights of the second layer."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("half") / "model"))
    path = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "layers.1" not in name}
    save_file(weights, path, {"format": "pt"})
    return str(folder)


@pytest.fixture
def config(tiny_model, tmp_path) -> Config:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "The heart pumps blood."}) + "\n")
    item = {"id": "1", "q": "The heart", "options": [" pumps", " sings"], "gold": 0}
    (tmp_path / "choice.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "choice.yaml").write_text('kind: choice\ndata: choice.jsonl\nprompt: "{{ q }}"\n')
    config = Config(model=tiny_model, tasks=[str(tmp_path / "choice.yaml")])
    config.corpus.kind, config.corpus.path = "files", str(tmp_path / "c.jsonl")
    config.mixture.ratios = {"raw": 1.0}
    config.mixture.seq_len = 64
    config.trainer.accelerator = "cpu"
    config.rendering.layouts = {"classic": 1.0}
    config.synthesis.model, config.synthesis.engine = tiny_model, "transformers"
    config.synthesis.max_model_len, config.synthesis.max_new_tokens = 512, 64
    return config


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "chat", "synthesize", "playground", "reproduce"]
)
def test_every_command_checks_its_weights(command, config, half):
    if command == "reproduce":
        config.arms = {"raw": {}}
    check = getattr(validation, f"check_{command}")
    check(config)
    if command in ("synthesize", "playground"):
        config.synthesis.model = half
    else:
        config.model = half
    with pytest.raises(
        UserError, match=r"weight model.layers.1.self_attn.q_proj.weight is missing"
    ):
        check(config)


def test_a_training_checks_its_synthesizer(config, half):
    config.mixture.ratios = {"raw": 0.5, "instruction": 0.5}
    config.synthesis.model = half
    with pytest.raises(
        UserError, match=r"weight model.layers.1.self_attn.q_proj.weight is missing"
    ):
        validation.check_train(config)


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"openai"}))
def test_the_synthesizers_window_is_checked(engine, config):
    config.synthesis.engine = engine
    config.synthesis.max_model_len = 5000
    with pytest.raises(UserError, match=r"synthesis.max_model_len=5000: .* at most 4096 tokens"):
        validation.check_synthesizer(config.synthesis)


def test_positions_of_a_trained_and_scored_model(config, caplog):
    config.mixture.seq_len, config.evaluation.max_length = 4100, 4200
    validation.check_train(config)
    assert "mixture.seq_len=4100" in caplog.text
    assert "evaluation.max_length=4200" in caplog.text
