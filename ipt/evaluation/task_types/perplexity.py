"""Tasks of kind `perplexity`: how well the model predicts held-out documents, or ends of texts."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ipt.errors import UserError
from ipt.evaluation.backends import encoding
from ipt.evaluation.data import check_ids, read_rows, render, row_id, text_hash
from ipt.evaluation.formats import DataRow
from ipt.evaluation.metrics import statistics
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.odd_rows import OddRow, OddRows
from ipt.evaluation.task import Task

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("nll", pa.float64()),  # negative log-likelihood of the document (nats)
        ("tokens", pa.int64()),  # scored tokens
        ("bytes", pa.int64()),  # UTF-8 bytes of the scored text
        ("windows", pa.int32()),  # more than one: the document is longer than the model's context
        ("truncated", pa.bool_()),  # the context lost its beginning to fit the context length
        # with `context`: each token of the text is the most likely one; else null
        ("greedy", pa.bool_()),
    ]
)


class ScoredDocument(NamedTuple):
    id: str
    text: str
    begin: int = 0  # characters of `context`, which are not scored

    @property
    def prompt_hash(self) -> str:
        return text_hash(self.text)

    @property
    def scored(self) -> str:
        return self.text[self.begin :]


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[ScoredDocument]:
    """The documents of a task. Adds rows that are left out to `odd`."""
    odd = OddRows() if odd is None else odd
    documents = odd.kept(task, read_rows(task, corpus, odd), partial(_document, task))
    check_ids(task, documents)
    return documents


def _document(task: Task, row: DataRow) -> ScoredDocument:
    context = render(task, "context", task.context, row) if task.context else ""
    text = render(task, "text", task.text, row)
    if context and not text:
        raise OddRow(f"{row.where}: text is empty, so nothing follows the context")
    return ScoredDocument(row_id(task, row), context + text, len(context))


def score(task: Task, documents: list[ScoredDocument], backend: "Backend") -> list[dict[str, Any]]:
    """A prediction for each document; those with less than two tokens (including BOS) have
    tokens = 0.
    """
    encoded = [_encode(backend.encoder, document) for document in documents]
    logprobs = iter(
        backend.logprobs(
            [window for document, _ in encoded for window in document.windows], task.name
        )
    )
    greedy = iter(_greedy(task, documents, backend) if task.context else [])
    predictions = []
    for document, ((windows, n_bytes), truncated) in zip(documents, encoded, strict=True):
        scored = [next(logprobs) for _ in windows]
        predictions.append(
            {
                "id": document.id,
                "prompt_hash": document.prompt_hash,
                "nll": -math.fsum(value for window in scored for value in window),
                "tokens": sum(map(len, scored)),
                "bytes": n_bytes,
                "windows": len(windows),
                "truncated": truncated,
                "greedy": next(greedy, None),
            }
        )
    if not any(row["tokens"] for row in predictions):
        raise UserError(
            f"task {task.name}: none of its {len(documents)} documents has two tokens or more: "
            "there is nothing to score"
        )
    return predictions


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Documents in several windows, without scored tokens, or with truncated contexts."""
    windowed = sum(row["windows"] > 1 for row in predictions)
    empty = sum(not row["tokens"] for row in predictions)
    return {
        "windowed_documents": windowed,
        "empty_documents": empty,
        "truncated_contexts": sum(row["truncated"] for row in predictions),
    }


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """Documents are the clusters of standard errors, and `n` is their number.

    - nll: negative log-likelihood per token (nats), with equal weight for every token
    - perplexity: exp(nll)
    - bits_per_byte: comparable between tokenizers

    With `context`, as in LAMBADA, also:

    - accuracy: the greedy continuation of the context is the text
    - text_perplexity: exp of the mean negative log-likelihood per text
    """
    scored = [row for row in predictions if row["tokens"]]
    nll = [row["nll"] for row in scored]
    per_token = statistics.ratio(nll, [row["tokens"] for row in scored])
    bits = [value / math.log(2) for value in nll]
    found = {
        "nll": per_token,
        "perplexity": statistics.exponential(per_token),
        "bits_per_byte": statistics.ratio_or_nan(bits, [row["bytes"] for row in scored]),
    }
    if task.context:
        found["accuracy"] = statistics.proportion([int(row["greedy"]) for row in scored])
        found["text_perplexity"] = statistics.exponential(statistics.mean(nll))
    return found


def _encode(
    encoder: encoding.Encoder, document: ScoredDocument
) -> tuple[encoding.EncodedDocument, bool]:
    """The rows that score a document, and whether its context was truncated."""
    if not document.begin:
        return encoder.document(document.text), False
    question = encoder.question(document.text[: document.begin], [document.scored])
    rows = encoding.plain_rows(question)
    n_bytes = len(document.scored.encode())
    return encoding.EncodedDocument(rows, n_bytes), question.truncated


def _greedy(task: Task, documents: list[ScoredDocument], backend: "Backend") -> list[bool]:
    """For each document whether the greedy continuation of its context is the text."""
    questions = [
        backend.encoder.question(document.text[: document.begin], [document.scored])
        for document in documents
    ]
    expected = [tuple(question.options[0]) for question in questions]
    prompts = [question.prompt for question in questions]
    written = backend.generate(prompts, [], max(map(len, expected)), task.name)
    return [answer.ids[: len(ids)] == ids for answer, ids in zip(written, expected, strict=True)]
