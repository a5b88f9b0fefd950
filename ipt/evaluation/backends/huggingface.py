"""Log-probabilities of tokens with a Hugging Face model: length batches, tree masks, shared
prefixes, and only the logits that are needed.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ipt.config import EvaluationConfig
from ipt.console import progress
from ipt.distributed import gathered, place
from ipt.errors import UserError
from ipt.evaluation.backends.base import Generation
from ipt.evaluation.backends.batching import (
    UNLIMITED,
    Group,
    batches,
    context_length,
    full_attention_length,
    shared_prefixes,
)
from ipt.evaluation.backends.encoding import (
    EncodedRow,
    Question,
    check_chat,
    make_encoder,
    plain_rows,
    tree_row,
)
from ipt.evaluation.backends.generate import Greedy
from ipt.models import load_model, load_tokenizer, quantization_config
from ipt.training.loss import logit_transform
from ipt.training.model import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
LOGITS = 2**25  # computed at a time: 128 MiB in fp32
# Maximum rounding difference between two ways of computing a log-probability.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
# of 8-bit weights, where rounding depends on the batch
ROUNDED_TOLERANCE = 0.5


def load_scorer(config: EvaluationConfig, name: str) -> "Scorer":
    """A scorer with the model `name` on `config.device`."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "sharded" and place()[1] > 1:
        raise UserError(
            "evaluation.device=sharded spreads one model over all GPUs: start it without torchrun, "
            "or use another device"
        )
    options: dict[str, Any] = {}
    if device == "sharded":
        options["device_map"] = "auto"
    elif config.quantize:
        options["device_map"] = {"": device}
    if config.quantize:
        options["quantization_config"] = quantization_config(config.quantize, DTYPES[config.dtype])
    tokenizer = load_tokenizer(name)
    # before the weights are loaded
    check_chat(tokenizer, config.apply_chat_template, config.chat_template_kwargs)
    model = load_model(name, DTYPES[config.dtype], **options)
    if not options:
        model = model.to(device)  # type: ignore[arg-type]
    return Scorer(model.eval(), tokenizer, config)


class ForwardBatch(NamedTuple):
    """One forward pass: rows without their shared `prefix`, which is computed before."""

    prefix: list[int]
    rows: list[EncodedRow]
    indices: list[int]  # of the rows among all rows


class Scorer:
    """Scores rows of tokens.

    Three optimisations are used if the model gives the same results with them (`scoring=auto` tests
    each once): all options in one row, prefixes shared between rows, and projection of only the
    needed outputs to the vocabulary. The model may be in training, and have LoRA layers. Processes
    (ipt.distributed) divide the batches; all call the model equally often, which a sharded model
    needs.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        config: EvaluationConfig,
    ) -> None:
        self.model, self.batch_tokens = model, config.batch_tokens
        self.inner = base_model(model)
        self.vocabulary = int(self.inner.config.get_text_config().vocab_size)
        self.device = self.inner.get_input_embeddings().weight.device
        limit = min(config.max_length or UNLIMITED, context_length(self.inner))
        self.encoder = make_encoder(tokenizer, config, limit)
        plain = config.scoring == "plain"
        self.projects_itself = plain  # the model computes all logits
        # maximum tokens of a question that is scored as a tree
        self.tree_length = 0 if plain else full_attention_length(self.inner)
        self.prefix_length = self.tree_length  # maximum tokens of a row with a shared prefix
        # of the outputs, which may have a lower precision than the weights
        self.dtype = self._idle().dtype
        self.tolerance = ROUNDED_TOLERANCE if config.quantize == "8bit" else TOLERANCE[self.dtype]
        if config.scoring == "auto":
            self._probe()

    def option_rows(self, question: Question) -> list[EncodedRow]:
        """Rows that score a question's options in order: one for all options, or one for each."""
        length = len(question.prompt) + max(map(len, question.options))
        return [tree_row(question)] if length <= self.tree_length else plain_rows(question)

    def logprobs(self, rows: Sequence[EncodedRow], description: str) -> list[NDArray[np.float64]]:
        """For each row the log-probabilities (nats) of its targets. `description`: of the progress
        bar.
        """
        found: dict[int, NDArray[np.float64]] = {}
        jobs = self._jobs(rows)
        with progress(description, len(rows), hidden=place()[0] > 0) as bar:
            for job, values, done in self._run(jobs):
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{description}: the model's log-probabilities are not finite: its weights "
                        "are broken, or its training diverged"
                    )
                ends = np.cumsum([len(row.targets) for row in job.rows])
                found |= zip(job.indices, np.split(values, ends[:-1]), strict=True)
                bar.advance(done)
        found = gathered(found)
        return [found[index] for index in range(len(rows))]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        description: str,
    ) -> list[Generation]:
        return Greedy(self.model, self.encoder.tokenizer, stop, max_new_tokens).run(
            prompts, self.batch_tokens, description
        )

    def _jobs(self, rows: Sequence[EncodedRow]) -> list[ForwardBatch]:
        """All rows in batches, separate for each group with a shared prefix."""
        groups = shared_prefixes(
            [row.ids[: self._shareable(row)] for row in rows], self.batch_tokens
        )
        grouped = {member for group in groups for member in group.members}
        # Rows with branches have their own batches: their mask replaces the model's mask, which may
        # have a sliding window.
        branching, plain = Group(0, []), Group(0, [])
        for index, row in enumerate(rows):
            if index not in grouped:
                (branching if any(row.segments) else plain).members.append(index)
        limit = self.batch_tokens
        if self.projects_itself:
            limit = min(limit, 4 * LOGITS // self.vocabulary)
        jobs = []
        for length, members in (*groups, branching, plain):
            lengths = [len(rows[member].ids) - length for member in members]
            for batch in batches(lengths, limit, length):
                indices = [members[place] for place in batch]
                prefix = rows[indices[0]].ids[:length]
                jobs.append(
                    ForwardBatch(prefix, [without(rows[i], length) for i in indices], indices)
                )
        return jobs

    def _shareable(self, row: EncodedRow) -> int:
        """Maximum length of a row's shared prefix, which has no used outputs and no branches."""
        if max(row.positions) >= self.prefix_length:
            return 0
        return min(*row.reads, row.segments.count(0))

    @torch.no_grad()  # not inference_mode: what a live model gathers must stay fit for training
    def _run(
        self, jobs: Sequence[ForwardBatch]
    ) -> Iterator[tuple[ForwardBatch, NDArray[np.float64], int]]:
        """The jobs of this process, the log-probabilities of their targets, and the number of rows
        that all processes did meanwhile.
        """
        rank, size = place()
        cache, held = None, [list[int]()] * size  # the prefix in the cache of each process
        for first in range(0, len(jobs), size):
            turn = jobs[first : first + size]
            wanted = [job.prefix for job in turn] + held[len(turn) :]
            if wanted != held:
                if wanted[rank] and wanted[rank] != held[rank]:
                    cache = self._prefix(wanted[rank])
                elif size > 1:
                    self._idle()
                held = wanted
            if rank < len(turn):
                values = self._score(turn[rank].rows, cache if turn[rank].prefix else None)
                yield turn[rank], values, sum(len(job.rows) for job in turn)
            else:
                self._idle()

    @torch.no_grad()
    def _score(self, rows: list[EncodedRow], cache: Cache | None = None) -> NDArray[np.float64]:
        """Log-probabilities of all targets of a batch, row by row, after the prefix in `cache`."""
        outputs_BTX = self._outputs(self._inputs(rows, cache))
        width = outputs_BTX.shape[1]
        reads = [index * width + read for index, row in enumerate(rows) for read in row.reads]
        targets = [target for row in rows for target in row.targets]
        read_R, target_R = torch.tensor([reads, targets], device=outputs_BTX.device)
        return self._read(outputs_BTX.flatten(0, 1), read_R, target_R).cpu().double().numpy()

    @torch.no_grad()
    def _prefix(self, ids: list[int]) -> Cache:
        """Keys and values of a prefix."""
        cache = DynamicCache()
        self.inner.base_model(
            input_ids=torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True
        )
        return Cache(layers=[SharedLayer(layer) for layer in cache.layers])

    @torch.no_grad()
    def _idle(self) -> torch.Tensor:
        """A forward pass of one token, because other processes call the model."""
        return self._outputs(
            {
                "input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.device),
                "use_cache": False,
            }
        )

    def _outputs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits, or hidden states before the projection: (B, T, vocabulary or width)."""
        if self.projects_itself:
            return self.model(**inputs).logits
        return self.inner.base_model(**inputs).last_hidden_state

    def _inputs(self, rows: list[EncodedRow], cache: Cache | None = None) -> dict[str, Any]:
        """Padding is on the right, where used tokens do not attend to it."""
        width = max(len(row.ids) for row in rows)

        def padded(column: list[list[int]]) -> torch.Tensor:
            values = [entries + [0] * (width - len(entries)) for entries in column]
            return torch.tensor(values, device=self.device)

        ids_BT = padded([row.ids for row in rows])
        position_BT = padded([row.positions for row in rows])
        segment_BT = padded([row.segments for row in rows])
        if cache is None and not segment_BT.any():  # no branches: the model's own causal attention
            return {"input_ids": ids_BT, "use_cache": False}
        mask = tree_mask(segment_BT, self.dtype, 0 if cache is None else cache.get_seq_length())
        inputs = {"input_ids": ids_BT, "position_ids": position_BT, "attention_mask": mask}
        if cache is None:
            return {**inputs, "use_cache": False}
        return {**inputs, "past_key_values": cache, "use_cache": True}

    def _read(
        self, outputs_NX: torch.Tensor, read_R: torch.Tensor, target_R: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each target. An output with several targets is projected once."""
        read_U, unique_R = torch.unique(read_R, return_inverse=True)
        result_R = torch.empty(len(read_R), device=read_R.device)
        chunk = max(1, LOGITS // self.vocabulary)
        for start in range(0, len(read_U), chunk):
            outputs = outputs_NX[read_U[start : start + chunk]]
            logits_CV = outputs.float() if self.projects_itself else self._project(outputs)
            here = ((unique_R >= start) & (unique_R < start + chunk)).nonzero().squeeze(1)
            place = unique_R[here] - start
            result_R[here] = logits_CV[place, target_R[here]] - logits_CV.logsumexp(-1)[place]
        return result_R

    def _project(self, outputs_CX: torch.Tensor) -> torch.Tensor:
        """The model's logits of decoder outputs, in fp32."""
        logits_CV = self.inner.get_output_embeddings()(outputs_CX).float()
        logit_transform(self.inner.config).apply_(logits_CV)
        return logits_CV

    def _probe(self) -> None:
        """Disable optimisations that fail or change the results."""
        # ordinary tokens: results for special tokens may be arbitrary
        first = self.vocabulary // 3
        prompt, *options = (
            [first + token for token in part]
            for part in ([1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 8, 9, 11], [7, 8])
        )
        question = Question(prompt, options, truncated=False)
        self.projects_itself = True
        expected = self._score(plain_rows(question))
        self.projects_itself = False
        self.projects_itself = not self._agrees(plain_rows(question), expected)
        if not self._agrees([tree_row(question)], expected):
            self.tree_length = 0
        if not self.tree_length or not self._agrees([tree_row(question)], expected, shared=4):
            self.prefix_length = 0
        if not self.tree_length and place()[0] == 0:
            log.info(
                "evaluation: this architecture does not support trees of options: each option is "
                "scored separately, which is slower",
                extra={"style": "dim"},
            )

    def _agrees(
        self, rows: list[EncodedRow], expected: NDArray[np.float64], shared: int = 0
    ) -> bool:
        try:
            cache = self._prefix(rows[0].ids[:shared]) if shared else None
            found = self._score([without(row, shared) for row in rows], cache)
        except Exception:  # unsupported arguments raise any exception
            return False
        return bool(np.abs(found - expected).max() <= self.tolerance)


class SharedLayer(DynamicLayer):
    """Keys and values (1, heads, prefix, width) before those of every row. Stores nothing of the
    batch.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        rows = len(key_states)
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)


def without(row: EncodedRow, length: int) -> EncodedRow:
    """The row without its first `length` tokens."""
    reads = [read - length for read in row.reads]
    return row._replace(
        ids=row.ids[length:],
        positions=row.positions[length:],
        segments=row.segments[length:],
        reads=reads,
    )


def tree_mask(segment_BT: torch.Tensor, dtype: torch.dtype, prefix: int = 0) -> torch.Tensor:
    """(B, 1, T, prefix + T), added to attention scores: 0 where a token attends, the lowest number
    elsewhere.

    A token attends to the shared prefix, and to earlier tokens of the trunk (segment 0) and of its
    own branch.
    """
    rows, width = segment_BT.shape
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segment_BT.device).tril()
    of_query, of_key = segment_BT[:, :, None], segment_BT[:, None, :]
    sees_BTT = causal_TT & ((of_key == 0) | (of_key == of_query))
    mask_BTK = torch.zeros(rows, width, prefix + width, dtype=dtype, device=segment_BT.device)
    mask_BTK[..., prefix:].masked_fill_(~sees_BTT, torch.finfo(dtype).min)
    return mask_BTK[:, None]
