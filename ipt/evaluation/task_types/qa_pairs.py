"""Tasks of kind `pairs`: how well a model writes instruction-response pairs for contexts with known
pairs (the paper's Table 5).

With `measure: responses` it writes a response to each right question (response accuracy), with
`pairs` all pairs of a context (similarity to the right ones). Any model reads the prompts of a
synthesizer: demonstrations in `pair_format`, then the context. The paper does not state its
formulas; those of `metrics` are ours.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from ipt.config import SynthesisConfig
from ipt.errors import UserError
from ipt.evaluation.backends.encoding import Encoder
from ipt.evaluation.data import check_ids, data_path, draw, read_rows, render, row_id, text_hash
from ipt.evaluation.formats import DataRow, as_fields
from ipt.evaluation.metrics import answers, statistics
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import Task
from ipt.synthesis.chains import truncate
from ipt.synthesis.formats.base import Prompt, Vocabulary
from ipt.synthesis.formats.registry import FORMATS
from ipt.synthesis.formats.tags import ANSWER, CONTEXT_START, END, QUESTION, Pair, Parsed
from ipt.synthesis.qa_readers import READERS, Example, distinct_pairs, read_examples
from ipt.synthesis.quality.task_types import CONCLUSION, OPTIONS

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend, Generation

PAIR_FORMATS = ("ipt", "chat")
# measure -> what a model writes next that does not end its text
STOP = {"pairs": [CONTEXT_START], "responses": [END, QUESTION]}

PAIRS = pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("gold", PAIRS),  # the right pairs
        # a response to each right question, or one output with all pairs
        ("outputs", pa.list_(pa.string())),
        ("generated", PAIRS),  # the parsed pairs; null with measure: responses
        ("rejected", pa.string()),  # outputs that are not pairs, by reason, as JSON
        ("tokens", pa.int32()),  # generated
        ("unfinished", pa.int32()),  # outputs that ended at max_new_tokens
        ("demonstrations", pa.int32()),  # those that fit before the context
        ("missing_demonstrations", pa.int32()),  # those that did not fit
        ("truncated", pa.bool_()),  # the context lost its end to fit the context length
        # rows of the whole data without an item, by reason, as JSON
        ("left_out", pa.string()),
    ]
)


class Shot(NamedTuple):
    """A demonstration: a context and its pairs."""

    context: str
    pairs: tuple[Pair, ...]


class Item(NamedTuple):
    id: str
    context: str
    gold: tuple[Pair, ...]
    left_out: Mapping[str, int]  # of the whole data, by reason
    shots: tuple[Shot, ...] = ()

    @property
    def text(self) -> str:
        """The context with its right pairs."""
        return "\n\n".join(
            [self.context, *(f"{pair.question}\n{pair.answer}" for pair in self.gold)]
        )

    @property
    def prompt_hash(self) -> str:
        """Hash of what the model reads and of the right pairs."""
        return text_hash(json.dumps([self.shots, self.context, self.gold]))


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[Item]:
    """The contexts of a task. Adds rows that are left out to `odd`."""
    for key, known in {
        "measure": tuple(STOP),
        "pair_format": PAIR_FORMATS,
        "reader": ("", *READERS),
    }.items():
        if getattr(task, key) not in known:
            raise UserError(
                f"task {task.name}: {key} is {getattr(task, key)!r}, expected "
                f"{' or '.join(filter(None, known))}"
            )
    if task.pair_format != "ipt" and (task.measure == "responses" or task.num_fewshot):
        needs = "measure=responses" if task.measure == "responses" else "num_fewshot"
        raise UserError(
            f"task {task.name}: {needs} needs pair_format=ipt, found {task.pair_format}"
        )
    items = _items(task, corpus, OddRows() if odd is None else odd)
    check_ids(task, items)
    if task.demonstrations is None:
        return items
    return list(_with_shots(task, items, _items(task.demonstrations, corpus, OddRows())))


def score(task: Task, items: list[Item], backend: "Backend") -> list[dict[str, Any]]:
    """A prediction for each context."""
    writer = Writer(task, backend.encoder)
    asked = [writer.prompts(item) for item in items]
    ids = [prompt.ids for prompts in asked for prompt in prompts]
    generations = iter(backend.generate(ids, STOP[task.measure], task.max_new_tokens, task.name))
    rows = []
    for item, prompts in zip(items, asked, strict=True):
        rows.append(_prediction(writer, item, prompts, list(islice(generations, len(prompts)))))
    return rows


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Truncated prompts and outputs, and outputs and rows without pairs, by reason."""
    rejected = sum((Counter(json.loads(row["rejected"])) for row in predictions), Counter[str]())
    return {
        "truncated_contexts": sum(row["truncated"] for row in predictions),
        "missing_demonstrations": sum(row["missing_demonstrations"] for row in predictions),
        "unfinished_outputs": sum(row["unfinished"] for row in predictions),
        "contexts_without_pairs": sum(row["generated"] == [] for row in predictions),
        **{f"rejected_{reason}": number for reason, number in sorted(rejected.items())},
        **{
            f"left_out_{reason}": number
            for reason, number in sorted(json.loads(predictions[0]["left_out"]).items())
        },
    }


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """Contexts are the clusters of standard errors, and n is their number.

    - responses: `correct` is the mean over questions of exact match (if the question lists options)
      or the F1 of words; `exact_match`, `f1` and `contains` are means over all questions. Of
      step-by-step answers the conclusions are compared.
    - pairs: the written pairs of each context are matched one-to-one with the right ones, with the
      largest sum of `similarity`. `precision` is this sum over the number of written pairs,
      `recall` over the number of right pairs, `correct` their harmonic mean.
      `pairs_per_context`: written pairs.
    """
    if task.measure == "responses":
        return _response_metrics(predictions)
    return _pair_metrics(predictions)


def similarity(a: Mapping[str, str], b: Mapping[str, str]) -> float:
    """The mean of the F1 of words of two questions and of their answers, 0 to 1."""
    return (
        answers.word_f1(a["question"], b["question"]) + answers.word_f1(a["answer"], b["answer"])
    ) / 2


def best_matching(similarities: Sequence[Sequence[float]]) -> float:
    """The largest sum of entries of a matrix such that no two are in the same row or column."""
    from scipy.optimize import linear_sum_assignment

    if not similarities:
        return 0.0
    matrix = np.array(similarities)
    return float(matrix[linear_sum_assignment(matrix, maximize=True)].sum())


# Prompts
# ----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """The tokens of a prompt."""

    ids: list[int]
    shots: int  # demonstrations in it
    truncated: bool


class Writer:
    """Prompts of a task in its format, which fit in the model's context with the new tokens."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self.vocabulary = Vocabulary(encoder.tokenizer)
        settings = SynthesisConfig(
            format=task.pair_format, chat_template_kwargs=dict(encoder.chat_template_kwargs)
        )
        self.format = FORMATS[task.pair_format](self.vocabulary, settings)
        self.measure = task.measure
        self._limit = encoder.max_length - task.max_new_tokens
        if self._limit <= len(self.format.begin("").ids):
            raise UserError(
                f"task {task.name}: max_new_tokens is {task.max_new_tokens}, which leaves no "
                f"tokens for a context in {encoder.max_length}"
            )

    def prompts(self, item: Item) -> list[Asked]:
        """A prompt for each right question, or one for all pairs."""
        if self.measure == "pairs":
            return [self._prompt(item, [])]
        asked = [f"{QUESTION} {pair.question} {ANSWER}" for pair in item.gold]
        return [self._prompt(item, self.vocabulary.encode_continuation(text)) for text in asked]

    def _prompt(self, item: Item, end: list[int]) -> Asked:
        """The last demonstrations that fit, the context (if need be its beginning), and `end`."""
        limit = self._limit - len(end)
        for first in range(len(item.shots)):
            ids = self._after(item.shots[first:], item.context)
            if len(ids) <= limit:
                return Asked(ids + end, len(item.shots) - first, truncated=False)
        ids = self._after((), item.context)
        if len(ids) <= limit:
            return Asked(ids + end, 0, truncated=False)
        if len(self._after((), "")) > limit:
            raise UserError(
                f"item {item.id}: a question leaves no tokens for its context: raise "
                "evaluation.max_length"
            )
        context = truncate(item.context, limit, lambda text: len(self._after((), text)))
        return Asked(self._after((), context) + end, 0, truncated=True)

    def _after(self, shots: Sequence[Shot], context: str) -> list[int]:
        history: Prompt | None = None
        for shot in shots:
            history = self.format.finish(
                self._next(history, shot.context), [], "", Parsed(list(shot.pairs), Counter())
            )
        return self._next(history, context).ids

    def _next(self, history: Prompt | None, context: str) -> Prompt:
        return (
            self.format.begin(context) if history is None else self.format.follow(history, context)
        )


def _prediction(
    writer: Writer, item: Item, prompts: Sequence[Asked], generations: Sequence["Generation"]
) -> dict[str, Any]:
    parsed = writer.format.parse(generations[0].text) if writer.measure == "pairs" else None
    return {
        "id": item.id,
        "prompt_hash": item.prompt_hash,
        "gold": [pair._asdict() for pair in item.gold],
        "outputs": [generation.text for generation in generations],
        "generated": None if parsed is None else [pair._asdict() for pair in parsed.pairs],
        "rejected": json.dumps({} if parsed is None else parsed.rejected),
        "tokens": sum(generation.tokens for generation in generations),
        "unfinished": sum(generation.finish == "length" for generation in generations),
        "demonstrations": sum(prompt.shots for prompt in prompts),
        "missing_demonstrations": sum(len(item.shots) - prompt.shots for prompt in prompts),
        "truncated": any(prompt.truncated for prompt in prompts),
        "left_out": json.dumps(item.left_out),
    }


# Items
# ----------------------------------------------------------------------------------------------


def _items(task: Task, corpus: Path | None, odd: OddRows) -> list[Item]:
    left_out: Counter[str] = Counter()
    examples = list(
        _tuning_examples(task, corpus, left_out)
        if task.reader
        else _row_examples(task, corpus, left_out, odd)
    )
    if not examples:
        raise UserError(
            f"task {task.name}: {task.data} has no context with pairs (left out: "
            f"{dict(left_out) or 'none'})"
        )
    counted = {reason: number for reason, number in left_out.items() if number}
    return [
        Item(example.id, example.context, tuple(example.pairs), counted) for example in examples
    ]


def _tuning_examples(task: Task, corpus: Path | None, left_out: Counter[str]) -> Iterator[Example]:
    """Examples as in the fine-tuning data of a synthesizer."""
    path = data_path(task, corpus)
    if path is None or path.is_dir():
        raise UserError(
            f"task {task.name}: reader={task.reader} needs a local file, but data is {task.data!r}"
        )
    for number, example in enumerate(read_examples(task.reader, path, random.Random(0), left_out)):
        # ids of a reader need not be unique
        yield example._replace(id=f"{example.id}/{number}")


def _row_examples(
    task: Task, corpus: Path | None, left_out: Counter[str], odd: OddRows
) -> Iterator[Example]:
    """Examples from rows and templates."""
    for example in odd.kept(task, read_rows(task, corpus, odd), partial(_row_example, task)):
        if pairs := distinct_pairs(example.pairs, left_out):
            yield example._replace(pairs=pairs)
        else:
            left_out["context_without_pairs"] += 1


def _row_example(task: Task, row: DataRow) -> Example:
    context = render(task, "context", task.context or "{{ context }}", row).strip()
    sides = [
        (render(task, "question", task.question, one), render(task, "answer", task.answer, one))
        for one in _entries(task, row)
    ]
    return Example(
        row_id(task, row),
        context,
        [Pair(question.strip(), answer.strip()) for question, answer in sides],
    )


def _entries(task: Task, row: DataRow) -> list[DataRow]:
    if not task.pairs:
        return [row]
    entries = row.fields.get(task.pairs)
    if not isinstance(entries, list):
        raise UserError(
            f"{row.where}: field {task.pairs} (pairs of task {task.name}) is "
            f"{str(entries)[:40]!r}, expected a list"
        )
    return [row._replace(fields={**row.fields, **as_fields(entry)}) for entry in entries]


def _with_shots(task: Task, items: list[Item], demonstrations: list[Item]) -> Iterator[Item]:
    """All items with the same drawn demonstrations. The next one of the draw replaces one that is
    the item itself.
    """
    number = task.num_fewshot or 0
    candidates: dict[str, Shot] = {}  # one more than needed, without duplicates
    for index in draw(len(demonstrations), str(task.fewshot.get("seed", 0))):
        if len(candidates) <= number:
            candidates.setdefault(
                demonstrations[index].context,
                Shot(demonstrations[index].context, demonstrations[index].gold),
            )
    for item in items:
        others = [shot for context, shot in candidates.items() if context != item.context][:number]
        if len(others) < number:
            raise UserError(
                f"task {task.name}: {len(others)} demonstrations for item {item.id}, expected "
                f"{number}"
            )
        yield item._replace(shots=tuple(others))


# Metrics
# ----------------------------------------------------------------------------------------------


def _response_metrics(predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    right = [len(row["gold"]) for row in predictions]
    return {
        name: statistics.ratio(
            [sum(rule(*response) for response in _responses(row)) for row in predictions], right
        )
        for name, rule in RULES.items()
    }


def _responses(row: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Each response, the right response, and whether the question lists options."""
    for output, pair in zip(row["outputs"], row["gold"], strict=True):
        yield (
            _conclusion(output),
            _conclusion(pair["answer"]),
            OPTIONS.search(pair["question"]) is not None,
        )


def _conclusion(answer: str) -> str:
    return answer.rpartition(CONCLUSION)[2]


RULES: dict[str, Callable[[str, str, bool], float]] = {
    "correct": lambda output, answer, has_options: (
        answers.exact_match if has_options else answers.word_f1
    )(output, answer),
    "exact_match": lambda output, answer, _: answers.exact_match(output, answer),
    "f1": lambda output, answer, _: answers.word_f1(output, answer),
    "contains": lambda output, answer, _: answers.contains(output, answer),
}


def _pair_metrics(predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    matched = [
        best_matching(
            [[similarity(one, other) for other in row["gold"]] for one in row["generated"]]
        )
        for row in predictions
    ]
    written = np.array([len(row["generated"]) for row in predictions])
    right = np.array([len(row["gold"]) for row in predictions])
    return {
        "correct": statistics.ratio(2 * np.array(matched), written + right),
        "precision": statistics.ratio_or_nan(matched, written),
        "recall": statistics.ratio(matched, right),
        "pairs_per_context": statistics.mean(written),
    }
