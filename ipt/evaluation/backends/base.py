"""The interface of `evaluation.backend`, which runs a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ipt.config import EvaluationConfig
from ipt.evaluation.backends.encoding import EncodedRow, Encoder, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generation(NamedTuple):
    """The continuation of a prompt."""

    text: str  # without the stop string or end token
    tokens: int  # generated ones, with the stop string or end token
    finish: str  # stop: a stop string | eos: an end token | length: max_new_tokens
    ids: tuple[int, ...] = ()  # of the generated tokens


class Backend(Protocol):
    @property
    def encoder(self) -> Encoder: ...

    def option_rows(self, question: Question) -> list[EncodedRow]:
        """Rows that score a question's options in order: one for all options, or one for each."""

    def logprobs(self, rows: Sequence[EncodedRow], description: str) -> list[NDArray[np.float64]]:
        """For each row the log-probabilities (nats) of its targets. `description`: of the progress
        bar.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        description: str,
    ) -> list[Generation]:
        """For each prompt (tokens) its greedy continuation up to a string in `stop`, an end token
        or `max_new_tokens`. It does not depend on the other prompts.
        """


@contextmanager
def load_backend(config: EvaluationConfig, model: str) -> Iterator[Backend]:
    """A backend with the model `model`."""
    if config.backend == "vllm":
        from ipt.evaluation.backends.vllm import open_vllm

        with open_vllm(config, model) as backend:
            yield backend
    else:
        from ipt.evaluation.backends.huggingface import load_scorer

        yield load_scorer(config, model)


def generated_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first string of `stop`."""
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


def end_tokens(generation_config: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end a text according to the generation config and the tokenizer."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None)
