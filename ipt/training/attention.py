"""Attention over packed documents: each document attends to itself alone.

`packed` runs torch's causal attention document by document, which needs no mask and on a CPU costs the sum of squares of
the documents' lengths instead of the square of the sequence's. It is registered with transformers under that name.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PACKED = "ipt_packed"


def register_packed_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers: query [1, heads, T, head_dim], output [1, T, heads, head_dim].

    `options["cu_seq_lens_q"]` (int32 [documents + 1]) tells where documents begin and end; without it the sequence is one
    document.
    """
    bounds = options.get("cu_seq_lens_q")
    sizes = [query.shape[2]] if bounds is None else bounds.diff().tolist()
    outputs = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=options.get("scaling"),
            dropout_p=options.get("dropout", 0.0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def document_bounds(position_ids: Tensor) -> Tensor:
    """int32 [documents + 1]: a document begins wherever positions restart; position_ids is [T]."""
    starts = (position_ids == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(position_ids)])]).to(torch.int32)
