"""Generates docs/models.md: the architectures of transformers that can be trained, with settings.

`python -m dev.models_table` runs the check that precedes a training (ipt.training.probe) on a tiny
random model of each architecture below. A test compares the page with the results of the check.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ipt.training.probe import describe_model

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
HEAD: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 8}
ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 4}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
MANY_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
# Model type -> settings that are added to SIZES; a dictionary with vocab_size is used as it is.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "bert": {},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **WINDOW},
    "ernie4_5": HEAD,
    "exaone4": WINDOW,
    "falcon": {"alibi": False},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3, **MAMBA},
    "gemma": HEAD,
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, **HEAD, **WINDOW},
    "gemma3_text": {**HEAD, **WINDOW},
    "glm4": HEAD,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
        "window_size": 8,
    },
    "gpt_neox": {},
    "gpt_oss": {**HEAD, **WINDOW, **EXPERTS},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0, **EXPERTS},
    "helium": HEAD,
    "hyperclovax": {"logits_scaling": 0.5},
    "jamba": {
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "llama": {},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minimax": {**HEAD, **EXPERTS},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nanochat": ALL_HEADS,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": ALL_HEADS,
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**MANY_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, **MANY_EXPERTS},
    "qwen3_next": {**HEAD, **MANY_EXPERTS, **LINEAR},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, **HEAD},
    "rwkv": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2},
    "seed_oss": HEAD,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": WINDOW,
    "xglm": {
        "vocab_size": 300,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 128,
    },
}
# tests/training/test_models.py trains, exports and resumes these.
TESTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "cohere",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)
HEADER = """# Models

Architectures that can be trained. Before any data are made, `train.py` and `reproduce` compute the
loss of a small random copy of the model in three ways: each document alone with the model's own
forward pass and loss, each document alone with our loss, and packed documents with our loss. If the
three differ, the command ends with an error that names the difference and the settings that work.
Before the first step the same comparison runs on the real weights.

Because of this check, architectures that are not in the table can be used too.
`trainer.attn_implementation=auto` selects the fastest implementation that passes the check. On a
GPU, kernels that ignore a feature of the model are excluded: flash-attn 3 and 4 have no attention
dropout, flash-attn 2 and 3 no attention sinks, and torch's `varlen` neither of these nor soft-caps.

- *packed*, *sdpa*, *eager*: whether this value of `trainer.attn_implementation` is correct with
  `mixture.intra_document_mask=true`.
- *without mask*: whether the model can be trained with `mixture.intra_document_mask=false`, where
  the documents of a sequence attend to each other.
- *tested*: the test suite trains a tiny model and checks that packed training equals separate
  documents, that the export equals the trained model, and that a resumed run equals an
  uninterrupted one.

Mixtures of experts: if the model's `config.json` has `output_router_logits: true`, the
load-balancing loss is part of the objective, as in transformers. `aux_loss` logs it without its
coefficient. `loss` includes it, and `loss/<source>` never does. Otherwise a log line at the start
says that it is missing.

The table is generated by `python -m dev.models_table` from tiny random models and transformers
{version}.

| model type | packed | sdpa | eager | without mask | tested | logits and attention |
|---|---|---|---|---|---|---|
"""


def architecture(kind: str) -> Any:
    """The transformers config of a tiny model of this type."""
    settings = ARCHITECTURES[kind]
    is_whole = "vocab_size" in settings
    return AutoConfig.for_model(kind, **(settings if is_whole else {**SIZES, **settings}))


def row(kind: str) -> str:
    """The row of a model type in the table."""
    found = describe_model(architecture(kind))
    marks = [
        "yes" if found.right[name] else "–" for name in ("packed", "sdpa", "eager", "without mask")
    ]
    tested = "yes" if kind in TESTED else "–"
    return f"| {kind} | {' | '.join(marks)} | {tested} | {found.features or '–'} |"


def page() -> str:
    from transformers import __version__

    rows = [row(kind) for kind in ARCHITECTURES]
    return HEADER.format(version=__version__) + "\n".join(rows) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
