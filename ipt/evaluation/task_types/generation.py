"""Tasks of kind `generation`: the model writes an answer, which is parsed and compared."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from ipt.errors import UserError
from ipt.evaluation.data import check_ids, read_rows, render, render_prompt, row_id, text_hash
from ipt.evaluation.few_shot import with_demonstrations
from ipt.evaluation.formats import DataRow
from ipt.evaluation.metrics import answers, statistics
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import Task

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("answer", pa.string()),  # the right answer
        ("output", pa.string()),  # what the model wrote
        ("parsed", pa.string()),  # what was parsed from it, as JSON; null: nothing
        ("tokens", pa.int32()),  # generated
        # stop: a stop string | eos: an end token | length: max_new_tokens
        ("finish", pa.string()),
        ("truncated", pa.bool_()),  # the prompt lost its beginning to fit the context length
        # the output for the truncated prompt of the published scorer; null: the same prompt
        ("published_output", pa.string()),
    ]
)


class Item(NamedTuple):
    id: str
    prompt: str
    answer: str
    shots: int = 0  # characters of the prompt that are demonstrations

    @property
    def text(self) -> str:
        """The prompt without demonstrations, and the answer."""
        return self.prompt[self.shots :] + self.answer

    @property
    def prompt_hash(self) -> str:
        """Hash of what the model reads."""
        return text_hash(self.prompt)


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[Item]:
    """The items of a task. Adds rows that are left out to `odd`."""
    if task.parse not in PARSERS:
        raise UserError(
            f"task {task.name}: parse is {task.parse!r}, expected {' or '.join(PARSERS)}"
        )
    odd = OddRows() if odd is None else odd
    items = odd.kept(task, read_rows(task, corpus, odd), partial(_item, task))
    check_ids(task, items)
    return with_demonstrations(task, items, corpus, read, odd)


def _item(task: Task, row: DataRow) -> Item:
    return Item(
        row_id(task, row), render_prompt(task, row), render(task, "answer", task.answer, row)
    )


def score(task: Task, items: list[Item], backend: "Backend") -> list[dict[str, Any]]:
    """A prediction for each item. Prompts longer than `published_length` are continued twice, the
    second time truncated to that length.
    """
    prompts = [backend.encoder.prompt(item.prompt, task.max_new_tokens) for item in items]
    generations = backend.generate(
        [ids for ids, _ in prompts], task.stop, task.max_new_tokens, task.name
    )
    start, length = len(backend.encoder.start), task.published_length
    cut: dict[int, list[int]] = {}
    for index, (ids, _) in enumerate(prompts):
        if 0 < length < len(ids):
            cut[index] = ids[:start] + ids[start:][start - length :]
    published = {}
    if cut:
        title = f"{task.name}, cut"
        again = backend.generate(list(cut.values()), task.stop, task.max_new_tokens, title)
        published = {index: generation.text for index, generation in zip(cut, again, strict=True)}
    predictions = []
    for index, item in enumerate(items):
        generation = generations[index]
        predictions.append(
            {
                "id": item.id,
                "prompt_hash": item.prompt_hash,
                "answer": item.answer,
                "output": generation.text,
                "parsed": PARSERS[task.parse](generation.text),
                "tokens": generation.tokens,
                "finish": generation.finish,
                "truncated": prompts[index][1],
                "published_output": published.get(index),
            }
        )
    return predictions


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Items with truncated prompts or answers, and without a parsed answer."""
    return {
        "truncated_prompts": sum(row["truncated"] for row in predictions),
        "unfinished_answers": sum(row["finish"] == "length" for row in predictions),
        "unread_answers": sum(row["parsed"] is None for row in predictions),
    }


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """`paper` follows the published rule (section 7.3), `correct` the right one. Both use the
    output before `stop`; of batches that continue beyond it, the published scorer used only the
    first line too.

    - number: `paper`: any number of the output is within 0.01 of the answer; `correct`: its first
      number equals the answer
    - entities: `paper`: the mean over items of nereval's F1; `correct`: the F1 over all entities of
      all items, with `precision` and `recall`
    - text: `exact_match` (equal to `paper` and `correct`), `f1` of words, `contains`
    """
    found = [row["output"] for row in predictions]
    published = []
    for row in predictions:
        has_own = row["published_output"] is not None
        published.append(row["published_output"] if has_own else row["output"])
    gold = [row["answer"] for row in predictions]
    return METRICS[task.parse](found, published, gold)


def _number_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    return {
        "paper": statistics.proportion(_each(answers.released_number_right, published, gold)),
        "correct": statistics.proportion(_each(answers.number_right, found, gold)),
    }


def _entity_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    right = _each(answers.entities_right, found, gold)
    written = np.array([len(answers.entities(text)) for text in found])
    wanted = np.array([len(answers.entities(text)) for text in gold])
    return {
        "paper": statistics.mean(_each(answers.released_entity_f1, published, gold)),
        "correct": statistics.ratio_or_nan(2 * np.array(right), written + wanted),
        "precision": statistics.ratio_or_nan(right, written),
        "recall": statistics.ratio_or_nan(right, wanted),
    }


def _text_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    exact_match = statistics.proportion(_each(answers.exact_match, found, gold))
    return {
        "paper": statistics.proportion(_each(answers.exact_match, published, gold)),
        "correct": exact_match,
        "exact_match": exact_match,
        "f1": statistics.mean(_each(answers.word_f1, found, gold)),
        "contains": statistics.proportion(_each(answers.contains, found, gold)),
    }


def _each(rule: Callable[[str, str], float], outputs: list[str], gold: list[str]) -> list[float]:
    return [float(rule(output, answer)) for output, answer in zip(outputs, gold, strict=True)]


def _parsed_number(output: str) -> str | None:
    number = answers.first_number(output)
    return None if number is None else json.dumps(str(number.value * (number.unit or 1)))


def _parsed_entities(output: str) -> str | None:
    return json.dumps(answers.entities(output)) if answers.entities(output) else None


def _parsed_text(output: str) -> str | None:
    return json.dumps(" ".join(answers.words(output))) if answers.words(output) else None


PARSERS = {"text": _parsed_text, "number": _parsed_number, "entities": _parsed_entities}
METRICS = {"text": _text_metrics, "number": _number_metrics, "entities": _entity_metrics}
