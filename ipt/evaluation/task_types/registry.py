"""The kinds of tasks. A kind is a module that reads items, scores them, and computes metrics of the
predictions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from ipt.errors import UserError
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.task import Task
from ipt.evaluation.task_types import generation, lm_eval, multiple_choice, perplexity, qa_pairs

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend


class Kind(Protocol):
    SCHEMA: pa.Schema  # of the predictions; `id` and `prompt_hash` come first

    @property
    def read(self) -> Callable[..., list[Any]]:
        """(task, corpus, odd=None) -> items (data.Item). Adds rows that are left out to `odd`.
        Raises UserError with file and row.
        """

    @property
    def score(self) -> Callable[[Task, list[Any], "Backend"], list[dict[str, Any]]]:
        """(task, items, backend) -> a prediction for each item."""

    @property
    def counts(self) -> Callable[[list[dict[str, Any]]], dict[str, int]]:
        """How many items were truncated or otherwise changed, by reason."""

    @property
    def metrics(self) -> Callable[[Task, list[dict[str, Any]]], dict[str, Metric]]: ...


KINDS: dict[str, Kind] = {
    "choice": multiple_choice,
    "generation": generation,
    "harness": lm_eval,
    "pairs": qa_pairs,
    "perplexity": perplexity,
}


def item_texts(task: Task, corpus: Path | None) -> list[str]:
    """The text of each item with its right answer, for searches in training texts."""
    return [item.text for item in kind_of(task).read(task, corpus)]


def kind_of(task: Task) -> Kind:
    """The module of the task's kind."""
    if task.kind not in KINDS:
        raise UserError(f"task {task.name}: kind is {task.kind!r}, expected {' or '.join(KINDS)}")
    return KINDS[task.kind]
