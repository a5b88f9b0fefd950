"""A generation config that transformers refuses to write is repaired before a training, with a log
line.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from ipt.config import Config
from ipt.errors import UserError
from ipt.export.folder import check_export
from ipt.export.huggingface import write_model
from ipt.models import generation_config, load_model
from ipt.models.generation_config import accepted, load_generation_config

GREEDY = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    generation_config._log_dropped.cache_clear()
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        (GREEDY, ["temperature", "top_p"]),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0.1}, ["min_p", "temperature", "top_k"]),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, []),
        (
            {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
            ["early_stopping", "length_penalty"],
        ),
        ({"num_return_sequences": 4, "max_new_tokens": 0, "pad_token_id": -1}, None),
        (
            {"early_stopping": "sometimes", "cache_implementation": "x"},
            ["cache_implementation", "early_stopping"],
        ),
        ({"logits_processor": [], "output_scores": True}, ["logits_processor", "output_scores"]),
        ({"suppress_tokens": [1], "forced_eos_token_id": 1}, ["suppress_tokens"]),
    ],
)
def test_what_transformers_rejects_is_dropped_and_the_rest_kept(values, dropped, tmp_path):
    config, found = accepted(values)
    assert sorted(found) == (sorted(values) if dropped is None else dropped)
    config.save_pretrained(tmp_path)  # which raised for most of them
    kept = {name: value for name, value in values.items() if name not in found}
    written = GenerationConfig.from_pretrained(tmp_path).to_dict()
    assert {name: written[name] for name in kept} == kept


@pytest.mark.parametrize("values", [GREEDY, {"early_stopping": "sometimes", "eos_token_id": 2}])
def test_a_folder_with_such_a_file_loads_and_exports(values, folder, tmp_path, caplog):
    (folder / "generation_config.json").write_text(json.dumps(values))
    model = load_model(str(folder), torch.float32)
    assert caplog.text.count("dropping entries") == 1
    config = Config(model=str(folder))
    check_export(config)
    write_model(dict(model.state_dict()), config, tmp_path / "export", tmp_path / "adapter", "card")
    assert load_generation_config(str(tmp_path / "export")).to_diff_dict()["eos_token_id"] == 2


def test_a_tokenizer_that_cannot_be_written_is_known_before_the_training(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"chat_template": [{"name": "default"}]})
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer"):
        check_export(Config(model=str(folder)))
