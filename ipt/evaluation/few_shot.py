"""Demonstrations before a prompt:

    num_fewshot: 1            # demonstrations; with per_class: of each class
    fewshot_split: train      # hub: their split
    fewshot_delimiter: "\\n\\n"  # text after each demonstration
    fewshot:
      per_class: true         # as many of each right option; all items need the same options
      data: train.jsonl       # keys of rows (data, where, keep, …) default to the task's
      order: random           # random: drawn and shuffled | data: the first ones in file order
      seed: 0
      vary: true              # a draw for each item; false: one for all, which the model reads once

An item is never its own demonstration, and no demonstration occurs twice in a prompt. If a task has
several prompt templates, the demonstrations use the template of the item.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ipt.errors import UserError
from ipt.evaluation.data import draw, phrasing, text_hash
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.task import FEWSHOT_TYPES, ROW_KEYS, Task

ORDERS = ("random", "data")


@dataclass(frozen=True)
class Settings:
    per_class: bool = False
    order: str = "random"
    seed: int = 0
    vary: bool = False


def with_demonstrations(
    task: Task, items: list[Any], corpus: Path | None, read: Callable[..., list[Any]], odd: OddRows
) -> list[Any]:
    """The items with demonstrations at the beginning of their prompts.

    `read` reads items of the task's kind. An item is a named tuple with `id`, `prompt`, `shots`
    (how many characters of the prompt are demonstrations) and `text`, the rest of the prompt with
    the right answer. Rows of other data that make no demonstration are added to `odd`. Raises
    UserError if there are too few demonstrations, or too few of one class.
    """
    source = task.demonstrations
    if source is None:
        return items
    has_own_data = any(getattr(source, key) != getattr(task, key) for key in ROW_KEYS)
    given = {key: value for key, value in task.fewshot.items() if key in FEWSHOT_TYPES}
    settings = Settings(**given)
    if settings.order not in ORDERS:
        raise UserError(
            f"task {task.name}: fewshot.order is {settings.order!r}, expected {' or '.join(ORDERS)}"
        )

    @cache
    def classes(prompt: str) -> list[list[Any]]:
        odd_demonstrations = OddRows()
        found = read(replace(source, prompt=prompt), corpus, odd_demonstrations)
        odd.of_shots = odd_demonstrations if has_own_data else None
        return _classes(task, found) if settings.per_class else [found]

    @cache
    def candidates(prompt: str, key: str) -> list[list[Any]]:
        """The first of each class, one more than needed because one may be the item itself."""
        needed = (task.num_fewshot or 0) + 1
        return [list(islice(_drawn(members, settings, key), needed)) for members in classes(prompt)]

    demonstrated = []
    for item in items:
        key = f"{settings.seed}/{item.id}" if settings.vary else str(settings.seed)
        chosen = _chosen(task, settings, item, candidates(phrasing(task, item.id), key))
        if settings.order == "random":
            chosen.sort(key=lambda one, key=key: text_hash(f"{key}/{one.id}"))  # type: ignore[misc]
        prefix = "".join(one.text + task.fewshot_delimiter for one in chosen)
        demonstrated.append(item._replace(prompt=prefix + item.prompt, shots=len(prefix)))
    return demonstrated


def _classes(task: Task, demonstrations: list[Any]) -> list[list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for demonstration in demonstrations:
        found[_class(task, demonstration)].append(demonstration)
    return [found[name] for name in sorted(found)]


def _class(task: Task, demonstration: Any) -> str:
    gold = getattr(demonstration, "gold", None)
    if gold is None or demonstration.right or isinstance(task.options, str):
        raise UserError(
            f"task {task.name}: fewshot.per_class is for tasks of kind choice with a fixed list of "
            "options and one right option"
        )
    return str(demonstration.options[gold])


def _drawn(members: list[Any], settings: Settings, key: str) -> Iterator[Any]:
    """The members of a class in drawn order, without duplicates."""
    seen: set[str] = set()
    for index in range(len(members)) if settings.order == "data" else draw(len(members), key):
        if members[index].text not in seen:
            seen.add(members[index].text)
            yield members[index]


def _chosen(
    task: Task, settings: Settings, item: Any, candidates: Iterable[list[Any]]
) -> list[Any]:
    chosen: list[Any] = []
    for members in candidates:
        others = [one for one in members if one.text != item.text][: task.num_fewshot]
        if len(others) < (task.num_fewshot or 0):
            answer = f" with the answer {_class(task, members[0])!r}" if settings.per_class else ""
            raise UserError(
                f"task {task.name}: {len(others)} demonstrations{answer} for item {item.id}, "
                f"expected {task.num_fewshot}"
            )
        chosen += others
    return chosen
