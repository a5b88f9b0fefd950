"""Tasks of kind `harness`: tasks of lm-evaluation-harness, run by our backend.

The harness reads the data, builds the prompts and scores the answers. We run the model, select
items and report: each metric becomes a mean of one number per document, which gives confidence
intervals and paired comparisons.
"""

import difflib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ipt.errors import MissingFileError, UserError
from ipt.evaluation.data import text_hash
from ipt.evaluation.metrics import statistics
from ipt.evaluation.metrics.statistics import Metric
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import Task

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    from ipt.evaluation.backends.base import Backend

log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("subtask", pa.string()),  # of the harness; the task itself if it is not a group
        ("doc", pa.string()),  # JSON: the document of the harness
        # JSON: the answer to each request: [log-probability, is greedy], or a text
        ("outputs", pa.string()),
        (
            "values",
            pa.list_(
                pa.struct(
                    [("metric", pa.string()), ("value", pa.float64()), ("weight", pa.float64())]
                )
            ),
        ),
        ("truncated", pa.bool_()),  # a context lost its beginning to fit the context length
    ]
)
# main metrics: the paper uses length-normalised accuracy where it exists
MAIN = ("acc_norm", "acc", "exact_match", "f1")
PARTS = 200  # of the jackknife


@dataclass(frozen=True)
class HarnessDocument:
    """A document of the harness. Its demonstrations are not part of `prompt_hash`, because they
    depend on the documents before it.
    """

    id: str
    prompt_hash: str
    subtask: str
    number: int  # of the document in its subtask
    source: "ConfigurableTask"

    @property
    def text(self) -> str:
        """The question with the right answer."""
        return _text(self.source, self.source.eval_docs[self.number])


@dataclass(frozen=True)
class Loaded:
    """The leaf tasks of a task or group, and the group, which may aggregate metrics."""

    leaves: "dict[str, ConfigurableTask]"
    group: "Group | None"

    def weighs_by_size(self, metric: str) -> bool | None:
        """Whether documents (True) or subtasks (False) have equal weights; None if the group does
        not report the metric.
        """
        if self.group is None or not self.group.aggregate_metric_list:
            return False
        name, _, kind = metric.partition(",")
        rules = [
            rule
            for rule in self.group.aggregate_metric_list
            if rule.metric == name and kind in (rule.filter_list or [kind])
        ]
        return rules[0].weight_by_size if rules else None


def read(task: Task, corpus: Path | None, odd: OddRows | None = None) -> list[HarnessDocument]:
    """The documents of a task, or of all subtasks of a group; none are left out.

    Raises UserError or MissingFileError if the harness is not installed or the task or its data are
    missing.
    """
    leaves = _load(task).leaves
    documents = []
    for subtask, source in leaves.items():
        config = source.config
        asked = [source.VERSION, config.num_fewshot, config.doc_to_text, config.doc_to_choice]
        for number, doc in enumerate(source.eval_docs):
            name = f"{subtask}/{number}" if len(leaves) > 1 else str(number)
            documents.append(
                HarnessDocument(
                    name, text_hash(_json([*map(str, asked), doc])), subtask, number, source
                )
            )
    return documents


def score(task: Task, documents: list[HarnessDocument], backend: "Backend") -> list[dict[str, Any]]:
    """A prediction for each document. Demonstrations are drawn by the harness with its seed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from ipt.evaluation.task_types.lm_eval_model import BackendLM

    chosen: dict[str, list[int]] = defaultdict(list)
    for document in documents:
        chosen[document.subtask].append(document.number)
    loaded = _load(task)
    leaves = {name: loaded.leaves[name] for name in chosen}
    model = BackendLM(
        backend, task.name, {name for name, leaf in leaves.items() if _asks_for_greedy(leaf)}
    )
    for leaf in leaves.values():
        leaf.set_fewshot_seed(DEFAULT_OTHER_SEED)
    found = evaluate(
        model,
        {"tasks": leaves},
        samples={
            name: numbers
            for name, numbers in chosen.items()
            if len(numbers) < len(leaves[name].eval_docs)
        },
        bootstrap_iters=0,
        apply_chat_template=backend.encoder.chat,
    )
    answered = {
        (name, entry["doc_id"]): entry
        for name, entries in found["samples"].items()
        for entry in entries
    }
    values = {
        name: _values(loaded, leaf, found["samples"][name], found["results"][name])
        for name, leaf in leaves.items()
    }
    return [
        _prediction(
            document,
            answered[document.subtask, document.number],
            values[document.subtask][document.number],
            model.cut,
        )
        for document in documents
    ]


def counts(predictions: list[dict[str, Any]]) -> dict[str, int]:
    """Documents with truncated prompts."""
    return {"truncated_prompts": sum(row["truncated"] for row in predictions)}


def metrics(task: Task, predictions: list[dict[str, Any]]) -> dict[str, Metric]:
    """The metrics of the harness (METRIC,FILTER if it has several filters), for a group also of
    each subtask (METRIC/SUBTASK).

    `paper` and `correct` are the metric in the task's key `metric`, else length-normalised accuracy
    (paper section 7.1), else accuracy.
    """
    entries: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in predictions:
        for entry in row["values"]:
            entries[entry["metric"]].append((row["subtask"], entry["value"], entry["weight"]))
    found = {name: _metric(values) for name, values in entries.items()}
    subtasks = dict.fromkeys(row["subtask"] for row in predictions)
    parts = {}
    if len(subtasks) > 1:
        for name, subtask in product(entries, subtasks):
            of_subtask = [entry for entry in entries[name] if entry[0] == subtask]
            parts[f"{name}/{subtask}"] = _metric(of_subtask)
    main = found[_main(task, list(found))]
    return {"paper": main, "correct": main, **found, **parts}


# From the harness
# ----------------------------------------------------------------------------------------------


def _load(task: Task) -> Loaded:
    if find_spec("lm_eval") is None:
        raise UserError(
            f"task {task.name} needs lm-evaluation-harness: install the extra lm-eval (pip install "
            "'ipt[lm-eval]')"
        )
    with _seeded():
        return _loaded(task.name, task.harness, task.path, task.num_fewshot)


@lru_cache(maxsize=8)
def _loaded(name: str, harness: str, folder: Path | None, shots: int | None) -> Loaded:
    if folder is not None and not folder.is_dir():
        raise MissingFileError(
            f"task {name}: data is {folder}, expected a folder with task files of "
            "lm-evaluation-harness"
        )
    manager = _manager(folder)
    if harness not in manager.all_tasks:
        nearest = difflib.get_close_matches(harness, manager.all_tasks, n=3)
        guess = f": did you mean {' or '.join(nearest)}?" if nearest else ""
        where = folder or "lm-evaluation-harness"
        raise UserError(f"task {name}: {where} has no task {harness!r}{guess}")
    try:
        found = manager.load([harness])
    except (OSError, ValueError) as error:  # files, hubs and their formats
        raise UserError(
            f"task {name}: lm-evaluation-harness cannot load {harness} or its data: "
            f"{' '.join(str(error).split())}: check that the hub or its cache has the data set"
        ) from None
    for leaf, source in found["tasks"].items():
        _set_shots(name, leaf, source, shots)
    return Loaded(found["tasks"], found["groups"].get(harness))


@lru_cache(maxsize=2)
def _manager(folder: Path | None) -> "TaskManager":
    """The index of the harness's task files, which takes seconds, or of those in a folder."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    return TaskManager(include_path=str(folder), include_defaults=False)


def _set_shots(name: str, leaf: str, source: "ConfigurableTask", shots: int | None) -> None:
    """As in the harness: a task with num_fewshot 0 keeps it, one without the key gets 0."""
    given = source.get_config("num_fewshot")
    if given == 0 and shots:
        log.info(f"{name}: {leaf} is zero-shot in the harness, num_fewshot is ignored")
    elif given is None or shots is not None:
        source.set_config(key="num_fewshot", value=shots or 0)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds the random generators as the harness's command does, since some tasks shuffle while
    they load. Restores their states.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    plain, numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)


def _asks_for_greedy(source: "ConfigurableTask") -> bool:
    """Whether a metric may depend on whether a continuation is greedy."""
    if source.OUTPUT_TYPE != "multiple_choice":
        return True
    return callable(source.config.process_results) or "exact_match" in source.aggregation()


def _text(source: "ConfigurableTask", doc: dict[str, Any]) -> str:
    question, answer = source.doc_to_text(doc), source.doc_to_target(doc)
    options = source.doc_to_choice(doc) if source.config.doc_to_choice is not None else []
    if isinstance(
        question, int
    ):  # the options are contexts, and this is the index of the right one
        question = options[question]
    answer = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(answer, int) and 0 <= answer < len(options):
        answer = options[answer]
    return f"{question}{source.config.target_delimiter}{answer}"


# Values and metrics
# ----------------------------------------------------------------------------------------------


def _prediction(
    document: HarnessDocument, entry: dict[str, Any], values: list[dict[str, Any]], cut: set[str]
) -> dict[str, Any]:
    return {
        "id": document.id,
        "prompt_hash": document.prompt_hash,
        "subtask": document.subtask,
        "doc": _json(entry["doc"]),
        "outputs": _json(
            [answers[0] if len(answers) == 1 else answers for answers in entry["resps"]]
        ),
        "values": values,
        "truncated": any(arguments[0] in cut for arguments in entry["arguments"]),
    }


def _values(
    loaded: Loaded,
    leaf: "ConfigurableTask",
    entries: Sequence[dict[str, Any]],
    results: dict[str, Any],
) -> dict[int, list[dict[str, Any]]]:
    """Number of a document -> its value and weight in each metric."""
    raw: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for entry in entries:
        for metric in entry["metrics"]:
            raw[metric, entry["filter"]][entry["doc_id"]] = entry[metric]
    found: dict[int, list[dict[str, Any]]] = {entry["doc_id"]: [] for entry in entries}
    for (metric, kind), of_document in raw.items():
        by_size = loaded.weighs_by_size(f"{metric},{kind}")
        if by_size is None:
            continue
        name = metric if kind == "none" else f"{metric},{kind}"
        numbers = _numbers(
            list(of_document.values()), _aggregation(leaf, metric), results[f"{metric},{kind}"]
        )
        weight = 1.0 if by_size else 1 / len(of_document)
        for document, value in zip(of_document, numbers, strict=True):
            found[document].append({"metric": name, "value": value, "weight": weight})
    return found


def _aggregation(leaf: "ConfigurableTask", metric: str) -> Callable[[list[Any]], float] | None:
    """The aggregation of a metric; None for the mean, which is also the default."""
    from lm_eval.api.metrics import mean

    rule = leaf.aggregation().get(metric, mean)
    return None if rule is mean else rule


def _numbers(
    values: list[Any], aggregation: Callable[[list[Any]], float] | None, total: float
) -> list[float]:
    """One number for each document, with the mean `total`, the value of the harness.

    For a metric that is not a mean (F1, perplexity) these are the pseudo-values of a jackknife,
    whose spread gives the standard error. More than `PARTS` documents are left out in `PARTS`
    parts; the values of a part are scaled to the spread of single documents.
    """
    if aggregation is None:
        return [float(value) for value in values]
    # Parts are drawn, because the order of documents may have a pattern; they are the same for
    # every model.
    parts, place = min(len(values), PARTS), np.random.default_rng(0).permutation(len(values))
    influence = np.zeros(len(values))
    for part in range(parts if len(values) > 1 else 0):
        inside = place % parts == part
        size, others = int(inside.sum()), [values[index] for index in np.flatnonzero(~inside)]
        influence[inside] = (
            np.sqrt(size) * (len(others) / size) * (total - float(aggregation(others)))
        )
    return list(total + influence - influence.mean())


def _metric(entries: Sequence[tuple[str, float, float]]) -> Metric:
    """The metric of (subtask, value, weight): a proportion if all values are 0 or 1, else a mean;
    of several subtasks the weighted mean.
    """
    values = np.array([entry[1] for entry in entries])
    weights = np.array([entry[2] for entry in entries])
    subtasks = np.array([entry[0] for entry in entries])
    if len(set(subtasks)) > 1:
        return _over_subtasks(values, weights, subtasks)
    is_binary = np.isin(values, (0, 1)).all()
    return statistics.proportion(values) if is_binary else statistics.mean(values)


def _over_subtasks(
    values: NDArray[np.float64], weights: NDArray[np.float64], subtasks: NDArray[Any]
) -> Metric:
    """Subtasks are fixed, so only the spread within each counts, as in the harness."""
    centre = np.empty_like(values)
    for subtask in set(subtasks):
        centre[subtasks == subtask] = values[subtasks == subtask].mean()
    return statistics.mean(
        np.average(values, weights=weights) + weights * (values - centre) / weights.mean()
    )


def _main(task: Task, names: list[str]) -> str:
    wanted = MAIN if task.metric == Task("", "").metric else (task.metric,)
    found = next(
        (name for main in wanted for name in names if main in (name, name.partition(",")[0])), None
    )
    if found is None and len(wanted) == 1:
        raise UserError(
            f"task {task.name}: metric is {task.metric!r}, but the harness has {', '.join(names)}"
        )
    return found or names[0]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
