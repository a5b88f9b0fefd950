"""Token ids and positions beyond a model's tables are found before any stage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from ipt.config import Config, SourceConfig
from ipt.errors import UserError
from ipt.mixture.batches import PackedSequences
from ipt.mixture.plan import make_plan
from ipt.models import load_tokenizer
from ipt.models.limits import (
    check_model_limits,
    check_positions,
    check_vocabulary,
    check_window,
    model_limits,
    stated_positions,
)
from ipt.tokens.encode import tokenizer_fingerprint
from ipt.tokens.source import check_ids, open_source
from ipt.tokens.store import EncodedDocument, TokenStore, write_store

SMALL = {"vocab_size": 49152, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def limits(tiny_model):
    return model_limits(tiny_model)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token", None])
def test_a_token_beyond_the_embeddings_is_named(limits, tiny_model, role):
    tokenizer = load_tokenizer(tiny_model)
    check_vocabulary(limits, tiny_model, tokenizer)
    if role:
        tokenizer.add_special_tokens({role: "<|e|>"})
    else:
        tokenizer.add_tokens(["<|e|>"])
    with pytest.raises(UserError, match=r"has 49152 rows, .* maps '<\|e\|>' to id 49152"):
        check_vocabulary(limits, tiny_model, tokenizer)


def test_a_special_token_that_no_text_holds_is_logged(limits, tiny_model, caplog):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(limits, tiny_model, tokenizer)
    assert "special token '<image>' has id 49152, beyond the 49152 rows" in caplog.text
    tokenizer.chat_template = "<image>{{ messages }}"
    with pytest.raises(UserError, match="maps '<image>' to id 49152"):
        check_vocabulary(limits, tiny_model, tokenizer)


def test_an_architecture_must_hold_the_tokenizer(tiny_model):
    llama = {"model_type": "llama", **SMALL, "num_key_value_heads": 1, "intermediate_size": 32}
    check_model_limits(tiny_model, llama, {})
    with pytest.raises(UserError, match=r"architecture: the embedding table has 1000 rows"):
        check_model_limits(tiny_model, llama | {"vocab_size": 1000}, {})
    with pytest.raises(UserError, match=r"architecture: transformers does not accept it"):
        check_model_limits(tiny_model, {"model_type": "nothing"}, {})


def test_a_store_with_ids_beyond_the_embeddings(tiny_model, tmp_path):
    fingerprint = tokenizer_fingerprint(load_tokenizer(tiny_model))
    documents = [
        EncodedDocument(np.full(10, 7, np.uint32)),
        EncodedDocument(np.full(5, 49152, np.uint32)),
    ]
    write_store(tmp_path, documents, fingerprint, 8)
    source = SourceConfig(kind="store", path=str(tmp_path))
    open_source("own", source, tiny_model, 1.0)
    check_ids("own", source, 49153, 1.0)
    with pytest.raises(UserError, match=r"mixture.sources.own.path=.* holds the token 49152"):
        check_ids("own", source, 49152, 1.0)
    config = Config()
    config.mixture.ratios = {"own": 1.0}
    config.mixture.seq_len = 15
    config.mixture.max_repeats = {"own": 9.0}
    store = TokenStore.open(tmp_path)
    plan = make_plan({"own": store}, config.mixture, 1, 0)
    assert PackedSequences(plan, [store], 49153).batch([0])["input_ids"].max() == 49152
    with pytest.raises(
        UserError, match="holds the token 49152, and the model has 49152 embeddings"
    ):
        PackedSequences(plan, [store], 49152).batch([0])


TABLES = {
    "gpt2": ({"n_positions": 64}, "wpe"),
    "opt": (
        {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "ffn_dim": 32},
        "embed_positions",
    ),
    "gpt_neo": (
        {
            "max_position_embeddings": 64,
            "num_layers": 1,
            "num_heads": 2,
            "attention_types": [[["global"], 1]],
        },
        "wpe",
    ),
    "gpt_bigcode": ({"n_positions": 64}, "wpe"),
    "biogpt": ({"max_position_embeddings": 64}, "embed_positions"),
    "gptj": ({"n_positions": 64, "rotary_dim": 4}, "embed_positions"),
    "codegen": (
        {"n_positions": 64, "n_ctx": 64, "rotary_dim": 4, "num_attention_heads": 4},
        "embed_positions",
    ),
}


@pytest.mark.parametrize("model_type", TABLES)
def test_learned_positions_end(model_type, tiny_model):
    more, table = TABLES[model_type]
    limits = model_limits(tiny_model, {"model_type": model_type, **SMALL, **more})
    check_positions(limits, "mixture.seq_len", 64)
    with pytest.raises(
        UserError, match=rf"mixture.seq_len=65: .* 64 learned positions \(.*{table}"
    ):
        check_positions(limits, "mixture.seq_len", 65)


def test_rotary_positions_are_logged_and_models_without_positions_are_not(tiny_model, caplog):
    check_model_limits(tiny_model, None, {"mixture.seq_len": 4096, "evaluation.max_length": None})
    bloom = {
        "model_type": "bloom",
        "vocab_size": 49152,
        "hidden_size": 16,
        "n_layer": 1,
        "n_head": 2,
    }
    check_model_limits(tiny_model, bloom, {"mixture.seq_len": 1_000_000})
    assert not caplog.text
    check_model_limits(tiny_model, None, {"mixture.seq_len": 4097})
    assert "mixture.seq_len=4097" in caplog.text
    assert "trained on 4096 positions" in caplog.text


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
    ],
)
def test_rope_scaling_counts(rope, positions):
    rope = {"rope_theta": 10000.0, **rope}
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, rope_parameters=rope)
    assert stated_positions(config) == positions


def test_the_synthesizers_window(folder):
    check_window(str(folder), "synthesis.max_model_len", 4096)
    with pytest.raises(UserError, match=r"synthesis.max_model_len=4097: .* at most 4096 tokens"):
        check_window(str(folder), "synthesis.max_model_len", 4097)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    check_window(str(folder), "synthesis.max_model_len", 8192)
