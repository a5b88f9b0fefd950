"""Generation with plain transformers, for machines without vLLM: small and slow.

Prompts that wait at the same time are run as one batch, padded on the left. Nothing is kept between batches, so no prompt token
is ever read from a cache.
"""

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import torch
from transformers import GenerationConfig

from ipt.models import load_model
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, repeats_itself

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig
    from ipt.synthesis.prompts import Vocabulary

BATCH = 16  # prompts in one batch


class _Request(NamedTuple):
    priority: int
    order: int  # decides between equal priorities: first come, first served
    prompt_ids: list[int]
    max_tokens: int
    stop_ids: Sequence[int]
    result: "asyncio.Future[Generation]"


class TransformersEngine:
    """`model` on the first GPU, or on the CPU, where weights are float32 unless `config.dtype` says otherwise."""

    def __init__(self, config: "SynthesisConfig", model: str, vocabulary: "Vocabulary", seed: int) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        default = "bfloat16" if self._device == "cuda" else "float32"
        dtype = getattr(torch, default if config.dtype == "auto" else config.dtype)
        self._model: Any = load_model(model, dtype).eval()
        self._model.to(self._device)
        self._model.generation_config = GenerationConfig()  # what the config says, and no defaults from the model's folder
        self._config, self._vocabulary, self._seed = config, vocabulary, seed
        self._waiting: list[_Request] = []
        self._order = itertools.count()
        self._runner: asyncio.Task[None] | None = None

    async def generate(self, prompt_ids: list[int], *, max_tokens: int, stop_ids: Sequence[int], priority: int) -> Generation:
        if not prompt_ids or len(prompt_ids) + max_tokens > self._config.max_model_len:
            raise PromptRefused(f"{len(prompt_ids)} prompt tokens and {max_tokens} new ones, max_model_len={self._config.max_model_len}")
        result: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, _Request(priority, next(self._order), prompt_ids, max_tokens, stop_ids, result))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await result

    def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()

    async def _run(self) -> None:
        """Batch after batch, as long as prompts wait."""
        while self._waiting:
            batch = [heapq.heappop(self._waiting) for _ in range(min(BATCH, len(self._waiting)))]
            try:
                generations = await asyncio.to_thread(self._generate, batch)
            except Exception as error:
                self._fail(batch, error)
                continue
            for request, generation in zip(batch, generations, strict=True):
                if not request.result.cancelled():
                    request.result.set_result(generation)

    @staticmethod
    def _fail(batch: list[_Request], error: Exception) -> None:
        for request in batch:
            if not request.result.cancelled():
                request.result.set_exception(EngineDied(f"synthesis.engine=transformers: {type(error).__name__}: {error}"))

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[Generation]:
        longest = max(len(request.prompt_ids) for request in batch)
        padding = [longest - len(request.prompt_ids) for request in batch]
        ids_BT = torch.tensor([[0] * pad + request.prompt_ids for pad, request in zip(padding, batch, strict=True)], device=self._device)
        mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=self._device)
        temperature = self._config.temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + crc32(ids_BT.cpu().numpy().tobytes()))
            output_BT = self._model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=max(request.max_tokens for request in batch),
                eos_token_id=list(batch[0].stop_ids),
                pad_token_id=batch[0].stop_ids[0],
                **sampling,
            )
        return [self._cut(ids, request) for ids, request in zip(output_BT[:, longest:].tolist(), batch, strict=True)]

    def _cut(self, ids: list[int], request: _Request) -> Generation:
        """The output of one prompt: up to its first repetition or stop token, or to its own maximum."""
        ids = ids[: request.max_tokens]
        if self._config.stop_at_repetition:
            repetition = next((end for end in range(1, len(ids) + 1) if repeats_itself(ids[:end], self._vocabulary)), None)
            if repetition is not None:
                return Generation(ids[:repetition], self._vocabulary.decode_continuation(ids[:repetition]), "repetition", 0)
        stop = next((place for place, token in enumerate(ids) if token in request.stop_ids), None)
        if stop is None:
            return Generation(ids, self._vocabulary.decode_continuation(ids), "length", 0)
        return Generation(ids[: stop + 1], self._vocabulary.decode_continuation(ids[:stop]), "stop", 0)
