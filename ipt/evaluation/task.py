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
CORPUS, DATA, HUB = "corpus:", "data:", "hub:"


@dataclass(frozen=True)
class Task:
    """What is asked, of which items. What is called a template is one of Jinja over the fields of an item's row."""

    name: str
    kind: str  # choice | generation | perplexity | pairs | harness
    data: str = ""  # corpus:NAME of the corpus stage, data:PATH below data_dir, hub:OWNER/NAME, or a path beside the YAML file
    description: str = ""
    # Rows of the data.
    subset: str = ""  # hub: configuration
    split: str = ""  # hub: split; empty: test
    format: str = ""  # jsonl | json | csv | tsv | conll | parquet; empty: by the name's ending
    columns: list[str] = field(default_factory=list)  # csv, tsv: names of the columns where the file has no header
    records: str = ""  # the field (dots lead inwards) whose entries are the rows; they inherit the other fields
    where: dict[str, Any] = field(default_factory=dict)  # only rows whose fields have these values
    keep: str = ""  # template: only rows for which it reads True
    id: str = "id"  # the field that identifies an item; without it, the number of its row does
    shots: dict[str, Any] = field(default_factory=dict)  # demonstrations before each prompt: see ipt.evaluation.shots
    # How an item reads.
    prompt: str = "{{ prompt }}"  # template
    options: str | list[str] = "options"  # choice: the field that lists the options, or a template for each of them
    option: str = "{{ option }}"  # choice: template around each option; what is scored is prompt + option
    gold: str = "gold"  # choice: the field with the right option (its index from 0 or its text; several: a list), or a template
    unconditional: str = ""  # choice: template of a prompt that says nothing, for likelihoods in relation to it
    answer: str = "{{ answer }}"  # generation: template of the right answer
    stop: list[str] = field(default_factory=lambda: ["\n"])  # generation: texts that end an answer
    max_new_tokens: int = 100  # generation
    parse: str = "text"  # generation: what an answer is: text | number | entities
    text: str = "{{ text }}"  # perplexity: template
    # How answers are scored.
    metric: str = "accuracy"  # accuracy | micro_f1 | macro_f1 | weighted_f1 | multi_label; what `paper` and `correct` report
    group: str = ""  # field: the metric is taken for each of its values, and the mean of those is reported
    published: dict[str, Any] = field(default_factory=dict)  # model -> the published figure of `paper`, in percent
    harness: str = ""  # harness: the task's name in lm-evaluation-harness
    folder: Path = Path()  # where the YAML file lies
    data_dir: Path = Path("data")  # where data:PATH begins

    @property
    def needs_corpus(self) -> bool:
        return self.data.startswith(CORPUS)

    @property
    def path(self) -> Path | None:
        """The file of a task that reads one; None where it reads a corpus stage, a hub or the harness's data."""
        if not self.data or self.data.startswith((CORPUS, HUB)):
            return None
        return self.data_dir / self.data.removeprefix(DATA) if self.data.startswith(DATA) else self.folder / self.data

    @property
    def definition(self) -> dict[str, Any]:
        """What the YAML file says, and the default of every other key: JSON-able."""
        return {key: getattr(self, key) for key in KEYS["task"]}


@dataclass(frozen=True)
class Group:
    name: str
    tasks: list[str]
    description: str = ""


KEYS = {
    "task": {key.name: key.type for key in fields(Task) if key.name not in ("folder", "data_dir")},
    "group": {key.name: key.type for key in fields(Group)},
}
REQUIRED = {"harness": "harness"}  # kind -> the key that it needs; of all others: data
EXPECTED: dict[Any, str] = {
    str: "a text",
    int: "a whole number above 0",
    list[str]: "a list of texts",
    dict[str, Any]: "a mapping",
}


def load_tasks(names: Iterable[str], data_dir: str | Path = "data") -> list[Task]:
    """The tasks behind names of tasks, names of groups and paths of .yaml files, in order and each once.

    Raises ValueError or FileNotFoundError in one line: an unknown name (with the nearest ones), a misspelt key, a wrong value.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _resolve(name, Path(), Path(data_dir), ()):
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
    return {task.name: hash_json([task.definition, hash_file(task.path) if task.path else None]) for task in tasks}


def _resolve(name: str, folder: Path, data_dir: Path, inside: tuple[Path, ...]) -> list[Task]:
    """The tasks of one name; a path is relative to `folder`: that of the group which names it, else the current one."""
    path = _find(name, folder)
    if path in inside:
        raise ValueError(f"{path}: the group contains itself: take {name} out of `tasks`")
    content = _load_yaml(path)
    if "tasks" not in content:
        return [_task(content, path, data_dir)]
    group = Group(**{"name": path.stem, **_checked(content, "group", path)})
    return [task for member in group.tasks for task in _resolve(member, path.parent, data_dir, (*inside, path))]


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


def _task(content: dict[str, Any], path: Path, data_dir: Path) -> Task:
    values = {"name": path.stem, **_checked(content, "task", path)}
    needed = ("kind", REQUIRED.get(values.get("kind", ""), "data"))
    missing = [key for key in needed if not values.get(key)]
    if missing:
        raise ValueError(f"{path}: the key {missing[0]} is missing: a task needs {' and '.join(needed)}")
    if "/" in values["name"]:
        raise ValueError(f"{path}: name is {values['name']!r}, but it names a file of predictions: leave out the slash")
    return Task(**values, folder=path.parent, data_dir=data_dir)


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
        "a whole number above 0": isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "a list of texts": texts,
        "a mapping": isinstance(value, dict),
    }.get(wanted, isinstance(value, str) or texts)
