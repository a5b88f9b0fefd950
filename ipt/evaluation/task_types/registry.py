"""What a task's `kind` may be. A kind is a module that reads items, scores them and turns
predictions into metrics.
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
        """The items (data.Item) of (task, corpus, odd); raises a one-line error that names the row.

        Rows that make no item are put down in `odd`, an OddRows, if it is given.
        """

    @property
    def score(self) -> Callable[[Task, list[Any], "Backend"], list[dict[str, Any]]]:
        """Predictions, one for each item."""

    @property
    def counts(self) -> Callable[[list[dict[str, Any]]], dict[str, int]]:
        """How many items were not scored as they stand, by reason."""

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
    """What each item of the task says with its right answer, to look for in training texts."""
    return [item.text for item in kind_of(task).read(task, corpus)]


def kind_of(task: Task) -> Kind:
    """The module behind the task's kind."""
    if task.kind not in KINDS:
        raise UserError(f"task {task.name}: kind is {task.kind!r}, expected {' or '.join(KINDS)}")
    return KINDS[task.kind]
