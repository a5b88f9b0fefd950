"""FLOPs of training and peak rates of devices, for model FLOPs utilisation (MFU).

Convention: 6 FLOPs for each parameter of a matrix and token, the embedding table not counted unless it is also the
projection, and 12 x layers x hidden x sequence length for full attention; recomputed activations never count.
"""

from typing import Any

import torch

# Dense bf16 FLOP/s (datasheets, SXM parts). A device that is not listed has no MFU.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def flops_per_token(model: Any, seq_len: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `seq_len`."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = parameters if config.tie_word_embeddings else parameters - embedding
    return 6.0 * counted + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
