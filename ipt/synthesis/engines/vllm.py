"""Generation with vLLM's asynchronous engine, in a process of its own that this one starts and stops.

Prompts go in as token ids and come back as token ids. vLLM keeps the keys and values of finished prompts in its prefix cache, so
a chain's next prompt, which begins with the previous one, costs only its new part as long as the cache holds it.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ipt.console import console
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, repeats_itself
from ipt.synthesis.engines.keeper import Keeper
from ipt.synthesis.engines.output import EngineLog

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig
    from ipt.synthesis.prompts import Vocabulary

# Set before vLLM is imported, unless the user has set them: no telemetry, its own messages only where something fails, and engine
# processes that are started afresh (a forked one would hold the keeper's pipe open).
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
CPU_KV_CACHE_GIB = 1.0
CPU_BLOCK_SIZE = 32  # tokens; vLLM's kernels for CPUs want a multiple of 32, and a finer block is found in the cache more often


class VllmEngine:
    """vLLM serving `model`; start it inside a running event loop. Raises EngineDied if vLLM does not start."""

    def __init__(self, config: "SynthesisConfig", model: str, vocabulary: "Vocabulary", seed: int) -> None:
        self._environment = dict(os.environ)
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        self._keeper, self._log = Keeper(), EngineLog()
        self._config, self._vocabulary, self._seed = config, vocabulary, seed
        self._request_ids = itertools.count()
        try:
            self._engine = self._start(model)
        except Exception as error:
            message = f"{' '.join(str(error).split())} ({self._log.cause()})"
            self._clean_up()
            raise EngineDied(f"synthesis.engine=vllm did not start with synthesis.model={config.model}: {message}") from error
        self._vocabulary_size = self._engine.model_config.get_vocab_size()

    async def generate(self, prompt_ids: list[int], *, max_tokens: int, stop_ids: Sequence[int], priority: int) -> Generation:
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if max(prompt_ids, default=0) >= self._vocabulary_size:  # vLLM does not check this, and its worker dies of it
            raise PromptRefused(f"token {max(prompt_ids)} is beyond the model's {self._vocabulary_size} tokens")
        if len(prompt_ids) + max_tokens > self._config.max_model_len:  # vLLM would silently generate less
            raise PromptRefused(f"{len(prompt_ids)} prompt tokens and {max_tokens} new ones, max_model_len={self._config.max_model_len}")
        request = self._engine.generate(
            TokensPrompt(prompt_token_ids=prompt_ids),
            self._sampling(prompt_ids, max_tokens, stop_ids),
            request_id=str(next(self._request_ids)),
            priority=priority,
        )
        ids: list[int] = []
        try:
            async with aclosing(request) as outputs:
                async for output in outputs:
                    for token in output.outputs[0].token_ids:
                        ids.append(token)
                        if self._config.stop_at_repetition and repeats_itself(ids, self._vocabulary):
                            text = self._vocabulary.decode_continuation(ids)
                            return Generation(ids, text, "repetition", output.num_cached_tokens or 0)
        except VLLMClientError as error:
            raise PromptRefused(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied(
                f"synthesis.engine=vllm stopped in between ({self._log.cause()}): what is finished is kept, run the same command again"
            ) from error
        return self._generation(ids, output, stop_ids)

    def close(self) -> None:
        self._engine.shutdown()
        self._engine.shutdown = lambda: None  # vLLM's finaliser calls it again, and fails at the end of the interpreter
        self._clean_up()

    def _start(self, model: str) -> Any:
        """vLLM's engine. Its processes print to the log, unless the user has set a level and so wants to see it."""
        quiet = "VLLM_LOGGING_LEVEL" not in self._environment
        if quiet:
            console.print(f"[dim]synthesis: vLLM starts; its log is {self._log.path}")
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
        with self._log.child_output() if quiet else nullcontext():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_options(self._config, model, self._seed)))
        if quiet:
            logging.getLogger("vllm").setLevel(logging.CRITICAL)  # vLLM has set it again; that it died is told by our error
        return engine

    def _clean_up(self) -> None:
        """End what may be left of the engine, and take back what vLLM put into this process's environment (library preloads, thread
        settings), which later stages would inherit."""
        self._keeper.close()
        self._log.close()
        for name in set(os.environ) - set(self._environment):
            del os.environ[name]
        os.environ.update(self._environment)

    def _sampling(self, prompt_ids: list[int], max_tokens: int, stop_ids: Sequence[int]) -> Any:
        from vllm import SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        sampled = self._config.temperature > 0
        return SamplingParams(
            temperature=self._config.temperature,
            # A seed for each prompt: the same sample whatever else is in the batch, and after a resume. vLLM's sampler fails on
            # it on a CPU ("CPU Generator does not use offset"), where the engine's own seed must do.
            seed=(self._seed + crc32(bytes(str(prompt_ids), "ascii"))) % 2**31 if sampled and not current_platform.is_cpu() else None,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if self._config.stop_at_repetition else RequestOutputKind.FINAL_ONLY,
        )

    def _generation(self, ids: list[int], output: Any, stop_ids: Sequence[int]) -> Generation:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise PromptRefused(f"vLLM ended the request with finish_reason={completion.finish_reason}")
        text_ids = ids[:-1] if ids and ids[-1] in stop_ids else ids
        text = self._vocabulary.decode_continuation(text_ids)
        return Generation(ids, text, completion.finish_reason, output.num_cached_tokens or 0)


def engine_options(config: "SynthesisConfig", model: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. Batch sizes are always given: in process, vLLM would fall back to small ones."""
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,  # we tokenise ourselves
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_live_chains,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_live_chains),
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    kv_cache_gib = config.kv_cache_gib
    if current_platform.is_cpu():
        _set_cpu_threads()
        options.update(enforce_eager=True, block_size=CPU_BLOCK_SIZE)
        if kv_cache_gib is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            kv_cache_gib = CPU_KV_CACHE_GIB
    if kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return options


def _set_cpu_threads() -> None:
    """Leave one core to vLLM's scheduler, which spins while it waits, and bind nothing: other work may share the cores.

    Threads on all cores wait for each other at every step as soon as one of them has to share its core. Bound ones, vLLM's own
    choice, cannot move away from a busy core. What the user has set is left alone.
    """
    import psutil

    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        cores = min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity() or [0]))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
