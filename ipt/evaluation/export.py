"""Tasks of ours as files that lm-evaluation-harness runs under its own command: `lm_eval
--include_path FOLDER --tasks NAME`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ipt.console import console
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
MODULE = "ipt_tasks"
CODE = '''"""What the task files of this folder are run by; it needs the package ipt."""

from ipt.evaluation.exported import ExportedTask  # noqa: F401
'''


def export(
    names: Iterable[str], folder: Path, corpus: Path | None = None, data_dir: str | Path = "data"
) -> list[str]:
    """Write for each task NAME.yaml and NAME.jsonl, its items with filled-in prompts, and one
    module for all; return the names.

    Tasks of kinds that the harness cannot run, or has itself, are named on the terminal and left
    out. Raises UserError if none is left, and what reading the tasks raises.
    """
    tasks = load_tasks(names, data_dir)
    for task in tasks:
        if task.kind not in ITEMS:
            console.print(
                f"{task.name} is left out: it is of kind {task.kind}, only {', '.join(ITEMS)} are "
                "written"
            )
    chosen = [task for task in tasks if task.kind in ITEMS]
    if not chosen:
        raise UserError(
            f"none of the tasks is of kind {', '.join(ITEMS)}: there is nothing to write"
        )
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
        console.print(f"{task.name}: {len(read) - len(items)} empty documents are left out")
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
