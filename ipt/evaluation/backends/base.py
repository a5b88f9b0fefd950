"""What runs a model under evaluation: `evaluation.backend`."""

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
    """What a model has answered to one prompt."""

    text: str  # without the text or token that ended it
    tokens: int  # generated, with those that ended it
    finish: str  # stop: one of the texts given | eos: the model's own end | length: cut
    ids: tuple[int, ...] = ()  # of these tokens


class Backend(Protocol):
    @property
    def encoder(self) -> Encoder: ...

    def option_rows(self, question: Question) -> list[EncodedRow]:
        """The rows that score a question's options in order: one for all of them, or one for each."""

    def logprobs(self, rows: Sequence[EncodedRow], description: str) -> list[NDArray[np.float64]]:
        """For each row the log-probability (nats) of each of its targets. `description` names the
        progress bar.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        description: str,
    ) -> list[Generation]:
        """For each prompt (tokens) the greedy continuation before the first of the texts `stop`,
        EOS or `max_new_tokens`.

        What a prompt is answered with does not depend on the prompts beside it.
        """


@contextmanager
def load_backend(config: EvaluationConfig, model: str) -> Iterator[Backend]:
    """The model by name, ready to score and to generate for as long as the context lasts."""
    if config.backend == "vllm":
        from ipt.evaluation.backends.vllm import open_vllm

        with open_vllm(config, model) as backend:
            yield backend
    else:
        from ipt.evaluation.backends.huggingface import load_scorer

        yield load_scorer(config, model)


def generated_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of generated tokens; special ones leave none."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the texts `stop`."""
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


def end_tokens(generation_config: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end a text, as the model's generation config and its tokenizer name them."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None)
