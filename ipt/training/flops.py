"""FLOPs of training and peak rates of devices, for model FLOPs utilisation (MFU).

Convention: 6 FLOPs for each trained parameter and token (2 forward, 4 backward) and 4 for each
frozen one, which has no gradient of its own, as under LoRA layers; the embedding table is not
counted unless it is also the projection; and 12 x layers x width of the heads x sequence length for
full attention, not halved for causality. Recomputed activations never count.
"""

import re
from typing import Any

import torch

CONVENTION = (
    "6 x parameters (frozen: 4 x) but the input embedding + 12 x layers x width x sequence, full "
    "attention, no recomputation"
)

# Dense bf16 FLOP/s by the vendor's datasheets, fp32 accumulation. The first name found in a
# device's name counts. A device that is not listed has no peak, and its MFU is unknown.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(model: Any, seq_len: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `seq_len`. `model` may lie on the
    meta device or be sharded.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    per_parameter = sum(
        (6 if weight.requires_grad else 4) * parameter_count(weight)
        for weight in model.parameters()
    )
    if not config.tie_word_embeddings:
        per_parameter -= (6 if embedding.requires_grad else 4) * parameter_count(embedding)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(
        per_parameter + 12 * config.num_hidden_layers * config.num_attention_heads * width * seq_len
    )


def parameter_count(parameter: torch.Tensor) -> int:
    """Numbers that a parameter holds; of one that bitsandbytes has packed to 4 bits those of the
    matrix that it stands for.
    """
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()


def peak_flops(device: torch.device) -> float | None:
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by its name, such as "NVIDIA H100 80GB HBM3"; None for one that
    is not in the table.
    """
    return next(
        (
            peak
            for known, peak in PEAKS.items()
            if re.search(rf"\b{known.replace(' ', ' ?')}\b", name, re.IGNORECASE)
        ),
        None,
    )
