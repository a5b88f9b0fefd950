"""Exports tasks for lm-evaluation-harness: `lm_eval --include_path FOLDER --tasks NAME`."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ipt.errors import UserError
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import Task, load_tasks
from ipt.evaluation.task_types import generation, multiple_choice, perplexity
from ipt.evaluation.task_types.registry import kind_of
from ipt.files import atomic

ITEMS: dict[str, Any] = {
    "choice": multiple_choice.Question,
    "generation": generation.Item,
    "perplexity": perplexity.ScoredDocument,
}
log = logging.getLogger(__name__)
MODULE = "ipt_tasks"
CODE = '''"""The class of the tasks in this folder; needs the package ipt."""

from ipt.evaluation.exported import ExportedTask  # noqa: F401
'''


def export(
    names: Iterable[str], folder: Path, corpus: Path | None = None, data_dir: str | Path = "data"
) -> list[str]:
    """Write NAME.yaml and NAME.jsonl (items with complete prompts) for each task, and one module
    for all; return the names.

    Logs tasks of other kinds, which are left out. Raises UserError if no task is left.
    """
    tasks = load_tasks(names, data_dir)
    for task in tasks:
        if task.kind not in ITEMS:
            log.warning(
                f"{task.name} is left out: its kind is {task.kind}, supported: {', '.join(ITEMS)}"
            )
    chosen = [task for task in tasks if task.kind in ITEMS]
    if not chosen:
        raise UserError(f"none of the tasks has the kind {', '.join(ITEMS)}: nothing to export")
    for task in chosen:
        _write(task, folder, corpus)
    _write_text(folder / f"{MODULE}.py", CODE)
    return [task.name for task in chosen]


def _write(task: Task, folder: Path, corpus: Path | None) -> None:
    odd = OddRows()
    read = kind_of(task).read(task, corpus, odd)
    odd.report(task)
    items = [item for item in read if item.text]
    if len(items) < len(read):
        log.warning(f"{task.name}: {len(read) - len(items)} empty documents are left out")
    _write_text(
        folder / f"{task.name}.jsonl",
        "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items),
    )
    metadata = {"version": 1, "definition": task.definition}
    described = yaml.safe_dump(
        {"task": task.name, "metadata": metadata}, allow_unicode=True, sort_keys=False
    )
    _write_text(
        folder / f"{task.name}.yaml", f"class: !function {MODULE}.ExportedTask\n{described}"
    )


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
