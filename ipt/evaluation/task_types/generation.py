"""Tasks of kind `generation`: the model writes the answer, and what it says there is read and
compared.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
        ("answer", pa.string()),  # the right one
        ("output", pa.string()),  # what the model has written
        ("parsed", pa.string()),  # what was read in it, as JSON; null: nothing
        ("tokens", pa.int32()),  # generated
        # stop: a text that ends answers | eos: the model's own end | length: cut at max_new_tokens
        ("finish", pa.string()),
        ("truncated", pa.bool_()),  # the prompt did not fit and lost its beginning
        # behind the shorter prompt of the published scorer; null: its prompt is the same
        ("published_output", pa.string()),
    ]
)


class Item(NamedTuple):
    id: str
    prompt: str
    answer: str
    shots: int = 0  # so many characters of the prompt are demonstrations

    @property
    def text(self) -> str:
        """The prompt without demonstrations, with its answer."""
        return self.prompt[self.shots :] + self.answer

    @property
    def prompt_hash(self) -> str:
        """Hash of what the model reads."""
        return text_hash(self.prompt)


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[Item]:
    """The items of a task; raises a one-line error that names the row. Rows that make none are put
    down in `odd`.
    """
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
    """One prediction for each item. Prompts longer than `published_length` are continued a second
    time, cut to that length.
    """
    prompts = [backend.encoder.prompt(item.prompt, task.max_new_tokens) for item in items]
    generations = backend.generate(
        [ids for ids, _ in prompts], task.stop, task.max_new_tokens, task.name
    )
    cut = {
        index: _cut(ids, len(backend.encoder.start), task.published_length)
        for index, (ids, _) in enumerate(prompts)
    }
    cut = {index: ids for index, ids in cut.items() if len(ids) < len(prompts[index][0])}
    again = (
        backend.generate(list(cut.values()), task.stop, task.max_new_tokens, f"{task.name}, cut")
        if cut
        else []
    )
    published = dict(zip(cut, again, strict=True))
    return [
        {
            "id": item.id,
            "prompt_hash": item.prompt_hash,
            "answer": item.answer,
            "output": generation.text,
            "parsed": PARSERS[task.parse](generation.text),
            "tokens": generation.tokens,
            "finish": generation.finish,
            "truncated": truncated,
            "published_output": published[index].text if index in published else None,
        }
        for index, (item, generation, (_, truncated)) in enumerate(
            zip(items, generations, prompts, strict=True)
        )
    ]


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Items that were not answered as they stand, by reason."""
    return {
        "truncated_prompts": sum(row["truncated"] for row in predictions),
        "unfinished_answers": sum(row["finish"] == "length" for row in predictions),
        "unread_answers": sum(row["parsed"] is None for row in predictions),
    }


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """What the predictions amount to.

    `paper` is the published rule (section 7.3), `correct` the right one; both read the output up to
    `stop`. Where the published scorer ran on in a batch, it read only the first line of numbers,
    and entities in batches of one, which end at their line's end.

    - number: `paper` is any number of the output within 0.01 of the answer's, `correct` the first
      number being the answer's
    - entities: `paper` is the mean of nereval's F1 of each item, `correct` the F1 of all entities
      of all items, with `precision` and `recall`
    - text: `exact_match` (which is `paper` and `correct` too), `f1` of words, `contains`
    """
    found = [row["output"] for row in predictions]
    published = [
        row["output"] if row["published_output"] is None else row["published_output"]
        for row in predictions
    ]
    gold = [row["answer"] for row in predictions]
    return METRICS[task.parse](found, published, gold)


def _cut(ids: list[int], start: int, length: int) -> list[int]:
    """The last tokens of a prompt, `length` with the `start` first ones (BOS), which stay; all if
    `length` is 0.
    """
    return ids[:start] + ids[start:][start - length :] if 0 < length < len(ids) else ids


def _number_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    return {
        "paper": statistics.proportion(_each(answers.released_number_right, published, gold)),
        "correct": statistics.proportion(_each(answers.number_right, found, gold)),
    }


def _entity_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    right = _each(answers.entities_right, found, gold)
    said, wanted = ([len(answers.entities(text)) for text in texts] for texts in (found, gold))
    return {
        "paper": statistics.mean(_each(answers.released_entity_f1, published, gold)),
        "correct": statistics.ratio_or_nan(
            [2 * count for count in right], [a + b for a, b in zip(said, wanted, strict=True)]
        ),
        "precision": statistics.ratio_or_nan(right, said),
        "recall": statistics.ratio_or_nan(right, wanted),
    }


def _text_metrics(found: list[str], published: list[str], gold: list[str]) -> dict[str, Metric]:
    return {
        "paper": statistics.proportion(_each(answers.exact_match, published, gold)),
        "correct": statistics.proportion(_each(answers.exact_match, found, gold)),
        "exact_match": statistics.proportion(_each(answers.exact_match, found, gold)),
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
