"""The evaluation stage: a model, tasks and a corpus go in; results.json and predictions/<task>.parquet come out."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import EvaluationConfig
from ipt.evaluation.data import Item, subset
from ipt.evaluation.kinds import kind_of
from ipt.evaluation.results import RESULTS, predictions_path, read_predictions
from ipt.evaluation.task import Task, load_tasks
from ipt.models import check_model
from ipt.stage import write_json, write_parquet


def evaluate(
    config: EvaluationConfig, model: str, tasks: list[str], corpus: Path | None, output: Path, data_dir: str | Path = "data"
) -> dict[str, Any]:
    """Score `model` on `tasks` and return the stage's statistics.

    `data_dir` holds the data sets that tasks read from data:PATH; `corpus` is the folder of a finished corpus stage, or None
    where no task reads one. A task whose predictions lie in `output` from an interrupted run is not scored again. Whatever is
    wrong in config, tasks and their data raises ValueError or FileNotFoundError in one line before the model is loaded.
    """
    check_model(model)
    check_config(config)
    work = [(task, subset(kind_of(task).read(task, corpus), config.limit)) for task in load_tasks(tasks, data_dir)]
    unfinished = [(task, items) for task, items in work if not _is_finished(predictions_path(output, task.name), items)]
    seconds = _score(config, model, unfinished, output) if unfinished else {}
    predictions = {task.name: read_predictions(output, task.name) for task, _ in work}
    results = {
        task.name: {name: metric.as_dict() for name, metric in kind_of(task).metrics(task, predictions[task.name]).items()}
        for task, _ in work
    }
    write_json(output / RESULTS, results)
    return {
        "model": model,
        "items": sum(len(items) for _, items in work),
        "tasks": {
            task.name: {
                "items": len(items),
                "seconds": seconds.get(task.name, 0.0),
                "reused": task.name not in seconds,
                **kind_of(task).counts(predictions[task.name]),
            }
            for task, items in work
        },
    }


def check_tasks(config: EvaluationConfig, tasks: list[str], corpus: Path | None = None, data_dir: str | Path = "data") -> list[Task]:
    """The tasks behind the names, checked as far as possible without a model: values of the config, the tasks' files, and
    each item of a data file that is there already. Tasks that read a corpus are read if `corpus`, its finished stage, is given.
    """
    check_config(config)
    loaded = load_tasks(tasks, data_dir)
    for task in loaded:
        kind = kind_of(task)
        if corpus is not None or not task.needs_corpus:
            kind.read(task, corpus)
    return loaded


def check_config(config: EvaluationConfig) -> None:
    """Raise ValueError in one line for a value that cannot work."""
    for name, known in {"dtype": ("fp32", "bf16"), "scoring": ("auto", "tree", "plain")}.items():
        if getattr(config, name) not in known:
            raise ValueError(f"evaluation.{name} is {getattr(config, name)!r}, expected {' or '.join(known)}")
    for name, least in {"batch_tokens": 1, "limit": 1, "max_length": 2}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"evaluation.{name} is {value}, expected {least} or more")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        raise ValueError(f"evaluation.device is {config.device!r}, expected auto, cpu, mps, cuda or cuda:NUMBER")


def _score(config: EvaluationConfig, model: str, work: Sequence[tuple[Task, list[Any]]], output: Path) -> dict[str, float]:
    """Write the predictions of each task as it finishes; return the seconds that each took."""
    from ipt.evaluation.backend import load_backend

    backend = load_backend(config, model)
    seconds = {}
    for task, items in work:
        started = time.monotonic()
        kind = kind_of(task)
        predictions = kind.score(task, items, backend)
        write_parquet(predictions_path(output, task.name), predictions, kind.SCHEMA.with_metadata({"task": json.dumps(task.definition)}))
        seconds[task.name] = round(time.monotonic() - started, 3)
    return seconds


def _is_finished(path: Path, items: Sequence[Item]) -> bool:
    """Whether the predictions of exactly these items are there."""
    try:
        known = pq.read_table(path, columns=["id", "prompt_hash"]).to_pydict()
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return known["id"] == [item.id for item in items] and known["prompt_hash"] == [item.prompt_hash for item in items]
