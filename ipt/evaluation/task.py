"""Tasks are data: a YAML file says where items come from and how they read; a new task needs no
code.

A file with the key `tasks` is a group: a name for several tasks. What ships is in the folder
`tasks/` beside this module.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ipt.corpus.files import CorpusFile, first_line
from ipt.errors import MissingFileError, UserError
from ipt.files import hash_json, parse_yaml
from ipt.places import expanded
from ipt.stage import hash_folder

SHIPPED = Path(__file__).parent / "tasks"
LISTED = "`python -m ipt.evaluation tasks` lists those that ship"
CORPUS, DATA, HUB = "corpus:", "data:", "hub:"


@dataclass(frozen=True)
class Task:
    """What is asked, of which items. What is called a template is one of Jinja over the fields of
    an item's row.

    Which keys a kind uses: `USES`. A file that gives another one is refused.
    """

    name: str
    kind: str  # choice | generation | perplexity | pairs | harness
    # corpus:NAME of the corpus stage, data:PATH below data_dir, hub:OWNER/NAME, a URL, or a path
    # beside the YAML file
    data: str = ""
    description: str = ""
    # Rows of the data.
    subset: str = ""  # hub: configuration
    split: str = ""  # hub: split; empty: test
    format: str = ""  # jsonl | json | csv | tsv | conll | parquet; empty: by the name's ending
    columns: list[str] = field(
        default_factory=list
    )  # csv, tsv: names of the columns where the file has no header
    sentences: int = (
        1  # conll: so many sentences are a row; none goes on from one document into the next
    )
    # the field (dots lead inwards) whose entries are the rows; they inherit the other fields
    records: str = ""
    join: str = ""  # a second file (as in data); fields of its row of the same id are added
    where: dict[str, Any] = field(default_factory=dict)  # only rows whose fields have these values
    keep: str = ""  # template: only rows for which it reads True
    # rows without a field or an answer, or with equal options: leave_out (and count them) | error
    odd_rows: str = "leave_out"
    # the field that identifies an item; empty or without such a field, the number of its row does
    id: str = "id"
    distractors: dict[str, Any] = field(
        default_factory=dict
    )  # choice: wrong options from other rows: see ipt.evaluation.data
    shots: dict[str, Any] = field(
        default_factory=dict
    )  # demonstrations before each prompt: see ipt.evaluation.few_shot
    # How an item reads.
    prompt: str | list[str] = (
        "{{ prompt }}"  # template, or several phrasings: the hash of an item's id chooses its one
    )
    options: str | list[str] = (
        "options"  # choice: the field that lists the options, or a template for each of them
    )
    option: str = (
        "{{ option }}"  # choice: template around each option; what is scored is prompt + option
    )
    # choice: the field with the right option (its index from 0 or its text; several: a list), or a
    # template
    gold: str = "gold"
    gold_is: str = (
        ""  # choice: what `gold` names: index | text; empty: what all rows of the task allow
    )
    unconditional: str = (
        ""  # choice: template of a prompt that says nothing, for likelihoods in relation to it
    )
    answer: str = "{{ answer }}"  # generation, pairs: template of the right answer
    stop: list[str] = field(default_factory=lambda: ["\n"])  # generation: texts that end an answer
    max_new_tokens: int = 100  # generation, pairs
    # generation: the published scorer reads the last so many tokens of a prompt; 0: all. `paper`
    # does as it
    published_length: int = 0
    parse: str = "text"  # generation: what an answer is: text | number | entities
    text: str = "{{ text }}"  # perplexity: template
    # perplexity: template of what stands before the text; it is read and not scored. pairs: of the
    # context
    context: str = ""
    # pairs: what is written for a context: its pairs, or (responses) the response to each of its
    # questions
    measure: str = "pairs"
    pair_format: str = (
        "ipt"  # pairs: prompt format: ipt (the synthesizer's) | chat (through the chat template)
    )
    # pairs: the file is one of the sets that synthesizers are tuned on
    # (ipt.synthesis.finetuning_data.READERS)
    reader: str = ""
    pairs: str = ""  # pairs: the field that lists the right pairs; empty: the row is one
    # pairs: template over an entry of `pairs` and the row; the response is `answer`
    question: str = "{{ question }}"
    # How answers are scored.
    # accuracy | micro_f1 | macro_f1 | weighted_f1 | multi_label; what `paper` and `correct` report
    metric: str = "accuracy"
    group: str = (
        ""  # field: the metric is taken for each of its values, and the mean of those is reported
    )
    published: dict[str, Any] = field(
        default_factory=dict
    )  # model -> the published figure of `paper`, in percent
    harness: str = ""  # harness: the task's name in lm-evaluation-harness
    folder: Path = Path()  # where the YAML file lies
    data_dir: Path = Path("data")  # where data:PATH begins

    @property
    def needs_corpus(self) -> bool:
        return self.data.startswith(CORPUS)

    @property
    def path(self) -> Path | None:
        """The file of a task that reads one from this machine; None where it reads a corpus stage,
        a hub, a URL or the harness's data.
        """
        if not self.data or self.data.startswith((CORPUS, HUB)) or "://" in self.data:
            return None
        return (
            self.data_dir / self.data.removeprefix(DATA)
            if self.data.startswith(DATA)
            else self.folder / expanded(self.data)
        )

    @property
    def file(self) -> CorpusFile | None:
        """The one file that the task reads, on this machine or behind a URL; else None."""
        if path := self.path:
            return CorpusFile(str(path), path.name)
        return remote_file(self.data) if "://" in self.data else None

    @property
    def joined(self) -> "Task | None":
        """Where `join` is read from: every row of it."""
        return (
            Task(
                self.name,
                self.kind,
                self.join,
                id=self.id,
                folder=self.folder,
                data_dir=self.data_dir,
            )
            if self.join
            else None
        )

    @property
    def demonstrations(self) -> "Task | None":
        """Where `shots` are read from: what they do not say of their data is as in the task."""
        if not self.shots or self.kind == "harness":
            return None
        return replace(
            self, shots={}, **{key: value for key, value in self.shots.items() if key in ROWS}
        )

    @property
    def definition(self) -> dict[str, Any]:
        """What the YAML file says, and the default of every other key: JSON-able."""
        return {key: getattr(self, key) for key in KEYS["task"]}


@dataclass(frozen=True)
class Group:
    name: str
    tasks: list[str]
    description: str = ""
    published: dict[str, Any] = field(
        default_factory=dict
    )  # model -> published average, where those of the tasks are unknown
    average: bool = (
        True  # false: its tasks measure different things, and a mean over them would say nothing
    )


ROWS = (
    "data",
    "subset",
    "split",
    "format",
    "columns",
    "sentences",
    "records",
    "join",
    "where",
    "keep",
    "id",
)
_READ = {*ROWS, "odd_rows"}
_PROMPTED = {*_READ, "shots", "prompt"}
USES: dict[
    str, set[str]
] = {  # kind -> the keys that mean something to it, beside those of every task
    "choice": {
        *_PROMPTED,
        "distractors",
        "options",
        "option",
        "gold",
        "gold_is",
        "unconditional",
        "metric",
        "group",
    },
    "generation": {*_PROMPTED, "answer", "stop", "max_new_tokens", "published_length", "parse"},
    "perplexity": {*_READ, "text", "context"},
    "pairs": {
        *_READ,
        "shots",
        "context",
        "measure",
        "pair_format",
        "reader",
        "pairs",
        "question",
        "answer",
        "max_new_tokens",
    },
    "harness": {"harness", "data", "shots", "metric"},
}
EVERY = {"name", "kind", "description", "published"}
KEYS = {
    "task": {key.name: key.type for key in fields(Task) if key.name not in ("folder", "data_dir")},
    "group": {key.name: key.type for key in fields(Group)},
}
SHOTS = {
    "number": int,
    "per_class": bool,
    "order": str,
    "separator": str,
    "seed": int,
    "vary": bool,
}
SHOTS_OF = {
    "harness": ("number",),
    "pairs": ("number", "seed"),
}  # kind -> what it knows of SHOTS, where that is not all
DISTRACTORS = {"number": int, "field": str, "near": str}
REQUIRED = {"harness": "harness"}  # kind -> the key that it needs; of all others: data
EXPECTED: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number above 0",
    list[str]: "a list of texts",
    dict[str, Any]: "a mapping",
}


def load_tasks(names: Iterable[str], data_dir: str | Path = "data") -> list[Task]:
    """The tasks behind names of tasks, names of groups and paths of .yaml files, in order and each
    once.

    Raises UserError or MissingFileError: an unknown name (with the nearest ones), a misspelt key, a
    wrong value.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _resolve(name, Path(), Path(data_dir), ()):
            known = tasks.setdefault(task.name, task)
            if known != task:
                raise UserError(
                    f"tasks: {name} is called {task.name} like another task: give one of the two "
                    "another name"
                )
    if not tasks:
        raise UserError(
            f"tasks is empty: name at least one, or the path of a .yaml file ({LISTED})"
        )
    return list(tasks.values())


def task_names() -> list[str]:
    """Names of the tasks and groups that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_group(name: str) -> Group | None:
    """The group of this name or file; None if that is a task."""
    path = _find(name, Path())
    content = _load_yaml(path)
    return _group(content, path) if "tasks" in content else None


def task_digests(tasks: Iterable[Task]) -> dict[str, str]:
    """Task name -> digest of its definition and of the files that it reads: inputs of the
    evaluation stage beside model and corpus.

    A data set of a hub has only its name.
    """
    return {
        task.name: hash_json([task.definition, *map(_file_digest, sources(task))]) for task in tasks
    }


def sources(task: Task) -> list[Task]:
    """The task, and what else it reads rows from: `join`, the shots' data and their `join`."""
    return [
        source
        for part in (task, task.demonstrations)
        if part
        for source in (part, part.joined)
        if source
    ]


def remote_file(url: str) -> CorpusFile:
    """The file behind an http(s) or fsspec URL; nothing is read yet."""
    import fsspec

    try:
        system, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: no such kind of file system, or a package for it is missing "
            f"({first_line(error)})"
        ) from None
    return CorpusFile(path, path.partition("?")[0].rpartition("/")[2], system)


def _file_digest(source: Task) -> str | None:
    if source.path and source.path.is_dir():  # of the harness's own task files
        return hash_json(hash_folder(source.path))
    return source.file.digest() if source.file else None


def _resolve(name: str, folder: Path, data_dir: Path, inside: tuple[Path, ...]) -> list[Task]:
    """The tasks of one name; a path is relative to `folder`: that of the group which names it, else
    the current one.
    """
    path = _find(name, folder)
    if path in inside:
        raise UserError(f"{path}: the group contains itself: take {name} out of `tasks`")
    content = _load_yaml(path)
    if "tasks" not in content:
        return [_task(content, path, data_dir)]
    group = _group(content, path)
    return [
        task
        for member in group.tasks
        for task in _resolve(member, path.parent, data_dir, (*inside, path))
    ]


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            raise MissingFileError(
                f"tasks: {name} is no file: give the path of a task's YAML file, or a name "
                f"({LISTED})"
            )
        return path.resolve()
    path = SHIPPED / f"{name}.yaml"
    if "/" in name or not path.is_file():
        nearest = " or ".join(difflib.get_close_matches(name, task_names(), n=3, cutoff=0.5))
        guess = f"did you mean {nearest}? " if nearest else ""
        raise UserError(
            f"tasks: no task or group is called {name!r}: {guess}Own tasks: the path of a .yaml "
            f"file ({LISTED})"
        )
    return path


def _load_yaml(path: Path) -> dict[str, Any]:
    content = parse_yaml(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: found {type(content).__name__}, expected keys such as name, kind and data: "
            "see docs/evaluation.md"
        )
    return content


def _group(content: dict[str, Any], path: Path) -> Group:
    return Group(**{"name": path.stem, **_checked(content, "group", path)})


def _task(content: dict[str, Any], path: Path, data_dir: Path) -> Task:
    values = {"name": path.stem, **_checked(content, "task", path)}
    needed = ("kind", REQUIRED.get(values.get("kind", ""), "data"))
    missing = [key for key in needed if not values.get(key)]
    if missing:
        raise UserError(
            f"{path}: the key {missing[0]} is missing: a task needs {' and '.join(needed)}"
        )
    if "/" in values["name"]:
        raise UserError(
            f"{path}: name is {values['name']!r}, but it names a file of predictions: leave out "
            "the slash"
        )
    _check_use(values, path)
    return Task(**values, folder=path.parent, data_dir=data_dir)


def _check_use(values: dict[str, Any], path: Path) -> None:
    """Refuse keys that the task's kind would ignore, and keys inside `shots` and `distractors` that
    nobody knows.
    """
    kind = values["kind"]
    ignored = [key for key in values if key not in USES[kind] | EVERY] if kind in USES else []
    if ignored:
        raise UserError(
            f"{path}: {ignored[0]} means nothing to a task of kind {kind}: leave it out (it is for "
            f"{_users(ignored[0])})"
        )
    rows = {} if kind == "harness" else {key: KEYS["task"][key] for key in ROWS}
    shots: dict[str, Any] = {**{key: SHOTS[key] for key in SHOTS_OF.get(kind, SHOTS)}, **rows}
    for name, types, needed in (
        ("shots", shots, ["number"]),
        ("distractors", DISTRACTORS, ["number", "field"]),
    ):
        if given := values.get(name):
            _check_types(given, types, path, f"{name}.")
            if missing := [key for key in needed if key not in given]:
                raise UserError(f"{path}: {name}.{missing[0]} is missing")


def _users(key: str) -> str:
    return " or ".join(kind for kind, used in USES.items() if key in used) or "other kinds"


def _checked(content: dict[str, Any], what: str, path: Path) -> dict[str, Any]:
    """`content` with known keys and values of the right type."""
    _check_types(content, KEYS[what], path)
    return content


def _check_types(
    content: dict[str, Any], types: dict[str, Any], path: Path, within: str = ""
) -> None:
    for key, value in content.items():
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, n=1) or list(types)
            raise UserError(
                f"{path}: unknown key {within + str(key)!r}: did you mean {', '.join(nearest)}?"
            )
        wanted = (
            "a whole number"
            if key == "seed"
            else EXPECTED.get(types[key], "a text or a list of texts")
        )
        if not _is(value, wanted):
            booleans = isinstance(value, list) and bool in map(type, value)
            hint = (
                " (yes and no are true and false in YAML: put them in quotes)" if booleans else ""
            )
            raise UserError(f"{path}: {within}{key} is {value!r}, expected {wanted}{hint}")


def _is(value: Any, wanted: str) -> bool:
    texts = (
        isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
    )
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "a text": isinstance(value, str),
        "true or false": isinstance(value, bool),
        "a whole number": whole,
        "a whole number above 0": whole and value > 0,
        "a list of texts": texts,
        "a mapping": isinstance(value, dict),
    }.get(wanted, isinstance(value, str) or texts)
