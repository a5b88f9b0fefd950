"""Log-probabilities of tokens under a model: batches by length, tree masks, and no more logits than are read."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ipt.config import EvaluationConfig
from ipt.console import console, progress
from ipt.evaluation.encoding import Encoder, Question, Row, plain_rows, start_tokens, tree_row
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
    model = load_model(name, DTYPES[config.dtype]).to(device)  # type: ignore[arg-type]
    return Scorer(model.eval(), load_tokenizer(name), config)


class Scorer:
    """A model that scores rows of tokens.

    Two short cuts are taken where the model gives the same figures with them as without (`scoring=auto` tries both once):
    options share a row with their prompt, and only the outputs that are read are projected to the vocabulary.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: EvaluationConfig) -> None:
        self.model, self.batch_tokens = model, config.batch_tokens
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.encoder = Encoder(tokenizer, start_tokens(tokenizer, config.bos), min(config.max_length or UNLIMITED, context_length(model)))
        plain = config.scoring == "plain"
        self.projects_itself = plain  # the model computes its logits, all of them
        self.tree_length = 0 if plain else full_attention_length(model)  # questions of at most so many tokens take the tree
        if config.scoring == "auto":
            self._probe()

    def option_rows(self, question: Question) -> list[Row]:
        """The rows that score a question's options in order: one for all of them, or one for each."""
        length = len(question.prompt) + max(map(len, question.options))
        return [tree_row(question)] if length <= self.tree_length else plain_rows(question)

    def logprobs(self, rows: Sequence[Row], description: str) -> list[NDArray[np.float64]]:
        """For each row the log-probability (nats) of each of its targets. `description` names the progress bar."""
        result: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
        with progress(description, len(rows)) as bar:
            for batch in self._batches(rows):
                values = self._score([rows[index] for index in batch])
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{description}: the model's log-probabilities are not finite: its weights are broken, or training diverged"
                    )
                ends = np.cumsum([len(rows[index].targets) for index in batch])
                for index, part in zip(batch, np.split(values, ends[:-1]), strict=True):
                    result[index] = part
                bar.advance(len(batch))
        return result

    def generate(self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_new_tokens: int, description: str) -> list[str]:
        raise NotImplementedError

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Rows with branches apart from others: their mask replaces the model's own, which may be a sliding window."""
        limit = min(self.batch_tokens, 4 * LOGITS // self.vocabulary) if self.projects_itself else self.batch_tokens
        for branching in (True, False):
            group = [index for index, row in enumerate(rows) if any(row.segments) is branching]
            for batch in batches([len(rows[index].ids) for index in group], limit):
                yield [group[place] for place in batch]

    @torch.inference_mode()
    def _score(self, rows: list[Row]) -> NDArray[np.float64]:
        """Log-probabilities of all targets of one batch, row after row."""
        inputs = self._inputs(rows)
        outputs_BTX = self.model(**inputs).logits if self.projects_itself else self.model.base_model(**inputs).last_hidden_state
        width = outputs_BTX.shape[1]
        reads = [index * width + read for index, row in enumerate(rows) for read in row.reads]
        targets = [target for row in rows for target in row.targets]
        read_R, target_R = torch.tensor([reads, targets], device=outputs_BTX.device)
        return self._read(outputs_BTX.flatten(0, 1), read_R, target_R).cpu().double().numpy()

    def _inputs(self, rows: list[Row]) -> dict[str, Any]:
        """Padding goes to the right, where no token that is read can see it."""
        device = self.model.device
        width = max(len(row.ids) for row in rows)
        ids_BT, position_BT, segment_BT = (
            torch.tensor([list(values) + [0] * (width - len(values)) for values in column], device=device)
            for column in zip(*((row.ids, row.positions, row.segments) for row in rows), strict=True)
        )
        if not segment_BT.any():  # no branches: the model's own causal attention
            return {"input_ids": ids_BT, "use_cache": False}
        mask = tree_mask(segment_BT, self.model.dtype)
        return {"input_ids": ids_BT, "position_ids": position_BT, "attention_mask": mask, "use_cache": False}

    def _read(self, outputs_NX: torch.Tensor, read_R: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        """Log-probability of each target. An output that predicts several targets (the prompt's last) is projected once."""
        read_U, unique_R = torch.unique(read_R, return_inverse=True)
        result_R = torch.empty(len(read_R), device=read_R.device)
        chunk = max(1, LOGITS // self.vocabulary)
        for start in range(0, len(read_U), chunk):
            outputs = outputs_NX[read_U[start : start + chunk]]
            logits_CV = (outputs if self.projects_itself else self.model.get_output_embeddings()(outputs)).float()
            here = ((unique_R >= start) & (unique_R < start + chunk)).nonzero().squeeze(1)
            place = unique_R[here] - start
            result_R[here] = logits_CV[place, target_R[here]] - logits_CV.logsumexp(-1)[place]
        return result_R

    def _probe(self) -> None:
        """Leave out a short cut that changes what the model says, or that it cannot take at all."""
        first = self.vocabulary // 3  # ordinary tokens: on special ones a model may say anything, and not twice the same
        prompt, *options = ([first + token for token in part] for part in ([1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 8, 9, 11], [7, 8]))
        question = Question(prompt, options, truncated=False)
        self.projects_itself = True
        expected = self._score(plain_rows(question))
        self.projects_itself = False
        self.projects_itself = not self._agrees(plain_rows(question), expected)
        if not self._agrees([tree_row(question)], expected):
            self.tree_length = 0
        if not self.tree_length:
            console.print("[dim]evaluation: this architecture takes no tree of options: each option is scored alone, which is slower")

    def _agrees(self, rows: list[Row], expected: NDArray[np.float64]) -> bool:
        try:
            found = self._score(rows)
        except Exception:  # whatever an architecture raises when it is called in a way that it does not know
            return False
        return bool(np.abs(found - expected).max() <= TOLERANCE[self.model.dtype])


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that go through the model together: longest first, at most `batch_tokens` with padding, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def tree_mask(segment_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T), added to attention scores: 0 where a token sees another, the lowest number elsewhere.

    A token sees what lies before it in the trunk (segment 0) and in its own branch.
    """
    width = segment_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segment_BT.device).tril()
    of_query, of_key = segment_BT[:, :, None], segment_BT[:, None, :]
    sees_BTT = causal_TT & ((of_key == 0) | (of_key == of_query))
    mask_BTT = torch.zeros(sees_BTT.shape, dtype=dtype, device=segment_BT.device)
    return mask_BTT.masked_fill_(~sees_BTT, torch.finfo(dtype).min)[:, None]


def context_length(model: "PreTrainedModel") -> int:
    """Tokens that the model can read at once."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)


def full_attention_length(model: "PreTrainedModel") -> int:
    """Texts of at most so many tokens are seen whole by every layer; 0 where some layers do not attend at all.

    A mask that we pass replaces the model's own, so a row of branches must not need a sliding window.
    """
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return 0
    return int(getattr(config, "sliding_window", None) or UNLIMITED)
