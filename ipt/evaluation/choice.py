"""Tasks of kind `choice`: which of several continuations of a prompt does the model find most likely?"""

import math
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ipt.evaluation import encoding, statistics
from ipt.evaluation.data import Row, check_ids, read_rows, render, row_id, text_hash
from ipt.evaluation.statistics import Metric
from ipt.evaluation.task import Task

if TYPE_CHECKING:
    from ipt.evaluation.backend import Backend

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("options", pa.list_(pa.string())),
        ("gold", pa.int32()),
        ("scores", pa.list_(pa.float64())),  # mean log-probability (nats) per token of each option: the paper's score
        ("sums", pa.list_(pa.float64())),  # log-probability of each option
        ("per_byte", pa.list_(pa.float64())),  # log-probability per UTF-8 byte of each option
        ("tokens", pa.list_(pa.int32())),  # scored tokens of each option
        ("truncated", pa.bool_()),  # the prompt did not fit and lost its beginning
    ]
)


class Question(NamedTuple):
    id: str
    prompt: str
    options: list[str]
    gold: int

    @property
    def text(self) -> str:
        """The question with its right option."""
        return self.prompt + self.options[self.gold]

    @property
    def prompt_hash(self) -> str:
        """Hash of all that the model reads: two predictions of one hash answer the same question."""
        return text_hash("\x00".join([self.prompt, *self.options]))


def read(task: Task, corpus: Path | None) -> list[Question]:
    """The questions of a task; raises a one-line error that names the row."""
    questions = [_question(task, row) for row in read_rows(task, corpus)]
    check_ids(task, questions)
    return questions


def score(task: Task, questions: list[Question], backend: "Backend") -> list[dict[str, Any]]:
    """One prediction for each question; all options of a question go through the model together where it allows that."""
    encoded = [backend.encoder.question(question.prompt, question.options) for question in questions]
    rows = [row for question in encoded for row in backend.option_rows(question)]
    logprobs = np.concatenate(backend.logprobs(rows, task.name))
    lengths = [len(option) for question in encoded for option in question.options]
    sums = iter(np.add.reduceat(logprobs, [0, *accumulate(lengths[:-1])]))
    return [
        _prediction(question, tokens, [float(next(sums)) for _ in question.options])
        for question, tokens in zip(questions, encoded, strict=True)
    ]


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Items that were not scored as they stand, by reason."""
    return {"truncated_prompts": sum(row["truncated"] for row in predictions)}


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """What the predictions amount to.

    - accuracy: the right option has the highest mean log-probability per token (paper section 7.3)
    - accuracy_sum: the right option has the highest log-probability
    - logprob: mean log-probability per token of the right option (nats)
    - probability: of the right option, from a softmax over the options' mean log-probabilities per token
    - bits_per_byte: of the right option
    """
    gold = [row["gold"] for row in predictions]
    scores = [np.array(row["scores"]) for row in predictions]
    sums = [np.array(row["sums"]) for row in predictions]
    per_byte = [row["per_byte"][row["gold"]] for row in predictions]
    return {
        "accuracy": statistics.proportion([int(s.argmax() == g) for s, g in zip(scores, gold, strict=True)]),
        "accuracy_sum": statistics.proportion([int(s.argmax() == g) for s, g in zip(sums, gold, strict=True)]),
        "logprob": statistics.mean([s[g] for s, g in zip(scores, gold, strict=True)]),
        "probability": statistics.mean([_softmax(s)[g] for s, g in zip(scores, gold, strict=True)]),
        "bits_per_byte": statistics.mean([-value / math.log(2) for value in per_byte]),
    }


def _prediction(question: Question, encoded: encoding.Question, sums: list[float]) -> dict[str, Any]:
    tokens = [len(option) for option in encoded.options]
    n_bytes = [len(option.encode()) for option in question.options]
    return {
        "id": question.id,
        "prompt_hash": question.prompt_hash,
        "options": question.options,
        "gold": question.gold,
        "scores": [total / n for total, n in zip(sums, tokens, strict=True)],
        "sums": sums,
        "per_byte": [total / n for total, n in zip(sums, n_bytes, strict=True)],
        "tokens": tokens,
        "truncated": encoded.truncated,
    }


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# From a row to a question --------------------------------------------------------------------------------------------


def _question(task: Task, row: Row) -> Question:
    raw = _raw_options(task, row)
    options = [render(task, "option", task.option, row, option=option) for option in raw]
    if len(options) < 2 or "" in options or len(set(options)) < len(options):
        raise ValueError(f"{row.where}: options are {options!r}, expected at least two different texts, none empty")
    prompt = render(task, "prompt", task.prompt, row)
    return Question(row_id(task, row), prompt, options, _gold(task, row, raw))


def _raw_options(task: Task, row: Row) -> list[str]:
    if isinstance(task.options, list):
        return [render(task, "options", template, row) for template in task.options]
    found = row.fields.get(task.options)
    if not isinstance(found, list) or not all(isinstance(option, str) for option in found):
        raise ValueError(
            f"{row.where}: field {task.options} is {found!r}, expected a list of texts (the task's key `options` names the field)"
        )
    return found


def _gold(task: Task, row: Row, options: list[str]) -> int:
    """The index of the right option, which the row gives as an index or as the option's text."""
    found = row.fields.get(task.gold)
    if isinstance(found, str) and found in options:
        return options.index(found)
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(options):
        return found
    raise ValueError(
        f"{row.where}: field {task.gold} is {found!r}, expected an index from 0 to {len(options) - 1} or the text of an option"
    )
