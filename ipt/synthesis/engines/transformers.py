"""Generation with plain transformers, for machines without vLLM and for small experiments.

Prompts that wait at the same time are run as one batch with left padding. There is no prefix cache.
"""

import asyncio
import heapq
import itertools
import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import torch
from transformers import GenerationConfig

from ipt.models import load_model
from ipt.synthesis.engines import EngineDied, Generation, Repetitions, Watch, check_length
from ipt.synthesis.formats.base import Prompt

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig
    from ipt.synthesis.formats.base import PromptFormat, Vocabulary

BATCH = 16  # prompts per batch

log = logging.getLogger(__name__)


class _Request(NamedTuple):
    priority: int
    order: int  # first come, first served among equal priorities
    prompt_ids: list[int]
    result: "asyncio.Future[Generation]"
    watch: Watch | None


class TransformersEngine:
    """`model` on the first GPU, or else on the CPU, with float32 weights unless `config.dtype` says
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
        self._model.generation_config = GenerationConfig()  # no defaults from the model's folder
        self._config = config
        self._vocabulary = vocabulary
        self._format = prompt_format
        self._seed = seed
        self._repetitions = Repetitions(vocabulary, prompt_format)
        self._grammar = self._compile_grammar()
        self._waiting: list[_Request] = []
        self._order = itertools.count()
        self._runner: asyncio.Task[None] | None = None

    async def generate(
        self, prompt: Prompt, *, priority: int, slot: int, watch: Watch | None = None
    ) -> Generation:
        check_length(prompt, self._config)
        result: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        request = _Request(priority, next(self._order), prompt.ids, result, watch)
        heapq.heappush(self._waiting, request)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await result

    def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()

    async def _run(self) -> None:
        """Run batches as long as prompts wait."""
        while self._waiting:
            batch = [heapq.heappop(self._waiting) for _ in range(min(BATCH, len(self._waiting)))]
            try:
                generations = await asyncio.to_thread(self._generate, batch)
            except Exception as error:
                message = f"synthesis.engine=transformers: {type(error).__name__}: {error}"
                for request in batch:
                    if not request.result.cancelled():
                        request.result.set_exception(EngineDied(message))
                continue
            for request, generation in zip(batch, generations, strict=True):
                if not request.result.cancelled():
                    request.result.set_result(generation)

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[Generation]:
        longest = max(len(request.prompt_ids) for request in batch)
        ids, mask = [], []
        for request in batch:
            padding = [0] * (longest - len(request.prompt_ids))
            ids.append(padding + request.prompt_ids)
            mask.append(padding + [1] * len(request.prompt_ids))
        ids_BT = torch.tensor(ids, device=self._device)
        options: dict[str, Any] = {"do_sample": False}
        if self._config.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": self._config.temperature,
                "top_k": 0,
                "min_p": self._config.min_p or None,
            }
        if any(request.watch for request in batch):
            options["stopping_criteria"] = [self._show(batch, longest)]
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + crc32(ids_BT.cpu().numpy().tobytes()))
            output_BT = self._model.generate(
                input_ids=ids_BT,
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=self._config.max_new_tokens,
                eos_token_id=self._format.stop_ids,
                pad_token_id=self._format.stop_ids[0],
                logits_processor=self._grammar_processors(),
                **options,
            )
        return [self._cut(ids) for ids in output_BT[:, longest:].tolist()]

    def _show(
        self, batch: list[_Request], start: int
    ) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """A stopping criterion that passes outputs to their watchers, and stops watched rows that
        repeat themselves or are cancelled.
        """

        def show(ids_BT: torch.Tensor, scores: Any) -> torch.Tensor:
            ended = torch.zeros(len(batch), dtype=torch.bool, device=ids_BT.device)
            for row, request in enumerate(batch):
                if request.watch is None:
                    continue
                output = self._cut(ids_BT[row, start:].tolist())
                request.watch(output.text)
                ended[row] = request.result.cancelled() or output.finish_reason == "repetition"
            return ended

        return show

    def _compile_grammar(self) -> Any:
        """The schema or grammar of the format, compiled for the tokenizer; None if it has neither,
        or without xgrammar, which is installed with vLLM.
        """
        schema, grammar = self._format.schema, self._format.grammar
        if not (schema or grammar):
            return None
        if find_spec("xgrammar") is None:
            log.warning("synthesis: xgrammar is not installed: no grammar constrains the output")
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

    def _grammar_processors(self) -> list[Any]:
        """A new logits processor for each batch, because it has a state."""
        if self._grammar is None:
            return []
        from xgrammar.contrib.hf import LogitsProcessor

        return [LogitsProcessor(self._grammar)]

    def _cut(self, ids: list[int]) -> Generation:
        """The output of one row, up to its first repetition or stop token."""
        for end, token in enumerate(ids, start=1):
            if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids[:end]):
                text = self._vocabulary.decode_continuation(ids[:end])
                return Generation(ids[:end], text, "repetition", 0)
            if token in self._format.stop_ids:
                text = self._vocabulary.decode_continuation(ids[: end - 1])
                return Generation(ids[:end], text, "stop", 0)
        return Generation(ids, self._vocabulary.decode_continuation(ids), "length", 0)
