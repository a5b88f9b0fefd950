"""Tasks are data: a YAML file says where items come from and how they read; a new task needs no code.

A file with the key `tasks` is a group: a name for several tasks. What ships is in the folder `tasks/` beside this module.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ipt.stage import hash_file, hash_json

SHIPPED = Path(__file__).parent / "tasks"
CORPUS = "corpus:"


@dataclass(frozen=True)
class Task:
    """What is asked, of which items. Prompt, option and text are Jinja templates over the fields of an item's row."""

    name: str
    kind: str  # choice | perplexity
    data: str  # corpus:NAME (a file or folder of the corpus stage), or a .jsonl, .jsonl.gz or .parquet file beside the YAML file
    description: str = ""
    where: dict[str, Any] = field(default_factory=dict)  # only rows whose fields have these values
    id: str = "id"  # the field that identifies an item; without it, the number of its row does
    prompt: str = "{{ prompt }}"  # choice: template
    options: str | list[str] = "options"  # choice: the field that lists the options, or a template for each of them
    option: str = "{{ option }}"  # choice: template around each option; what is scored is prompt + option
    gold: str = "gold"  # choice: the field with the right option, its index from 0 or its text
    text: str = "{{ text }}"  # perplexity: template
    folder: Path = Path()  # where the YAML file lies

    @property
    def needs_corpus(self) -> bool:
        return self.data.startswith(CORPUS)

    @property
    def path(self) -> Path:
        """The file of a task that does not read the corpus stage."""
        assert not self.needs_corpus
        return self.folder / self.data


@dataclass(frozen=True)
class Group:
    name: str
    tasks: list[str]
    description: str = ""


KEYS = {
    "task": {key.name: key.type for key in fields(Task) if key.name != "folder"},
    "group": {key.name: key.type for key in fields(Group)},
}
EXPECTED: dict[Any, str] = {str: "a text", list[str]: "a list of texts", dict[str, Any]: "a mapping of fields to values"}


def load_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks behind names of tasks, names of groups and paths of .yaml files, in order and each once.

    Raises ValueError or FileNotFoundError in one line: an unknown name (with the nearest ones), a misspelt key, a wrong value.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _resolve(name, Path(), ()):
            known = tasks.setdefault(task.name, task)
            if known != task:
                raise ValueError(f"tasks: {name} is called {task.name} like another task: give one of the two another name")
    if not tasks:
        raise ValueError(f"tasks is empty: name at least one of {', '.join(task_names())}, or the path of a .yaml file")
    return list(tasks.values())


def task_names() -> list[str]:
    """Names of the tasks and groups that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def task_digests(tasks: Iterable[Task]) -> dict[str, str]:
    """Task name -> digest of its definition and of its own data file: inputs of the evaluation stage beside model and corpus."""
    return {task.name: hash_json([_definition(task), None if task.needs_corpus else hash_file(task.path)]) for task in tasks}


def _definition(task: Task) -> dict[str, Any]:
    return {key: getattr(task, key) for key in KEYS["task"]}


def _resolve(name: str, folder: Path, inside: tuple[Path, ...]) -> list[Task]:
    """The tasks of one name; a path is relative to `folder`: that of the group which names it, else the current one."""
    path = _find(name, folder)
    if path in inside:
        raise ValueError(f"{path}: the group contains itself: take {name} out of `tasks`")
    content = _load_yaml(path)
    if "tasks" not in content:
        return [_task(content, path)]
    group = Group(**{"name": path.stem, **_checked(content, "group", path)})
    return [task for member in group.tasks for task in _resolve(member, path.parent, (*inside, path))]


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"tasks: {name} is no file: give the path of a task's YAML file, or one of {', '.join(task_names())}")
        return path.resolve()
    path = SHIPPED / f"{name}.yaml"
    if "/" in name or not path.is_file():
        known = task_names()
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise ValueError(
            f"tasks: no task or group is called {name!r}: did you mean {' or '.join(nearest)}? Own tasks: the path of a .yaml file"
        )
    return path


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected keys such as name, kind and data: see docs/evaluation.md")
    return content


def _task(content: dict[str, Any], path: Path) -> Task:
    values = {"name": path.stem, **_checked(content, "task", path)}
    missing = [key for key in ("kind", "data") if key not in values]
    if missing:
        raise ValueError(f"{path}: the key {missing[0]} is missing: a task needs kind and data")
    if "/" in values["name"]:
        raise ValueError(f"{path}: name is {values['name']!r}, but it names a file of predictions: leave out the slash")
    return Task(**values, folder=path.parent)


def _checked(content: dict[str, Any], what: str, path: Path) -> dict[str, Any]:
    """`content` with known keys and values of the right type."""
    types = KEYS[what]
    for key, value in content.items():
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, n=1) or list(types)
            raise ValueError(f"{path}: unknown key {key!r}: did you mean {', '.join(nearest)}?")
        wanted = EXPECTED.get(types[key], "a text or a list of texts")
        if not _is(value, wanted):
            raise ValueError(f"{path}: {key} is {value!r}, expected {wanted}")
    return content


def _is(value: Any, wanted: str) -> bool:
    texts = isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
    return {
        "a text": isinstance(value, str),
        "a list of texts": texts,
        "a mapping of fields to values": isinstance(value, dict),
    }.get(wanted, isinstance(value, str) or texts)
