"""Generation with plain transformers, for machines without vLLM: small and slow.

Prompts that wait at the same time are run as one batch, padded on the left. Nothing is kept between
batches, so no prompt token is ever read from a cache.
"""

import asyncio
import heapq
import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import torch
from transformers import GenerationConfig

from ipt.console import console
from ipt.models import load_model
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, Repetitions, Watch
from ipt.synthesis.formats.base import Prompt

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig
    from ipt.synthesis.formats.base import PromptFormat, Vocabulary

BATCH = 16  # prompts in one batch


class _Request(NamedTuple):
    priority: int
    order: int  # decides between equal priorities: first come, first served
    prompt_ids: list[int]
    result: "asyncio.Future[Generation]"
    watch: Watch | None


class TransformersEngine:
    """`model` on the first GPU, or on the CPU, where weights are float32 unless `config.dtype` says
    otherwise.
    """

    def __init__(
        self,
        config: "SynthesisConfig",
        model: str,
        vocabulary: "Vocabulary",
        prompt_format: "PromptFormat",
        seed: int,
    ) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        default = "bfloat16" if self._device == "cuda" else "float32"
        dtype = getattr(torch, default if config.dtype == "auto" else config.dtype)
        self._model: Any = load_model(model, dtype).eval()
        self._model.to(self._device)
        self._model.generation_config = (
            GenerationConfig()
        )  # what the config says, and no defaults from the model's folder
        self._config, self._vocabulary, self._format, self._seed = (
            config,
            vocabulary,
            prompt_format,
            seed,
        )
        self._repetitions = Repetitions(vocabulary, prompt_format)
        self._grammar = self._compile_grammar()
        self._waiting: list[_Request] = []
        self._order = itertools.count()
        self._runner: asyncio.Task[None] | None = None

    async def generate(
        self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None
    ) -> Generation:
        length, new = len(prompt.ids), self._config.max_new_tokens
        if not length or length + new > self._config.max_model_len:
            raise PromptRefused(
                f"{length} prompt tokens and {new} new ones, "
                f"max_model_len={self._config.max_model_len}"
            )
        result: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        heapq.heappush(
            self._waiting, _Request(priority, next(self._order), prompt.ids, result, watch)
        )
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
                request.result.set_exception(
                    EngineDied(f"synthesis.engine=transformers: {type(error).__name__}: {error}")
                )

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[Generation]:
        longest = max(len(request.prompt_ids) for request in batch)
        padding = [longest - len(request.prompt_ids) for request in batch]
        ids_BT = torch.tensor(
            [[0] * pad + request.prompt_ids for pad, request in zip(padding, batch, strict=True)],
            device=self._device,
        )
        mask_BT = torch.tensor(
            [[0] * pad + [1] * (longest - pad) for pad in padding], device=self._device
        )
        temperature = self._config.temperature
        sampling = (
            {
                "do_sample": True,
                "temperature": temperature,
                "top_k": 0,
                "min_p": self._config.min_p or None,
            }
            if temperature > 0
            else {"do_sample": False}
        )
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + crc32(ids_BT.cpu().numpy().tobytes()))
            output_BT = self._model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=self._config.max_new_tokens,
                eos_token_id=self._format.stop_ids,
                pad_token_id=self._format.stop_ids[0],
                logits_processor=self._held_to_grammar(),
                stopping_criteria=[self._show(batch, longest)]
                if any(request.watch for request in batch)
                else None,
                **sampling,
            )
        return [self._cut(ids) for ids in output_BT[:, longest:].tolist()]

    def _show(
        self, batch: list[_Request], start: int
    ) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """Called after each token: shows outputs to those who watch them, and says which need not
        go on: repeated or cancelled ones.
        """

        def show(ids_BT: torch.Tensor, scores: Any) -> torch.Tensor:
            ended = torch.zeros(len(batch), dtype=torch.bool, device=ids_BT.device)
            for row, (request, ids) in enumerate(
                zip(batch, ids_BT[:, start:].tolist(), strict=True)
            ):
                if request.watch is None:
                    continue
                output = self._cut(ids)
                request.watch(output.text)
                ended[row] = request.result.cancelled() or output.finish_reason == "repetition"
            return ended

        return show

    def _compile_grammar(self) -> Any:
        """What the format holds outputs to, as a grammar over tokens. None without such, or without
        xgrammar, which comes with vLLM.
        """
        schema, grammar = self._format.schema, self._format.grammar
        if not (schema or grammar):
            return None
        if find_spec("xgrammar") is None:
            console.print(
                "synthesis: xgrammar is not installed: outputs are not held to their format",
                style="yellow",
            )
            return None
        from xgrammar import GrammarCompiler, TokenizerInfo

        tokens = TokenizerInfo.from_huggingface(
            self._vocabulary.tokenizer,
            vocab_size=self._model.config.get_text_config().vocab_size,
            stop_token_ids=self._format.stop_ids,
        )
        compiler = GrammarCompiler(tokens)
        if grammar:
            return compiler.compile_grammar(grammar)
        return compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(",", ":")
        )

    def _held_to_grammar(self) -> list[Any]:
        """A new processor of logits for each batch."""
        if self._grammar is None:
            return []
        from xgrammar.contrib.hf import LogitsProcessor

        return [LogitsProcessor(self._grammar)]

    def _cut(self, ids: list[int]) -> Generation:
        """The output of one prompt: up to its first repetition or stop token."""
        if self._config.stop_at_repetition:
            repetition = next(
                (
                    end
                    for end in range(1, len(ids) + 1)
                    if self._repetitions.ended_by_last(ids[:end])
                ),
                None,
            )
            if repetition is not None:
                return Generation(
                    ids[:repetition],
                    self._vocabulary.decode_continuation(ids[:repetition]),
                    "repetition",
                    0,
                )
        stop = next(
            (place for place, token in enumerate(ids) if token in self._format.stop_ids), None
        )
        if stop is None:
            return Generation(ids, self._vocabulary.decode_continuation(ids), "length", 0)
        return Generation(
            ids[: stop + 1], self._vocabulary.decode_continuation(ids[:stop]), "stop", 0
        )
