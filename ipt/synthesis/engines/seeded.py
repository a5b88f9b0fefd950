"""Samples that depend on a seed and the prompt alone, where vLLM's own seeds fail: on a CPU."""

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class SeededSampler(AdapterLogitsProcessor):
    """Of a request whose `extra_args` are the arguments of `draw`, leaves one token with a chance;
    it must ask for greedy sampling.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], Tensor], Tensor] | None:
        return partial(draw, **params.extra_args) if params.extra_args else None


def draw(
    output_ids: list[int], logits_V: Tensor, *, seed: int, temperature: float, min_p: float
) -> Tensor:
    """Logits that leave one token: the one that is drawn for the place behind `output_ids`,
    whatever else is in the batch.
    """
    chances_V = (logits_V.double() / temperature).softmax(-1)
    chances_V[chances_V < min_p * chances_V.max()] = 0
    edges_V = chances_V.cumsum(-1)
    share = random.Random(f"{seed} {len(output_ids)}").random()
    token = torch.searchsorted(edges_V, share * edges_V[-1], right=True).clamp(max=len(edges_V) - 1)
    return torch.full_like(logits_V, -torch.inf).index_fill(-1, token, 0.0)
