"""Generation with vLLM's asynchronous engine, which runs in processes of its own.

Prompts and outputs are token ids. vLLM keeps the keys and values of finished prompts in its prefix
cache. The next prompt of a chain begins with the previous one, so only its new part is computed as
long as the cache holds the rest.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ipt.errors import UserError
from ipt.synthesis.engines import (
    EngineDied,
    Generation,
    PromptRefused,
    Repetitions,
    Watch,
    check_length,
    prompt_seed,
)
from ipt.synthesis.engines.subprocess import EngineLog, ProcessReaper
from ipt.synthesis.formats.base import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig

# Environment variables to set before vLLM is imported, unless the user has set them: no telemetry,
# error messages only, and spawned engine processes (forked ones would keep the reaper's pipe open).
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
CPU_KV_CACHE = 2**30  # bytes
# vLLM's kernels for CPUs need a multiple of 32; smaller blocks give more cache hits
CPU_BLOCK_SIZE = 32
# prompt lookup: minimum and maximum number of tokens that must match
LOOKUP_MATCH = (2, 4)

log = logging.getLogger(__name__)


class VllmEngine:
    """vLLM with `model`, as `config.data_parallel_size` engines. Start it inside a running event
    loop.

    Raises EngineDied if vLLM does not start.
    """

    def __init__(
        self,
        config: "SynthesisConfig",
        model: str,
        vocabulary: Vocabulary,
        prompt_format: PromptFormat,
        seed: int,
    ) -> None:
        self._environment = dict(os.environ)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._reaper = ProcessReaper()
        self._log = EngineLog()
        os.environ.setdefault("VLLM_RPC_BASE_PATH", self._reaper.scratch)  # for its sockets
        self._config = config
        self._vocabulary = vocabulary
        self._format = prompt_format
        self._seed = seed
        self._repetitions = Repetitions(vocabulary, prompt_format)
        self._request_ids = itertools.count()
        self._engines: list[Any] = []
        try:
            self._start(model)
        except Exception as error:
            message = f"{' '.join(str(error).split())} ({self._log.cause()})"
            self.close()
            raise EngineDied(
                f"synthesis.engine=vllm did not start with synthesis.model={config.model}: "
                f"{message}"
            ) from error
        self._vocabulary_size = self._engines[0].model_config.get_vocab_size()

    async def generate(
        self, prompt: Prompt, *, priority: int, slot: int, watch: Watch | None = None
    ) -> Generation:
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._check(prompt)
        request = self._engines[slot % len(self._engines)].generate(
            TokensPrompt(prompt_token_ids=prompt.ids),
            self._sampling(prompt, watch is not None),
            request_id=str(next(self._request_ids)),
            priority=priority,
        )
        ids: list[int] = []
        try:
            async with aclosing(request) as outputs:
                async for output in outputs:
                    cached_tokens = output.num_cached_tokens or 0
                    for token in output.outputs[0].token_ids:
                        ids.append(token)
                        if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids):
                            text = self._vocabulary.decode_continuation(ids)
                            return Generation(ids, text, "repetition", cached_tokens)
                    if watch:
                        watch(self._vocabulary.decode_continuation(ids))
        except VLLMClientError as error:
            raise PromptRefused(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied(
                f"synthesis.engine=vllm stopped unexpectedly ({self._log.cause()}): finished work "
                "is kept, run the same command again"
            ) from error
        finish_reason = output.outputs[0].finish_reason
        if finish_reason not in ("stop", "length"):
            raise PromptRefused(f"vLLM ended the request with finish_reason={finish_reason}")
        text_ids = ids[:-1] if ids and ids[-1] in self._format.stop_ids else ids
        text = self._vocabulary.decode_continuation(text_ids)
        return Generation(ids, text, finish_reason, cached_tokens)

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, for benchmarks."""
        for engine in self._engines:
            await engine.reset_prefix_cache()

    def close(self) -> None:
        """Stop all processes of the engine, and restore this process's environment, to which vLLM
        adds library preloads and thread settings that later stages would inherit.
        """
        for engine in self._engines:
            engine.shutdown()
            # vLLM's finaliser calls it again, which fails while the interpreter shuts down
            engine.shutdown = lambda: None
        self._reaper.close()
        self._log.close()
        for name in set(os.environ) - set(self._environment):
            del os.environ[name]
        os.environ.update(self._environment)

    def _start(self, model: str) -> None:
        """Start vLLM's engines. Their processes write to the log, unless the user has set a log
        level of vLLM's.
        """
        quiet = "VLLM_LOGGING_LEVEL" not in self._environment
        if quiet:
            log.info(
                "synthesis: starting vLLM; its log is %s", self._log.path, extra={"style": "dim"}
            )
        with self._log.child_output() if quiet else nullcontext():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            if quiet:
                # EngineDied reports an engine that dies. Importing vLLM sets this level.
                logging.getLogger("vllm").setLevel(logging.CRITICAL)
            options = engine_options(self._config, model, self._seed)
            if self._format.schema is None and self._format.grammar is None:
                options["skip_tokenizer_init"] = True  # only a grammar needs vLLM's tokenizer
            else:
                # without optional white space, which some models generate endlessly
                options["structured_outputs_config"] = {
                    "backend": "xgrammar",
                    "disable_any_whitespace": True,
                }
            for replica in range(self._config.data_parallel_size):
                with _own_devices(replica, self._config):
                    self._engines.append(AsyncLLM.from_engine_args(AsyncEngineArgs(**options)))
            _lower_scheduler_priority()

    def _check(self, prompt: Prompt) -> None:
        """Raise PromptRefused for prompts that vLLM accepts and then handles wrongly: it generates
        less than requested for long ones, and token ids beyond the vocabulary crash its worker.
        """
        largest = max(prompt.ids, default=0)
        if largest >= self._vocabulary_size:
            raise PromptRefused(
                f"token {largest} is beyond the model's {self._vocabulary_size} tokens"
            )
        check_length(prompt, self._config)

    def _sampling(self, prompt: Prompt, watched: bool) -> Any:
        from vllm import SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        temperature = self._config.temperature
        options: dict[str, Any] = {"temperature": temperature, "min_p": self._config.min_p}
        if temperature > 0:
            options["seed"] = prompt_seed(prompt, self._seed)
        if temperature > 0 and current_platform.is_cpu():
            # vLLM's runner fails on seeds there ("CPU Generator does not use offset"), so that
            # SeededSampler samples
            options = {"temperature": 0.0, "extra_args": options}
        schema, grammar = self._format.schema, self._format.grammar
        if schema or grammar:
            options["structured_outputs"] = StructuredOutputsParams(json=schema, grammar=grammar)
        grows = watched or self._config.stop_at_repetition
        return SamplingParams(
            **options,
            max_tokens=self._config.max_new_tokens,
            stop_token_ids=self._format.stop_ids,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if grows else RequestOutputKind.FINAL_ONLY,
        )


def engine_options(config: "SynthesisConfig", model: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. Batch sizes are always set, because vLLM's defaults for
    use as a library are small.
    """
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "model": model,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_num_seqs),
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if config.prompt_lookup_num_tokens:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": config.prompt_lookup_num_tokens,
            "prompt_lookup_min": LOOKUP_MATCH[0],
            "prompt_lookup_max": LOOKUP_MATCH[1],
        }
    kv_cache = config.kv_cache_memory_bytes
    if current_platform.is_cpu():
        _set_cpu_threads(config.data_parallel_size * config.tensor_parallel_size)
        options.update(enforce_eager=True, block_size=CPU_BLOCK_SIZE)
        if config.temperature > 0:
            options["logits_processors"] = ["ipt.synthesis.engines.seeded:SeededSampler"]
        if kv_cache is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            kv_cache = CPU_KV_CACHE
    if kv_cache is not None:
        options["kv_cache_memory_bytes"] = kv_cache
    return options


@contextmanager
def _own_devices(replica: int, config: "SynthesisConfig") -> Iterator[None]:
    """Processes started inside see only the GPUs of this replica: `tensor_parallel_size` of the
    visible ones.
    """
    from vllm.platforms import current_platform

    if config.data_parallel_size == 1 or current_platform.is_cpu():
        yield
        return
    name = current_platform.device_control_env_var
    before = os.environ.get(name)
    visible = (
        before.split(",") if before else list(map(str, range(current_platform.device_count())))
    )
    size = config.tensor_parallel_size
    own = visible[replica * size : (replica + 1) * size]
    if len(own) < size:
        raise UserError(
            f"synthesis.data_parallel_size={config.data_parallel_size} x "
            f"tensor_parallel_size={size} needs {config.data_parallel_size * size} GPUs, found "
            f"{len(visible)}"
        )
    os.environ[name] = ",".join(own)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _lower_scheduler_priority() -> None:
    """On a CPU vLLM's scheduler spins while its workers compute. With the lowest priority it does
    not take their cores, which makes generation 1.2 times as fast.
    """
    import psutil
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("VLLM::EngineCor"):
                process.nice(19)


def _set_cpu_threads(engines: int) -> None:
    """Use all cores, without binding threads to them and without spinning, because other processes
    may use the cores too: bound threads, vLLM's default, cannot leave a busy core, and spinning
    ones block it for others. Settings of the user are kept.
    """
    import psutil

    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        available = len(psutil.Process().cpu_affinity() or [0])
        cores = min(psutil.cpu_count(logical=False) or 1, available)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // engines)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
