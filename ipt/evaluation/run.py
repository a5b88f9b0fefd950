"""The evaluation stage: a model, tasks and a corpus go in; results.json and
predictions/<task>.parquet come out.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.chat_templates import check_kwargs
from ipt.config import EvaluationConfig, check_choices
from ipt.console import progress
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.evaluation.contamination import FILE, Contaminated, clean_metrics
from ipt.evaluation.data import Item, subset
from ipt.evaluation.odd_rows import LEFT_OUT, OddRows
from ipt.evaluation.results import RESULTS, Results, predictions_path, read_predictions
from ipt.evaluation.tables import write_markdown
from ipt.evaluation.task import Task, load_tasks
from ipt.evaluation.task_types.registry import kind_of
from ipt.files import is_as_noted, note_hash, remove_notes, write_json, write_parquet
from ipt.models import check_model

if TYPE_CHECKING:
    from ipt.evaluation.backends.base import Backend

Prediction = dict[str, Any]  # a prediction
Scored = tuple[Task, list[Prediction], float]  # a task, its predictions, the seconds that they took


class Work(NamedTuple):
    """A task, its items, and the rows of its data that make none."""

    task: Task
    items: list[Any]
    odd: OddRows


def evaluate(
    config: EvaluationConfig,
    model: str,
    tasks: list[str],
    corpus: Path | None,
    output: Path,
    data_dir: str | Path = "data",
    contaminated: Contaminated | None = None,
) -> dict[str, Any]:
    """Score `model` on `tasks` and return the stage's statistics.

    `data_dir` holds the data sets that tasks read from data:PATH; `corpus` is the folder of a
    finished corpus stage, or None where no task reads one; `contaminated` names the items that are
    known to be in training data (`ipt.evaluation.contamination`). A task whose predictions lie in
    `output` from an interrupted run is not scored again. Whatever is wrong in config, tasks and
    their data raises UserError or MissingFileError before the model is loaded.
    """
    check_model(model)
    check_config(config)
    work = read_work(tasks, config.limit, corpus, data_dir)
    finished = {
        task.name
        for task, items, _ in work
        if _is_finished(predictions_path(output, task.name), items)
    }
    predictions = {name: read_predictions(output, name) for name in finished}
    seconds = {}
    if unfinished := [one for one in work if one.task.name not in finished]:
        from ipt.evaluation.backends.base import load_backend

        with load_backend(config, model) as backend:
            for task, found, took in score_tasks(unfinished, backend, output):
                predictions[task.name], seconds[task.name] = found, took
    if rank() == 0:
        results = results_of(work, predictions)
        if contaminated is not None:
            for task, *_ in work:
                results[task.name] |= clean_metrics(
                    task, predictions[task.name], contaminated[task.name]
                )
            write_json(output / FILE, contaminated)
        write_json(output / RESULTS, results)
        write_markdown(output, model, tasks, data_dir)
        remove_notes(output / "predictions")
    return {
        "model": model,
        "items": sum(len(one.items) for one in work),
        "tasks": {
            task.name: {
                "items": len(items),
                "seconds": seconds.get(task.name, 0.0),
                "reused": task.name not in seconds,
                "left_out_rows": len(odd),
                **kind_of(task).counts(predictions[task.name]),
            }
            for task, items, odd in work
        },
    }


def read_work(
    tasks: list[str], limit: int | None, corpus: Path | None, data_dir: str | Path
) -> list[Work]:
    """Each task with its items, at most `limit` of them. Raises a one-line error that names the
    file and the row.

    Rows that make no item are logged.
    """
    work = []
    for task in load_tasks(tasks, data_dir):
        odd = OddRows()
        items = kind_of(task).read(task, corpus, odd)
        if rank() == 0:
            odd.report(task)
        work.append(Work(task, subset(items, limit), odd))
    return work


def score_tasks(work: Sequence[Work], backend: "Backend", output: Path) -> Iterator[Scored]:
    """Score one task after another. Of several processes, which all score, the first writes the
    predictions to `output`.
    """
    with progress("evaluation", sum(len(one.items) for one in work), hidden=rank() > 0) as bar:
        for task, items, _ in work:
            started = time.monotonic()
            kind = kind_of(task)
            predictions = kind.score(task, items, backend)
            if rank() == 0:
                schema = kind.SCHEMA.with_metadata({"task": json.dumps(task.definition)})
                write_parquet(predictions_path(output, task.name), predictions, schema)
                note_hash(predictions_path(output, task.name))
            bar.advance(len(items))
            yield task, predictions, round(time.monotonic() - started, 3)


def results_of(work: Iterable[Work], predictions: Mapping[str, list[Prediction]]) -> Results:
    """What the predictions of each task amount to, as results.json has it. Tasks with rows left out
    have an entry for them.
    """
    results: Results = {}
    for task, _, odd in work:
        metrics = kind_of(task).metrics(task, predictions[task.name])
        results[task.name] = {name: metric.as_dict() for name, metric in metrics.items()}
        if odd:
            results[task.name][LEFT_OUT] = odd.entry()
    return results


def check_tasks(
    config: EvaluationConfig,
    tasks: list[str],
    corpus: Path | None = None,
    data_dir: str | Path = "data",
) -> list[Task]:
    """The tasks behind the names, checked as far as possible without a model: values of the config,
    the tasks' files, and each item of a data file that is there already. Tasks that read a corpus
    are read if `corpus`, its finished stage, is given.
    """
    check_config(config)
    loaded = load_tasks(tasks, data_dir)
    for task in loaded:
        kind = kind_of(task)
        if corpus is not None or not task.needs_corpus:
            kind.read(task, corpus)
    return loaded


def check_config(config: EvaluationConfig) -> None:
    """Raise UserError for a value that cannot work."""
    check_choices(config, "evaluation.")
    for name, least in {"batch_tokens": 1, "limit": 1, "max_length": 2}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"evaluation.{name} is {value}, expected {least} or more")
    if not re.fullmatch(r"auto|sharded|cpu|mps|cuda(:\d+)?", config.device):
        raise UserError(
            f"evaluation.device is {config.device!r}, expected auto, cpu, mps, cuda, cuda:NUMBER "
            "or sharded"
        )
    check_kwargs(config.chat_template_kwargs, "evaluation.chat_template_kwargs")
    if config.backend == "vllm":
        from ipt.evaluation.backends.vllm import check_vllm

        check_vllm(config)


def _is_finished(path: Path, items: Sequence[Item]) -> bool:
    """Whether the predictions of exactly these items are there."""
    try:
        if not is_as_noted(path):
            return False
        known = pq.read_table(path, columns=["id", "prompt_hash"]).to_pydict()
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return known["id"] == [item.id for item in items] and known["prompt_hash"] == [
        item.prompt_hash for item in items
    ]
