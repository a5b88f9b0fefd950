"""FLOPs against figures computed by hand and against torch's counter; peak rates by a device's
name.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ipt.config import Config
from ipt.training.metrics import flops_per_token, named_peak
from ipt.training.model import meta_model

SMALL = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(("seq_len", "expected"), [(8192, 57.9), (4096, 51.5)])
def test_llama_3_8b_as_computed_by_hand(seq_len, expected):
    """6 x (8.03 B - 0.525 B) = 45.03 GFLOP, and attention 12 x 32 x 4096 x 8192 = 12.88 GFLOP."""
    model = meta_model(Config(model="meta-llama/Meta-Llama-3-8B"))
    assert flops_per_token(model, seq_len) / 1e9 == pytest.approx(expected, abs=0.05)
    assert flops_per_token(model, 0) == 6 * (8_030_261_248 - 128_256 * 4096)


def test_an_embedding_that_is_the_projection_too_counts():
    model = meta_model(Config(model="HuggingFaceTB/SmolLM2-135M"))
    assert flops_per_token(model, 1024) == 6 * 134_515_008 + 12 * 30 * 576 * 1024


def test_all_weights_as_torch_counts_them():
    model = meta_model(Config(architecture=SMALL), attention="eager")
    # counted by convention, but no matrix
    norms = sum(weight.numel() for weight in model.parameters() if weight.ndim == 1)
    assert _counted(model, 64) == 64 * (flops_per_token(model, 64) - 6 * norms)


def test_lora_as_torch_counts_it():
    config = Config(architecture=SMALL)
    config.lora.rank = 2
    model = meta_model(config, attention="eager")
    # the first layer's inputs have no gradient
    assert _counted(model, 64) == pytest.approx(64 * flops_per_token(model, 64), rel=0.03)
    whole = meta_model(Config(architecture=SMALL))
    assert flops_per_token(model, 64) < flops_per_token(whole, 64)


def _counted(model, tokens):
    """FLOPs that torch counts in matrix products of one pass; what the weights are does not
    matter.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.to_empty(device="cpu")(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-40", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("RTX4090", 165e12),
        ("NVIDIA L40S", None),  # not an L4
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert named_peak(name) == peak
