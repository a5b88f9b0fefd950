"""Log-probabilities of tokens under a model: batches by length, tree masks, and no more logits than are read."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ipt.config import EvaluationConfig
from ipt.console import console, progress
from ipt.evaluation.encoding import Encoder, Row, plain_rows, start_tokens, tree_row
from ipt.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGITS = 2**25  # of them at a time: 128 MiB in fp32
UNLIMITED = 2**20  # context of a model that states no limit
# How far two ways of computing one log-probability may lie apart by rounding alone.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def load_scorer(config: EvaluationConfig, name: str) -> "Scorer":
    """The model `name` on the device that the config asks for, ready to score."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, DTYPES[config.dtype]).to(device).eval()  # type: ignore[arg-type]
    return Scorer(model, load_tokenizer(name), config)


class Scorer:
    """A model that scores rows of tokens. `trees`: it takes rows with branches; else each option needs a row of its own."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: EvaluationConfig) -> None:
        self.model, self.batch_tokens = model, config.batch_tokens
        max_length = min(config.max_length or UNLIMITED, context_length(model))
        self.encoder = Encoder(tokenizer, start_tokens(tokenizer, config.bos), max_length)
        self.gathers, self.trees = True, True
        if config.scoring == "plain":
            self.gathers, self.trees = False, False
        elif config.scoring == "auto":
            self._probe()

    def logprobs(self, rows: Sequence[Row], description: str | None = None) -> list[NDArray[np.float64]]:
        """For each row the log-probability (nats) of each of its targets. `description` names a progress bar."""
        result: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
        with progress(description or "scoring", len(rows)) as bar, torch.inference_mode():
            for batch in batches([len(row.ids) for row in rows], self.batch_tokens):
                chosen = [rows[index] for index in batch]
                values = self._score(chosen).cpu().double().numpy()
                ends = np.cumsum([len(row.targets) for row in chosen])
                for index, part in zip(batch, np.split(values, ends[:-1]), strict=True):
                    result[index] = part
                bar.advance(len(batch))
        return result
