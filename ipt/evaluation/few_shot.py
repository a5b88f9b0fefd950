"""Demonstrations before a prompt: `shots` of a task.

    shots:
      number: 1          # demonstrations; with per_class: of each class
      per_class: true    # as many of each right option (choice, with the same options in all items)
      data: train.jsonl  # their source; keys of rows (split, where, keep, …) default to the task's
      order: random      # random: drawn and mixed by the seed | data: the first ones in file order
      seed: 0
      vary: true         # a draw of its own for each item; false: one for all items, read only once
      separator: "\\n\\n"  # after each demonstration

An item is never its own demonstration, and no demonstration comes twice. Of several phrasings of
the prompt all demonstrations of an item take the item's.
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
from ipt.evaluation.task import SHOTS, Task

ORDERS = ("random", "data")


@dataclass(frozen=True)
class Settings:
    number: int
    per_class: bool = False
    order: str = "random"
    separator: str = "\n\n"
    seed: int = 0
    vary: bool = False


def with_shots(
    task: Task, items: list[Any], corpus: Path | None, read: Callable[..., list[Any]], odd: OddRows
) -> list[Any]:
    """The items with the task's demonstrations before their prompts; `read` is the kind's own and
    reads the demonstrations too.

    An item is a named tuple with `id`, `prompt`, `shots` (so many characters of the prompt are
    demonstrations) and `text`: the rest of the prompt with the right answer, which is what a
    demonstration prints. Rows of other data that make no demonstration are put down in `odd`.
    Raises UserError if there are too few of them, or of one class.
    """
    source = task.demonstrations
    if source is None:
        return items
    has_own_data = replace(source, shots=task.shots) != task
    settings = Settings(**{key: value for key, value in task.shots.items() if key in SHOTS})
    if settings.order not in ORDERS:
        raise UserError(
            f"task {task.name}: shots.order is {settings.order!r}, expected {' or '.join(ORDERS)}"
        )

    @cache
    def classes(prompt: str) -> list[list[Any]]:
        odd_shots = OddRows()
        found = read(replace(source, prompt=prompt), corpus, odd_shots)
        odd.of_shots = odd_shots if has_own_data else None
        return _classes(task, settings, found)

    @cache
    def candidates(prompt: str, key: str) -> list[list[Any]]:
        """Of each class the first of the draw, one more than wanted: one may be the item itself."""
        return [
            list(islice(_drawn(members, settings, key), settings.number + 1))
            for members in classes(prompt)
        ]

    def one(item: Any) -> Any:
        key = f"{settings.seed}/{item.id}" if settings.vary else str(settings.seed)
        prefix = _prefix(task, settings, item, candidates(phrasing(task, item.id), key), key)
        return item._replace(prompt=prefix + item.prompt, shots=len(prefix))

    return [one(item) for item in items]


def _classes(task: Task, settings: Settings, demonstrations: list[Any]) -> list[list[Any]]:
    if not settings.per_class:
        return [demonstrations]
    found: dict[str, list[Any]] = defaultdict(list)
    for demonstration in demonstrations:
        found[_class(task, demonstration)].append(demonstration)
    return [found[name] for name in sorted(found)]


def _class(task: Task, demonstration: Any) -> str:
    gold = getattr(demonstration, "gold", None)
    if gold is None or demonstration.right or isinstance(task.options, str):
        raise UserError(
            f"task {task.name}: shots.per_class is for tasks of kind choice with one right option "
            "of a fixed list"
        )
    return str(demonstration.options[gold])


def _drawn(members: list[Any], settings: Settings, key: str) -> Iterator[Any]:
    """Members of a class in the order of the draw, each text once."""
    seen: set[str] = set()
    for index in range(len(members)) if settings.order == "data" else draw(len(members), key):
        if members[index].text not in seen:
            seen.add(members[index].text)
            yield members[index]


def _prefix(
    task: Task, settings: Settings, item: Any, candidates: Iterable[list[Any]], key: str
) -> str:
    chosen: list[Any] = []
    for members in candidates:
        others = [member for member in members if member.text != item.text][: settings.number]
        if len(others) < settings.number:
            of_class = (
                f" with the answer {_class(task, members[0])!r}" if settings.per_class else ""
            )
            raise UserError(
                f"task {task.name}: {len(others)} demonstrations{of_class} for item {item.id}, "
                f"expected {settings.number}"
            )
        chosen += others
    if settings.order == "random":
        chosen.sort(key=lambda demonstration: text_hash(f"{key}/{demonstration.id}"))
    return "".join(demonstration.text + settings.separator for demonstration in chosen)
