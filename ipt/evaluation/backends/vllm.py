"""Scoring and generation with vLLM: `evaluation.backend=vllm`.

vLLM returns log-probabilities of prompt tokens, so each option is a prompt of its own. vLLM forms
the batches; its processes end with this one
(ipt.synthesis.engines.subprocess).
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ipt.config import EvaluationConfig, SynthesisConfig
from ipt.console import progress
from ipt.distributed import launcher_number
from ipt.errors import UserError
from ipt.evaluation.backends.base import Generation, cut, end_tokens, generated_text
from ipt.evaluation.backends.encoding import (
    EncodedRow,
    Question,
    check_chat,
    make_encoder,
    plain_rows,
)
from ipt.models import load_tokenizer, resolve_model
from ipt.models.checks import check_weights
from ipt.models.generation_config import load_generation_config
from ipt.synthesis.engines import ENGINES, EngineDied
from ipt.synthesis.engines.subprocess import EngineLog, ProcessReaper
from ipt.synthesis.engines.vllm import ENVIRONMENT, engine_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokens beyond the `max_length` of an `Encoder`: the last target of a document, and a generated one
BEHIND = 2
AS_FITS = -1  # the model's context length, or what fits in the KV cache
logger = logging.getLogger(__name__)
SEQUENCES = 256  # per step


def check_vllm(config: EvaluationConfig) -> None:
    """Raise UserError for settings that vLLM does not support, without importing it."""
    if find_spec("vllm") is None:
        raise UserError(
            f"evaluation.backend=vllm: the package vllm is not installed: {ENGINES['vllm'][1]}, or "
            "set evaluation.backend=hf"
        )
    if (launcher_number("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "evaluation.backend=vllm starts its own processes: do not use torchrun; "
            "evaluation.device=sharded uses all GPUs"
        )
    if config.quantize not in (None, "4bit"):
        raise UserError(
            f"evaluation.quantize={config.quantize}: vLLM quantises only to 4bit while loading: "
            "set evaluation.backend=hf"
        )
    if config.scoring == "tree":
        raise UserError(
            "evaluation.scoring=tree: vLLM scores each option separately: set "
            "evaluation.scoring=plain or evaluation.backend=hf"
        )
    if config.device not in ("auto", "cpu", "cuda", "sharded"):
        raise UserError(
            f"evaluation.device={config.device}: vLLM selects its device: set it to auto, and "
            "set CUDA_VISIBLE_DEVICES"
        )


@contextmanager
def open_vllm(config: EvaluationConfig, name: str) -> Iterator["VllmBackend"]:
    """A backend with the model `name`. Raises EngineDied if vLLM does not start."""
    check_vllm(config)
    check_weights(resolve_model(name))  # vLLM does not check for all missing weights
    tokenizer = load_tokenizer(name)
    check_chat(tokenizer, config.apply_chat_template, config.chat_template_kwargs)
    before, log = dict(os.environ), EngineLog()
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    keeper, engine = ProcessReaper(), None
    try:
        try:
            engine = _start(config, name, log, quiet="VLLM_LOGGING_LEVEL" not in before)
        except Exception as error:
            message = f"{' '.join(str(error).split())} ({log.cause()})"
            raise EngineDied(
                f"evaluation.backend=vllm did not start with model={name}: {message}"
            ) from error
        yield VllmBackend(engine, tokenizer, config, _end_tokens(name, tokenizer))
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
        keeper.close()
        log.close()
        for key in set(os.environ) - set(
            before
        ):  # library preloads and thread settings, which later stages would inherit
            del os.environ[key]
        os.environ.update(before)


class VllmBackend:
    """vLLM's engine as a Backend."""

    def __init__(
        self,
        engine: Any,
        tokenizer: "PreTrainedTokenizerBase",
        config: EvaluationConfig,
        end: frozenset[int],
    ) -> None:
        self._engine, self._end = engine, end
        length = int(engine.model_config.max_model_len) - BEHIND
        self.encoder = make_encoder(tokenizer, config, length)

    def option_rows(self, question: Question) -> list[EncodedRow]:
        """One row for each option."""
        return plain_rows(question)

    def logprobs(self, rows: Sequence[EncodedRow], description: str) -> list[NDArray[np.float64]]:
        """For each row the log-probability (nats) of each of its targets. `description` names the
        progress bar.
        """
        from vllm import SamplingParams

        texts = [
            [*row.ids, row.targets[-1]] if row.reads[-1] == len(row.ids) - 1 else row.ids
            for row in rows
        ]
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        found: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
        for index, output in self._run(texts, sampling, description):
            row = rows[index]
            places = zip(row.reads, row.targets, strict=True)
            found[index] = np.array(
                [output.prompt_logprobs[read + 1][target].logprob for read, target in places]
            )
            if not np.isfinite(found[index]).all():
                raise UserError(
                    f"{description}: the model's log-probabilities are not finite: its weights are "
                    "broken, or training diverged"
                )
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        description: str,
    ) -> list[Generation]:
        """For each prompt (tokens) the greedy continuation before the first of the texts `stop`,
        EOS or `max_new_tokens`.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            stop=list(stop),
            stop_token_ids=sorted(self._end),
            skip_special_tokens=False,
        )
        found = {
            index: self._generation(output.outputs[0], stop)
            for index, output in self._run(prompts, sampling, description)
        }
        return [found[index] for index in range(len(prompts))]

    def _generation(self, completion: Any, stop: Sequence[str]) -> Generation:
        """Decodes tokens as the other backends do, not as vLLM."""
        ids = list(completion.token_ids)
        if completion.finish_reason == "length":
            return Generation(self._text(ids), len(ids), "length", tuple(ids))
        if isinstance(completion.stop_reason, str):
            return Generation(cut(self._text(ids), stop), len(ids), "stop", tuple(ids))
        return Generation(self._text(ids[:-1]), len(ids), "eos", tuple(ids))

    def _text(self, ids: list[int]) -> str:
        return generated_text(self.encoder.tokenizer, ids)

    def _run(
        self, prompts: Sequence[Sequence[int]], sampling: Any, description: str
    ) -> Iterator[tuple[int, Any]]:
        """The index of each prompt and vLLM's output, in the order in which they finish."""
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        with progress(description, len(prompts)) as bar:
            try:
                for index, ids in enumerate(prompts):
                    self._engine.add_request(
                        str(index), TokensPrompt(prompt_token_ids=list(ids)), sampling
                    )
                while self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            yield int(output.request_id), output
                            bar.advance()
            except EngineDeadError as error:
                raise EngineDied(
                    "evaluation.backend=vllm: the engine died: run the same command again to resume"
                ) from error


def _start(config: EvaluationConfig, name: str, log: EngineLog, quiet: bool) -> Any:
    """vLLM's engine. `quiet`: its processes print to the log."""
    if quiet:
        logger.info(f"evaluation: starting vLLM, log: {log.path}", extra={"style": "dim"})
        logging.getLogger("vllm").setLevel(logging.CRITICAL)
    with log.child_output() if quiet else nullcontext():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        engine = LLMEngine.from_engine_args(EngineArgs(**_options(config, name)))
    if quiet:
        logging.getLogger("vllm").setLevel(logging.CRITICAL)  # vLLM resets it
    return engine


def _options(config: EvaluationConfig, name: str) -> dict[str, Any]:
    """The arguments of the synthesizer's engine, with values of the evaluation."""
    import torch

    settings = SynthesisConfig(
        dtype=config.dtype,
        max_model_len=config.max_length + BEHIND if config.max_length else AS_FITS,
        max_num_batched_tokens=config.batch_tokens,
        max_num_seqs=SEQUENCES,
        tensor_parallel_size=torch.cuda.device_count() if config.device == "sharded" else 1,
        quantization="bitsandbytes" if config.quantize else None,
    )
    return engine_options(settings, resolve_model(name), seed=0)


def _end_tokens(name: str, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    return end_tokens(load_generation_config(resolve_model(name)), tokenizer)
