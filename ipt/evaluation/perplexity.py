"""Tasks of kind `perplexity`: how well does the model predict documents that it has not seen?"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ipt.evaluation import statistics
from ipt.evaluation.data import check_ids, read_rows, render, row_id, text_hash
from ipt.evaluation.statistics import Metric
from ipt.evaluation.task import Task

if TYPE_CHECKING:
    from ipt.evaluation.backend import Backend

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("nll", pa.float64()),  # negative log-likelihood of the document, nats
        ("tokens", pa.int64()),  # scored tokens
        ("bytes", pa.int64()),  # UTF-8 bytes of the scored text
        ("windows", pa.int32()),  # more than one: the document is longer than the model's context
    ]
)


class Document(NamedTuple):
    id: str
    text: str

    @property
    def prompt_hash(self) -> str:
        return text_hash(self.text)


def read(task: Task, corpus: Path | None) -> list[Document]:
    """The documents of a task; a row of the corpus stage is identified by its doc_id."""
    documents = [Document(row_id(task, row), render(task, "text", task.text, row)) for row in read_rows(task, corpus)]
    check_ids(task, documents)
    return documents


def score(task: Task, documents: list[Document], backend: "Backend") -> list[dict[str, Any]]:
    """One prediction for each document; one of less than two tokens (BOS counts) has nothing to score: tokens = 0."""
    encoded = [backend.encoder.document(document.text) for document in documents]
    logprobs = iter(backend.logprobs([window for document in encoded for window in document.windows], task.name))
    predictions = []
    for document, (windows, n_bytes) in zip(documents, encoded, strict=True):
        scored = [next(logprobs) for _ in windows]
        predictions.append(
            {
                "id": document.id,
                "prompt_hash": document.prompt_hash,
                "nll": -math.fsum(value for window in scored for value in window),
                "tokens": sum(map(len, scored)),
                "bytes": n_bytes,
                "windows": len(windows),
            }
        )
    if not any(row["tokens"] for row in predictions):
        raise ValueError(f"task {task.name}: none of its {len(documents)} documents has two tokens or more: there is nothing to score")
    return predictions


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Documents that were not scored as they stand, by reason."""
    windowed = sum(row["windows"] > 1 for row in predictions)
    return {"windowed_documents": windowed, "empty_documents": sum(not row["tokens"] for row in predictions)}


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """What the predictions amount to; documents are the clusters of the standard errors, and `n` counts them.

    - nll: negative log-likelihood per token (nats), every token weighing the same
    - perplexity: exp(nll)
    - bits_per_byte: of the text, comparable between tokenizers
    """
    scored = [row for row in predictions if row["tokens"]]
    nll = [row["nll"] for row in scored]
    per_token = statistics.ratio(nll, [row["tokens"] for row in scored])
    bits = [value / math.log(2) for value in nll]
    return {
        "nll": per_token,
        "perplexity": statistics.exponential(per_token),
        "bits_per_byte": statistics.ratio(bits, [row["bytes"] for row in scored]),
    }
