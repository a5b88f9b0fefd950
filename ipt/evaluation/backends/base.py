"""What runs a model under evaluation: `evaluation.backend`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ipt.config import EvaluationConfig
from ipt.evaluation.backends.encoding import EncodedRow, Encoder, Question
from ipt.evaluation.backends.generated import Generation


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
