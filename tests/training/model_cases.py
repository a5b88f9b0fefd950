"""Tiny random models of the architectures that training must support, and the features that each of
them has.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ipt.models import load_tokenizer
from ipt.models.small_copy import random_model

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
GPT |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
# Name in the documentation -> model type and settings that differ from SIZES.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2/3": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Qwen2/2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Gemma-2": (
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "Gemma-3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "Phi-3/4": ("phi3", {}),
    "OLMo-2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "GPT-2": ("gpt2", GPT),
    "GPT-NeoX": ("gpt_neox", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, **EXPERTS},
    ),
    "Phi-1/2": ("phi", {"num_key_value_heads": 2}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def config_of_case(name: str, **changes: Any) -> Any:
    """The transformers config of a case; sizes that its class does not have are left out."""
    kind, settings = SUPPORTED[name]
    sizes = {} if settings is GPT else SIZES
    return AutoConfig.for_model(
        kind,
        **{**sizes, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings, **changes},
    )


def write_case(name: str, folder: Path, tokenizer: str) -> str:
    """A Hugging Face folder with a random model of a case, whose features act, and a tokenizer."""
    loaded = load_tokenizer(tokenizer)
    model = random_model(config_of_case(name, vocab_size=len(loaded)), "eager")
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    return str(folder)


def load_case(folder: str) -> Any:
    """The model of a folder in transformers' own eager attention, which is the reference."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
