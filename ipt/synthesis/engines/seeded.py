"""Sampling that depends only on a seed and the prompt, for vLLM on a CPU, where its own seeds fail.

A module of its own: vLLM's worker processes import it by name, and only after vLLM.
"""

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class SeededSampler(AdapterLogitsProcessor):
    """Leaves one token to each request whose `extra_args` are the arguments of `draw`; the request
    itself must use greedy sampling.
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
    """Logits with one finite value, at the token that is sampled after `output_ids`. The token does
    not depend on the rest of the batch.
    """
    probabilities_V = (logits_V.double() / temperature).softmax(-1)
    probabilities_V[probabilities_V < min_p * probabilities_V.max()] = 0
    cumulative_V = probabilities_V.cumsum(-1)
    quantile = random.Random(f"{seed} {len(output_ids)}").random()
    token = torch.searchsorted(cumulative_V, quantile * cumulative_V[-1], right=True)
    token = token.clamp(max=len(cumulative_V) - 1)
    return torch.full_like(logits_V, -torch.inf).index_fill(-1, token, 0.0)
