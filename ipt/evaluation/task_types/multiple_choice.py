"""Tasks of kind `choice`: the model answers with the most likely of several continuations."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from jinja2 import meta
from numpy.typing import NDArray

from ipt.errors import UserError
from ipt.evaluation.backends import encoding
from ipt.evaluation.data import (
    ENVIRONMENT,
    DataRow,
    check_ids,
    phrasing,
    read_rows,
    render,
    render_prompt,
    row_id,
    text_hash,
)
from ipt.evaluation.few_shot import with_demonstrations
from ipt.evaluation.metrics import statistics
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.odd_rows import OddRow, OddRows
from ipt.evaluation.task import Task
from ipt.evaluation.task_types.gold import Gold, gold_of, meaning, right_options

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("options", pa.list_(pa.string())),
        ("gold", pa.int32()),  # the (first) right option
        ("right", pa.list_(pa.int32())),  # all right options
        ("group", pa.string()),  # value of the field `group`
        ("scores", pa.list_(pa.float64())),  # mean log-probability (nats) per token of each option
        # the same over the tokens that the published scorer counts as the option
        ("published", pa.list_(pa.float64())),
        ("sums", pa.list_(pa.float64())),  # log-probability of each option
        ("per_byte", pa.list_(pa.float64())),  # log-probability per UTF-8 byte of each option
        # log-probability of each option after the prompt `unconditional`, if the task has one
        ("unconditional", pa.list_(pa.float64())),
        ("tokens", pa.list_(pa.int32())),  # scored tokens of each option
        ("truncated", pa.bool_()),  # the prompt lost its beginning to fit the context length
    ]
)


F1S = ("macro_f1", "weighted_f1")  # of classes: which option, by its index
METRICS = ("accuracy", "micro_f1", *F1S, "multi_label")


class Question(NamedTuple):
    """The model reads `prompt`, the context of the option (if prompts differ) and the option."""

    id: str
    prompt: str
    options: list[str]
    gold: int  # the (first) right option
    shots: int = 0  # characters of the prompt that are demonstrations
    right: tuple[int, ...] = ()  # all right options, if several
    contexts: tuple[str, ...] = ()
    unconditional: str | None = None  # a prompt without information
    group: str | None = None

    @property
    def text(self) -> str:
        """The question with its right option, without demonstrations."""
        context = self.contexts[self.gold] if self.contexts else ""
        return (self.prompt + context)[self.shots :] + self.options[self.gold]

    @property
    def prompts(self) -> str | list[str]:
        """The prompt of all options, or of each one."""
        return [self.prompt + context for context in self.contexts] or self.prompt

    @property
    def prompt_hash(self) -> str:
        """Hash of all that the model reads, the same for the same question."""
        more = [] if self.unconditional is None else [self.unconditional]
        return text_hash("\x00".join([self.prompt, *self.contexts, *self.options, *more]))


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[Question]:
    """The questions of a task. Adds rows that are left out to `odd`."""
    if task.metric not in METRICS:
        raise UserError(
            f"task {task.name}: metric is {task.metric!r}, expected {' or '.join(METRICS)}"
        )
    odd = OddRows() if odd is None else odd
    drafts = _drafts(task, corpus, odd)
    golds = [draft.gold for draft in drafts]
    if not task.gold_is and task.demonstrations is not None:
        golds += [draft.gold for draft in _drafts(task.demonstrations, corpus, OddRows())]
    task = replace(task, gold_is=meaning(task, golds))
    questions = [_question(task, draft) for draft in drafts]
    if task.metric in F1S:
        _check_classes(task, questions)
    check_ids(task, questions)
    return with_demonstrations(task, questions, corpus, read, odd)


def score(task: Task, questions: list[Question], backend: "Backend") -> list[dict[str, Any]]:
    """A prediction for each question. After `unconditional`, equal options are scored once."""
    encoded = [
        backend.encoder.question(question.prompts, question.options) for question in questions
    ]
    alone = {
        (question.unconditional, option): backend.encoder.question(question.unconditional, [option])
        for question in questions
        if question.unconditional is not None
        for option in dict.fromkeys(question.options)
    }
    everything = [*encoded, *alone.values()]
    logprobs = np.concatenate(
        backend.logprobs([row for one in everything for row in backend.option_rows(one)], task.name)
    )
    parts = iter(
        np.split(logprobs, np.cumsum([length for one in everything for length in one.lengths])[:-1])
    )
    scored = [[next(parts) for _ in one.options] for one in encoded]
    unconditional: dict[tuple[str | None, str], float] = {
        pair: float(next(parts).sum()) for pair in alone
    }
    return [
        _prediction(
            question,
            one,
            values,
            [unconditional[question.unconditional, option] for option in question.options if alone],
        )
        for question, one, values in zip(questions, encoded, scored, strict=True)
    ]


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Questions with truncated prompts."""
    return {"truncated_prompts": sum(row["truncated"] for row in predictions)}


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """Metrics:

    - paper: the task's metric as published: the answer is the option with the highest mean
      log-probability per token (paper section 7.3), and any of several right options counts
    - correct: the same, but all tokens that the option adds or changes are scored, and several
      right options are evaluated by micro-F1
    - accuracy, accuracy_sum, accuracy_bytes: a right option has the highest log-probability per
      token, in total, per byte
    - accuracy_unconditional: a right option gains most over its log-probability after
      `unconditional`
    - logprob: mean log-probability per token of the right options (nats)
    - probability: of the right options, from a softmax over the mean log-probabilities per token
    - bits_per_byte: of the right options
    """
    right = [row["right"] for row in predictions]
    answers = {
        key: [int(np.argmax(row[key])) for row in predictions]
        for key in ("scores", "published", "sums", "per_byte")
    }
    found = {
        "paper": _by_group(
            task, predictions, lambda rows: _published(task, answers["published"], right, rows)
        ),
        "correct": _by_group(
            task, predictions, lambda rows: _correct(task, answers["scores"], right, rows)
        ),
        "accuracy": _share(answers["scores"], right),
        "accuracy_sum": _share(answers["sums"], right),
        "accuracy_bytes": _share(answers["per_byte"], right),
    }
    if predictions[0]["unconditional"]:
        gains = [np.subtract(row["sums"], row["unconditional"]) for row in predictions]
        found["accuracy_unconditional"] = _share([int(gain.argmax()) for gain in gains], right)
    scores = [np.array(row["scores"]) for row in predictions]
    per_byte = [np.array(row["per_byte"]) for row in predictions]
    found["logprob"] = statistics.mean([s[r].mean() for s, r in zip(scores, right, strict=True)])
    found["probability"] = statistics.mean(
        [_softmax(s)[r].sum() for s, r in zip(scores, right, strict=True)]
    )
    found["bits_per_byte"] = statistics.mean(
        [-s[r].mean() / math.log(2) for s, r in zip(per_byte, right, strict=True)]
    )
    return found


# Metrics
# ----------------------------------------------------------------------------------------------

Measure = Callable[[Sequence[int]], Metric]  # of the predictions of these indices


def _by_group(task: Task, predictions: list[dict[str, Any]], measure: Measure) -> Metric:
    if not task.group:
        return measure(range(len(predictions)))
    return statistics.mean_of_groups([row["group"] for row in predictions], measure)


def _published(
    task: Task, answers: Sequence[int], right: Sequence[list[int]], rows: Sequence[int]
) -> Metric:
    if task.metric in F1S:
        return statistics.f1(
            [answers[row] for row in rows],
            [right[row][0] for row in rows],
            task.metric.removesuffix("_f1"),
        )
    return _share([answers[row] for row in rows], [right[row] for row in rows])


def _correct(
    task: Task, answers: Sequence[int], right: Sequence[list[int]], rows: Sequence[int]
) -> Metric:
    if task.metric != "multi_label":
        return _published(task, answers, right, rows)
    hits = [2.0 * (answers[row] in right[row]) for row in rows]
    return statistics.ratio(hits, [1.0 + len(right[row]) for row in rows])


def _share(answers: Iterable[int], right: Iterable[list[int]]) -> Metric:
    return statistics.proportion(
        [int(answer in allowed) for answer, allowed in zip(answers, right, strict=True)]
    )


def _prediction(
    question: Question,
    encoded: encoding.Question,
    logprobs: list[NDArray[np.float64]],
    unconditional: list[float],
) -> dict[str, Any]:
    n_bytes = [len(option.encode()) for option in question.options]
    published = encoded.published or encoded.lengths
    sums = [float(values.sum()) for values in logprobs]
    return {
        "id": question.id,
        "prompt_hash": question.prompt_hash,
        "options": question.options,
        "gold": question.gold,
        "right": list(question.right or [question.gold]),
        "group": question.group,
        "scores": [total / n for total, n in zip(sums, encoded.lengths, strict=True)],
        "published": [
            float(values[-n:].mean()) for values, n in zip(logprobs, published, strict=True)
        ],
        "sums": sums,
        "per_byte": [total / n for total, n in zip(sums, n_bytes, strict=True)],
        "unconditional": unconditional or None,
        "tokens": encoded.lengths,
        "truncated": encoded.truncated,
    }


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# From a row to a question
# ----------------------------------------------------------------------------------------------


class _Draft(NamedTuple):
    """A question before the meaning of `gold` (index or text) is known."""

    row: DataRow
    prompt: str  # empty if each option has a prompt
    options: list[str]
    contexts: list[str]
    unconditional: str | None
    gold: Gold


def _drafts(task: Task, corpus: Path | None, odd: OddRows) -> list[_Draft]:
    return odd.kept(task, read_rows(task, corpus, odd), partial(_draft, task))


def _draft(task: Task, row: DataRow) -> _Draft:
    raw = _raw_options(task, row)
    options = [render(task, "option", task.option, row, option=option) for option in raw]
    contexts = []
    if _differs(task, row):
        contexts = [render_prompt(task, row, option=option) for option in raw]
    texts = set(zip(contexts, options, strict=True) if contexts else options)
    if len(options) < 2 or not all(map(str.strip, options)) or len(texts) < len(options):
        raise OddRow(
            f"{row.where}: options are {options!r}, expected at least two different texts, none "
            "empty"
        )
    if task.group and row.fields.get(task.group) is None:
        raise OddRow(
            f"{row.where}: there is no field {task.group}, which the task's key `group` names; "
            f"there are {', '.join(row.fields)}"
        )
    prompt = "" if contexts else render_prompt(task, row)
    unconditional = None
    if task.unconditional:
        unconditional = render(task, "unconditional", task.unconditional, row)
    return _Draft(row, prompt, options, contexts, unconditional, gold_of(task, row, raw))


def _question(task: Task, draft: _Draft) -> Question:
    row, right = draft.row, right_options(task, draft.gold)
    return Question(
        row_id(task, row),
        draft.prompt,
        draft.options,
        right[0],
        right=right if len(right) > 1 else (),
        contexts=tuple(draft.contexts),
        unconditional=draft.unconditional,
        group=str(row.fields[task.group]) if task.group else None,
    )


def _differs(task: Task, row: DataRow) -> bool:
    """Whether each option has its own prompt: the template uses `option`, which is not a field."""
    return "option" not in row.fields and _uses_option(phrasing(task, row_id(task, row)))


@lru_cache
def _uses_option(template: str) -> bool:
    return "option" in template and "option" in meta.find_undeclared_variables(
        ENVIRONMENT.parse(template)
    )


def _check_classes(task: Task, questions: list[Question]) -> None:
    """Raise UserError unless all items have the same options (the classes), and one right one."""
    for question in questions:
        if question.options != questions[0].options:
            raise UserError(
                f"task {task.name}: metric {task.metric} needs the same options for all items, "
                f"but item {question.id} has {question.options!r}, and the first one "
                f"{questions[0].options!r}"
            )
        if question.right:
            raise UserError(
                f"task {task.name}: item {question.id} has several right options: replace metric "
                f"{task.metric} by multi_label"
            )


def _raw_options(task: Task, row: DataRow) -> list[str]:
    if isinstance(task.options, list):
        return [render(task, "options", template, row) for template in task.options]
    found = row.fields.get(task.options)
    if found is None:
        raise OddRow(
            f"{row.where}: there is no field {task.options}, which the task's key `options` names; "
            f"there are {', '.join(row.fields)}"
        )
    if not isinstance(found, list) or not all(
        option is None or isinstance(option, str) for option in found
    ):
        raise OddRow(
            f"{row.where}: field {task.options} is {found!r}, expected a list of texts (the task's "
            "key `options` names the field)"
        )
    return [option or "" for option in found]
