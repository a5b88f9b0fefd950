"""The evaluation stage: scores a model on tasks and writes results.json and
predictions/<task>.parquet.
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

Prediction = dict[str, Any]  # a row of predictions/<task>.parquet
Scored = tuple[Task, list[Prediction], float]  # a task, its predictions, seconds


class Work(NamedTuple):
    """A task, its items, and the rows that are left out."""

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
    """Score `model` on `tasks` and return the statistics of the stage.

    `data_dir`: folder of data:PATH. `corpus`: folder of a finished corpus stage, for tasks that
    read it. `contaminated`: items in the training data (`ipt.evaluation.contamination`). Tasks with
    predictions in `output` from an interrupted run are not scored again. Mistakes in config, tasks
    and their data raise UserError or MissingFileError before the model is loaded.
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
    """Each task with at most `limit` items. Logs rows that are left out. Raises UserError with file
    and row.
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
    """Score tasks one by one. All processes score; rank 0 writes predictions to `output`."""
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
    """The contents of results.json."""
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
    """The tasks, checked as far as possible without a model: the config, task files and items.
    Tasks that read a corpus are checked if `corpus`, its finished stage, is given.
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
    """Whether `path` has the predictions of exactly these items."""
    try:
        if not is_as_noted(path):
            return False
        known = pq.read_table(path, columns=["id", "prompt_hash"]).to_pydict()
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return known["id"] == [item.id for item in items] and known["prompt_hash"] == [
        item.prompt_hash for item in items
    ]
