"""Tasks are data: a YAML file names the source of the items and how they are shown to the model.

A file with the key `tasks` is a group: a name for several tasks. The shipped ones are in the folder
`tasks/`. docs/evaluation.md explains all keys.
"""

# ruff: noqa: RUF009 - _key returns a dataclass field

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.errors import MissingFileError, UserError
from ipt.files import hash_json, parse_yaml
from ipt.places import expanded
from ipt.stage import hash_folder

SHIPPED = Path(__file__).parent / "tasks"
LISTED = "`python -m ipt.evaluation tasks` lists the shipped ones"
CORPUS, DATA, HUB = "corpus:", "data:", "hub:"
ROW_KINDS = ("choice", "generation", "perplexity", "pairs")
KINDS = (*ROW_KINDS, "harness")


def _key(default: Any, *kinds: str, selects_rows: bool = False) -> Any:
    """A key of tasks of these kinds. `selects_rows`: `fewshot` may override it."""
    metadata = {"kinds": kinds, "selects_rows": selects_rows}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _row_key(default: Any) -> Any:
    return _key(default, *ROW_KINDS, selects_rows=True)


@dataclass(frozen=True)
class Task:
    """Templates are Jinja templates over the fields of a row."""

    name: str
    kind: str
    # corpus:NAME in the corpus stage, data:PATH in data_dir, hub:OWNER/NAME, a URL, or a path
    # relative to the YAML file
    data: str = _key("", *KINDS, selects_rows=True)
    description: str = _key("", *KINDS)
    # model -> published value of `paper`, in percent
    published: dict[str, Any] = _key({}, *KINDS)

    # Rows of the data
    # hub: configuration
    subset: str = _row_key("")
    # hub: empty: test
    split: str = _row_key("")
    # jsonl | json | csv | tsv | conll | parquet; empty: by the file name extension
    format: str = _row_key("")
    # csv, tsv: column names of a file without a header
    columns: list[str] = _row_key([])
    # conll: sentences per row, all from the same document
    sentences: int = _row_key(1)
    # field (dots separate levels) with a list of rows, which inherit the other fields
    records: str = _row_key("")
    # a second file (as `data`); its fields are added to the rows with the same id
    join: str = _row_key("")
    # select rows with these field values
    where: dict[str, Any] = _row_key({})
    # template: select rows for which it renders True
    keep: str = _row_key("")
    # field that identifies an item; empty or missing: the row number
    id: str = _row_key("id")
    # rows with a missing field, no answer or equal options: leave_out (and count them) | error
    odd_rows: str = _key("leave_out", *ROW_KINDS)
    # take wrong options from other rows: {field, number, near}, see ipt.evaluation.data
    distractors: dict[str, Any] = _key({}, "choice")

    # Demonstrations, see ipt.evaluation.few_shot
    # null: none (harness: the number in the harness's task file)
    num_fewshot: int | None = _key(None, "choice", "generation", "pairs", "harness")
    # hub: split with the demonstrations
    fewshot_split: str = _key("", "choice", "generation", "pairs")
    # text after each demonstration
    fewshot_delimiter: str = _key("\n\n", "choice", "generation")
    # other keys of demonstrations, and keys of rows in which their data differ from the task's
    fewshot: dict[str, Any] = _key({}, "choice", "generation", "pairs")

    # Prompts and answers
    # template, or several: the hash of an item's id selects one
    prompt: str | list[str] = _key("{{ prompt }}", "choice", "generation")
    # field with the list of options, or a template for each option
    options: str | list[str] = _key("options", "choice")
    # template around each option; prompt + option is scored
    option: str = _key("{{ option }}", "choice")
    # field with the right option (index from 0 or text; several: a list), or a template
    gold: str = _key("gold", "choice")
    # index | text; empty: the reading that all rows allow
    gold_is: str = _key("", "choice")
    # template of a prompt without information, for likelihoods relative to it
    unconditional: str = _key("", "choice")
    # template of the right answer
    answer: str = _key("{{ answer }}", "generation", "pairs")
    # strings that end an answer
    stop: list[str] = _key(["\n"], "generation")
    max_new_tokens: int = _key(100, "generation", "pairs")
    # the published scorer reads only this many tokens at the end of a prompt; 0: all. `paper`
    # follows it
    published_length: int = _key(0, "generation")
    # type of the answers: text | number | entities
    parse: str = _key("text", "generation")
    # template of the scored text
    text: str = _key("{{ text }}", "perplexity")
    # template of the context, which is read but not scored
    context: str = _key("", "perplexity", "pairs")
    # pairs: the model writes all pairs of a context | responses: to each right question
    measure: str = _key("pairs", "pairs")
    # prompt format: ipt (the synthesizer's) | chat (the chat template)
    pair_format: str = _key("ipt", "pairs")
    # a reader of synthesizer fine-tuning data (ipt.synthesis.qa_readers.READERS)
    reader: str = _key("", "pairs")
    # field with the list of right pairs; empty: each row is one pair
    pairs: str = _key("", "pairs")
    # template over an entry of `pairs` and its row
    question: str = _key("{{ question }}", "pairs")

    # Metrics
    # accuracy | micro_f1 | macro_f1 | weighted_f1 | multi_label: what `paper` and `correct` report
    metric: str = _key("accuracy", "choice", "harness")
    # field: report the mean of the metric over the values of this field
    group: str = _key("", "choice")
    # name of the task in lm-evaluation-harness
    harness: str = _key("", "harness")

    # folder of the YAML file, and of data:PATH
    folder: Path = Path()
    data_dir: Path = Path("data")

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> "Task":
        """The task of a finished evaluation. Keys of earlier versions, on which no metric depends,
        are dropped.
        """
        return cls(**{key: value for key, value in definition.items() if key in TASK_KEYS})

    @property
    def definition(self) -> dict[str, Any]:
        """All keys with their values, as JSON values."""
        return {key: getattr(self, key) for key in TASK_KEYS}

    @property
    def needs_corpus(self) -> bool:
        return self.data.startswith(CORPUS)

    @property
    def path(self) -> Path | None:
        """The local file or folder that the task reads, if it reads one."""
        if not self.data or self.data.startswith((CORPUS, HUB)) or "://" in self.data:
            return None
        if self.data.startswith(DATA):
            return self.data_dir / self.data.removeprefix(DATA)
        return self.folder / expanded(self.data)

    @property
    def file(self) -> CorpusFile | None:
        """The file that the task reads, local or remote, if it reads one."""
        if path := self.path:
            return CorpusFile(str(path), path.name)
        return remote_file(self.data) if "://" in self.data else None

    @property
    def joined(self) -> "Task | None":
        """A task that reads all rows of `join`."""
        if not self.join:
            return None
        joined = Task(self.name, self.kind, self.join, id=self.id)
        return replace(joined, folder=self.folder, data_dir=self.data_dir)

    @property
    def demonstrations(self) -> "Task | None":
        """A task that reads the demonstrations."""
        if not self.num_fewshot or self.kind == "harness":
            return None
        rows = {key: value for key, value in self.fewshot.items() if key in ROW_KEYS}
        rows.setdefault("split", self.fewshot_split or self.split)
        return replace(self, num_fewshot=None, fewshot_split="", fewshot={}, **rows)


@dataclass(frozen=True)
class Group:
    name: str
    tasks: list[str]
    description: str = ""
    # model -> published average, where the values of the tasks are unknown
    published: dict[str, Any] = field(default_factory=dict)
    # false: the tasks measure different things, so their mean has no meaning
    average: bool = True


TASK_KEYS = {key.name: key for key in fields(Task) if key.name not in ("folder", "data_dir")}
ROW_KEYS = {key.name: key.type for key in TASK_KEYS.values() if key.metadata.get("selects_rows")}
GROUP_TYPES = {key.name: key.type for key in fields(Group)}
FEWSHOT_TYPES = {"per_class": bool, "order": str, "seed": int, "vary": bool}
DISTRACTOR_TYPES = {"number": int, "field": str, "near": str}
# keys of `shots`, the earlier name of `num_fewshot` and `fewshot`, that have moved elsewhere
FROM_SHOTS = {
    "number": "num_fewshot",
    "separator": "fewshot_delimiter",
    "split": "fewshot_split",
}


def load_tasks(names: Iterable[str], data_dir: str | Path = "data") -> list[Task]:
    """The tasks of task names, group names and paths of .yaml files, in order and without
    duplicates.

    Raises UserError or MissingFileError for an unknown name, an unknown key or a wrong value.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _resolve(name, Path(), Path(data_dir), ()):
            if tasks.setdefault(task.name, task) != task:
                raise UserError(f"tasks: {name}: another task has the name {task.name}: rename one")
    if not tasks:
        raise UserError(f"tasks is empty: name a task, or the path of a .yaml file ({LISTED})")
    return list(tasks.values())


def task_names() -> list[str]:
    """Names of the shipped tasks and groups."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_group(name: str) -> Group | None:
    """The group with this name or path; None for a task."""
    path = _find(name, Path())
    content = _load_yaml(path)
    return _group(content, path) if "tasks" in content else None


def task_digests(tasks: Iterable[Task]) -> dict[str, str]:
    """Task name -> digest of its definition and of the files that it reads, which are inputs of the
    evaluation stage. A data set of the hub is identified by its name only.
    """
    return {
        task.name: hash_json([task.definition, *map(_file_digest, sources(task))]) for task in tasks
    }


def sources(task: Task) -> list[Task]:
    """The task, its demonstrations, and what `join` of both reads."""
    found = []
    for part in (task, task.demonstrations):
        if part:
            found += [part, part.joined] if part.joined else [part]
    return found


def remote_file(url: str) -> CorpusFile:
    """The file at an http(s) or other fsspec URL, which is not opened yet."""
    import fsspec

    try:
        system, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: unknown file system, or its package is missing ({first_line(error)})"
        ) from None
    return CorpusFile(path, path.partition("?")[0].rpartition("/")[2], system)


def _file_digest(source: Task) -> str | None:
    if source.path and source.path.is_dir():  # task files of lm-evaluation-harness
        return hash_json(hash_folder(source.path))
    return source.file.digest() if source.file else None


# Reading task files
# ----------------------------------------------------------------------------------------------


def _resolve(name: str, folder: Path, data_dir: Path, inside: tuple[Path, ...]) -> list[Task]:
    """The tasks of one name. `folder`: what a path is relative to; `inside`: the groups around."""
    path = _find(name, folder)
    if path in inside:
        raise UserError(f"{path}: the group contains itself: remove {name} from `tasks`")
    content = _load_yaml(path)
    if "tasks" not in content:
        return [_task(content, path, data_dir)]
    tasks = []
    for member in _group(content, path).tasks:
        tasks += _resolve(member, path.parent, data_dir, (*inside, path))
    return tasks


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            raise MissingFileError(
                f"tasks: {name} does not exist: give a path or a name ({LISTED})"
            )
        return path.resolve()
    path = SHIPPED / f"{name}.yaml"
    if "/" in name or not path.is_file():
        nearest = " or ".join(difflib.get_close_matches(name, task_names(), n=3, cutoff=0.5))
        guess = f"did you mean {nearest}? " if nearest else ""
        raise UserError(
            f"tasks: no task or group is called {name!r}: {guess}{LISTED}; the path of a task of "
            "your own ends in .yaml"
        )
    return path


def _load_yaml(path: Path) -> dict[str, Any]:
    content = parse_yaml(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: found {type(content).__name__}, expected keys such as name, kind and data"
        )
    return content


def _group(content: dict[str, Any], path: Path) -> Group:
    _check_types(content, GROUP_TYPES, path)
    return Group(**{"name": path.stem, **content})


def _task(content: dict[str, Any], path: Path, data_dir: Path) -> Task:
    if "shots" in content:
        raise _renamed_shots(content["shots"], path)
    _check_types(content, {name: key.type for name, key in TASK_KEYS.items()}, path)
    values = {"name": path.stem, **content}
    source = "harness" if values.get("kind") == "harness" else "data"
    for key in ("kind", source):
        if not values.get(key):
            raise UserError(f"{path}: the key {key} is missing: a task needs kind and {source}")
    if "/" in values["name"]:
        raise UserError(
            f"{path}: name is {values['name']!r}: a file of predictions gets this name, so it "
            "cannot contain a slash"
        )
    _check_use(values, path)
    return Task(**values, folder=path.parent, data_dir=data_dir)


def _renamed_shots(shots: Any, path: Path) -> UserError:
    given = list(shots) if isinstance(shots, dict) else ["number"]
    moved = ", ".join(f"shots.{key} -> {FROM_SHOTS.get(key, f'fewshot.{key}')}" for key in given)
    return UserError(f"{path}: the key shots has new names: write {moved}")


def _check_use(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for keys that have no effect in a task of this kind."""
    kind = values["kind"]
    for key in values:
        kinds = TASK_KEYS[key].metadata.get("kinds", KINDS)
        if kind in KINDS and kind not in kinds:
            raise UserError(
                f"{path}: {key} has no effect in a task of kind {kind}: remove it (it is for "
                f"{' or '.join(kinds)})"
            )
    fewshot: dict[str, Any] = {**FEWSHOT_TYPES, **ROW_KEYS}
    if kind == "pairs":
        fewshot = {"seed": int, **ROW_KEYS}
    _check_types(values.get("fewshot", {}), fewshot, path, "fewshot.")
    if "split" in values.get("fewshot", {}):
        raise UserError(f"{path}: fewshot.split: write fewshot_split")
    used = [key for key in values if key.startswith("fewshot")]
    if used and "num_fewshot" not in values:
        raise UserError(f"{path}: num_fewshot is missing: {used[0]} needs it")
    if distractors := values.get("distractors"):
        _check_types(distractors, DISTRACTOR_TYPES, path, "distractors.")
        for key in ("number", "field"):
            if key not in distractors:
                raise UserError(f"{path}: distractors.{key} is missing")


def _check_types(
    content: dict[str, Any], types: dict[str, Any], path: Path, within: str = ""
) -> None:
    for key, value in content.items():
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, n=1) or list(types)
            raise UserError(
                f"{path}: unknown key {within + str(key)!r}: did you mean {', '.join(nearest)}?"
            )
        expected, fits = EXPECTED["seed" if key == "seed" else types[key]]
        if not fits(value):
            has_booleans = isinstance(value, list) and bool in map(type, value)
            hint = " (yes and no are booleans in YAML: quote them)" if has_booleans else ""
            raise UserError(f"{path}: {within}{key} is {value!r}, expected {expected}{hint}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# type of a key (or "seed") -> how a message calls it, and whether a value is one
EXPECTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", _is_text),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number above 0", lambda value: _is_whole(value) and value > 0),
    int | None: ("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "seed": ("a whole number", _is_whole),
    list[str]: ("a list of texts", _is_texts),
    dict[str, Any]: ("a mapping", lambda value: isinstance(value, dict)),
    str | list[str]: ("a text or a list of texts", lambda x: _is_text(x) or _is_texts(x)),
}
