"""Generation with vLLM's asynchronous engine, in a process of its own that this one starts and
stops.

Prompts go in as token ids and come back as token ids. vLLM keeps the keys and values of finished
prompts in its prefix cache, so a chain's next prompt, which begins with the previous one, costs
only its new part as long as the cache holds it.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ipt.console import console
from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, Repetitions, Watch
from ipt.synthesis.engines.subprocess import EngineLog, ProcessReaper
from ipt.synthesis.formats.base import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig

# Set before vLLM is imported, unless the user has set them: no telemetry, its own messages only
# where something fails, and engine processes that are started afresh (a forked one would hold the
# keeper's pipe open).
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
CPU_KV_CACHE = 2**30  # bytes
LOOKUP_MATCH = (2, 4)  # tokens that must match for what followed them in the prompt to be guessed
# tokens; vLLM's kernels for CPUs want a multiple of 32, and a finer block is found in the cache
# more often
CPU_BLOCK_SIZE = 32


class VllmEngine:
    """vLLM serving `model`, in `config.replicas` engines side by side; start it inside a running
    event loop.

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
        os.environ.update(
            {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        )
        self._keeper, self._log = ProcessReaper(), EngineLog()
        os.environ.setdefault("VLLM_RPC_BASE_PATH", self._keeper.scratch)  # of its sockets
        self._config, self._vocabulary, self._format, self._seed = (
            config,
            vocabulary,
            prompt_format,
            seed,
        )
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
        self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None
    ) -> Generation:
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._check(prompt)
        sampling, request_id = (
            self._sampling(prompt, watch is not None),
            str(next(self._request_ids)),
        )
        request = self._engines[lane % len(self._engines)].generate(
            TokensPrompt(prompt_token_ids=prompt.ids),
            sampling,
            request_id=request_id,
            priority=priority,
        )
        ids: list[int] = []
        try:
            async with aclosing(request) as outputs:
                async for output in outputs:
                    for token in output.outputs[0].token_ids:
                        ids.append(token)
                        if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids):
                            text = self._vocabulary.decode_continuation(ids)
                            return Generation(
                                ids, text, "repetition", output.num_cached_tokens or 0
                            )
                    if watch:
                        watch(self._vocabulary.decode_continuation(ids))
        except VLLMClientError as error:
            raise PromptRefused(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied(
                f"synthesis.engine=vllm stopped in between ({self._log.cause()}): what is finished "
                "is kept, run the same command again"
            ) from error
        return self._generation(ids, output)

    async def reset_prefix_cache(self) -> None:
        """Forget all prompts, for measurements."""
        for engine in self._engines:
            await engine.reset_prefix_cache()

    def close(self) -> None:
        for engine in self._engines:
            engine.shutdown()
            engine.shutdown = lambda: (
                None
            )  # vLLM's finaliser calls it again, and fails at the end of the interpreter
        self._clean_up()

    def _start(self, model: str) -> None:
        """Start vLLM's engines. Their processes print to the log, unless the user has set a level
        and so wants to see it.
        """
        quiet = "VLLM_LOGGING_LEVEL" not in self._environment
        if quiet:
            console.print(f"[dim]synthesis: vLLM starts; its log is {self._log.path}")
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
        with self._log.child_output() if quiet else nullcontext():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            options = engine_options(self._config, model, self._seed)
            if self._format.schema is None and self._format.grammar is None:
                options["skip_tokenizer_init"] = (
                    True  # we tokenise ourselves; only a grammar needs the tokenizer there
                )
            else:  # without free white space, which a model may write without end
                options["structured_outputs_config"] = {
                    "backend": "xgrammar",
                    "disable_any_whitespace": True,
                }
            for replica in range(self._config.data_parallel_size):
                with _own_devices(replica, self._config):
                    self._engines.append(AsyncLLM.from_engine_args(AsyncEngineArgs(**options)))
            _let_workers_go_first()
        if quiet:
            logging.getLogger("vllm").setLevel(
                logging.CRITICAL
            )  # vLLM has set it again; that it died is told by our error

    def _clean_up(self) -> None:
        """End what may be left of the engine, and take back what vLLM put into this process's
        environment (library preloads, thread settings), which later stages would inherit.
        """
        self._keeper.close()
        self._log.close()
        for name in set(os.environ) - set(self._environment):
            del os.environ[name]
        os.environ.update(self._environment)

    def _check(self, prompt: Prompt) -> None:
        """Refuse what vLLM would take and not do."""
        length, new = len(prompt.ids), self._config.max_new_tokens
        if (
            max(prompt.ids, default=0) >= self._vocabulary_size
        ):  # vLLM does not check this, and its worker dies of it
            raise PromptRefused(
                f"token {max(prompt.ids)} is beyond the model's {self._vocabulary_size} tokens"
            )
        if length + new > self._config.max_model_len:  # vLLM would silently generate less
            raise PromptRefused(
                f"{length} prompt tokens and {new} new ones, "
                f"max_model_len={self._config.max_model_len}"
            )

    def _sampling(self, prompt: Prompt, watched: bool) -> Any:
        from vllm import SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        schema, grammar = self._format.schema, self._format.grammar
        choice: dict[str, Any] = {
            "temperature": self._config.temperature,
            "min_p": self._config.min_p,
        }
        if (
            self._config.temperature > 0
        ):  # a seed for each prompt: the same sample whatever else is in the batch, and after a resume
            choice["seed"] = (self._seed + crc32(bytes(str(prompt.ids), "ascii"))) % 2**31
            if (
                current_platform.is_cpu()
            ):  # where vLLM's runner fails on seeds ("CPU Generator does not use offset")
                choice = {"temperature": 0.0, "extra_args": choice}
        return SamplingParams(
            **choice,
            max_tokens=self._config.max_new_tokens,
            stop_token_ids=self._format.stop_ids,
            structured_outputs=StructuredOutputsParams(json=schema, grammar=grammar)
            if schema or grammar
            else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA
            if watched or self._config.stop_at_repetition
            else RequestOutputKind.FINAL_ONLY,
        )

    def _generation(self, ids: list[int], output: Any) -> Generation:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise PromptRefused(
                f"vLLM ended the request with finish_reason={completion.finish_reason}"
            )
        text_ids = ids[:-1] if ids and ids[-1] in self._format.stop_ids else ids
        text = self._vocabulary.decode_continuation(text_ids)
        return Generation(ids, text, completion.finish_reason, output.num_cached_tokens or 0)


def engine_options(config: "SynthesisConfig", model: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. Batch sizes are always given: in process, vLLM would
    fall back to small ones.
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
    """Processes started inside see only the GPUs of this replica: the next `tensor_parallel_size` of
    those that are visible.
    """
    from vllm.platforms import current_platform

    if config.data_parallel_size == 1 or current_platform.is_cpu():
        yield
        return
    name, before = (
        current_platform.device_control_env_var,
        os.environ.get(current_platform.device_control_env_var),
    )
    visible = (
        before.split(",")
        if before
        else [str(number) for number in range(current_platform.device_count())]
    )
    size = config.tensor_parallel_size
    mine = visible[replica * size : (replica + 1) * size]
    if len(mine) < size:
        needed = config.data_parallel_size * size
        raise UserError(
            f"synthesis.data_parallel_size={config.data_parallel_size} x tensor_parallel_size={size} need {needed} GPUs, "
            f"there are {len(visible)}"
        )
    os.environ[name] = ",".join(mine)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _let_workers_go_first() -> None:
    """On a CPU vLLM's scheduler, which spins while its workers compute, gets a core only when they
    leave it one: 1.2 times as fast.
    """
    import psutil
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("VLLM::EngineCor"):
                process.nice(19)


def _set_cpu_threads(engines: int) -> None:
    """All cores, none bound, and threads that sleep while they wait for each other: other work may
    share the cores.

    Bound threads, vLLM's own choice, cannot move away from a busy core, and spinning ones keep the
    others from theirs. What the user has set is left alone.
    """
    import psutil

    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        cores = min(
            psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity() or [0])
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // engines)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
