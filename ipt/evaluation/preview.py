"""A look at tasks in the terminal: which there are and where their data is, and items as a model
reads them.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import Task, load_tasks, read_group, sources, task_names
from ipt.evaluation.task_types.multiple_choice import Question
from ipt.evaluation.task_types.registry import kind_of


def list_tasks(names: list[str], data_dir: Path, console: Console) -> None:
    """Print the tasks and groups behind `names` (all that ship if there are none): what is asked,
    the kind, and the data.

    Files of the task's own are marked: ✓ is there, ✗ is not. A hub, a URL and the harness's data
    are looked up when they are needed.
    """
    names = names or task_names()
    for task in load_tasks(names, data_dir):
        _print_entry(console, task.name, f"{task.kind}, {_place(task)}", task.description)
    for group in filter(None, map(read_group, names)):
        _print_entry(console, group.name, f"group: {', '.join(group.tasks)}", group.description)


def show_task(
    name: str, number: int, data_dir: Path, corpus: Path | None, console: Console
) -> None:
    """Print the first `number` items of each task behind `name`: what the model reads, and after it
    the answer or the options.

    The right one is green and marked with ✓; demonstrations are dim.
    """
    for task in load_tasks([name], data_dir):
        odd = OddRows()
        items = kind_of(task).read(task, corpus, odd)
        console.print(
            f"{task.name}: {len(items):,} items of kind {task.kind}", style="bold", highlight=False
        )
        odd.report(task, console)
        for item in islice(items, number):
            console.print(Panel(_shown(item), title=f"{item.id}", title_align="left"))


def _place(task: Task) -> str:
    """What the task reads, and behind its own files whether they are there."""
    if task.kind == "harness":
        return f"harness:{task.harness}"
    files = [(source.path, source.data) for source in sources(task)]
    marks = ["" if path is None else " ✓" if path.exists() else " ✗" for path, _ in files]
    return ", ".join(
        dict.fromkeys(data + mark for (_, data), mark in zip(files, marks, strict=True))
    )


def _print_entry(console: Console, name: str, facts: str, description: str) -> None:
    console.print(Text(name, style="bold") + Text(f"  {facts}", style="default"))
    console.print(Padding(Text(description, style="dim"), (0, 0, 0, 4)))


def _shown(item: Any) -> Text:
    """An item of any kind: prompt, then options or answer, as far as it has them."""
    prompt, begin = getattr(item, "prompt", None), getattr(item, "shots", 0)
    if not isinstance(prompt, str):
        return Text(item.text)
    text = Text(prompt[:begin], style="dim") + Text(prompt[begin:], style="default")
    if not isinstance(item, Question):
        return text.append(item.text[len(prompt) - begin :], style="bold green")
    contexts = item.contexts or [""] * len(item.options)
    for index, (context, option) in enumerate(zip(contexts, item.options, strict=True)):
        is_right = index in (item.right or (item.gold,))
        text.append(
            f"\n{'✓' if is_right else ' '} {context}{option!r}",
            style="green" if is_right else "default",
        )
    return text
