"""Template pools: the sentences and formats that rendering chooses from, read from data files and
validated.

`templates/*.yaml` are included; a user's file has the same keys and may extend another one
(docs/rendering.md).
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, TypeVar

from ipt.errors import MissingFileError, UserError
from ipt.files import parse_yaml

FOLDER = Path(__file__).parent / "templates"
OPTIONAL = (
    "document_start",
    "bridge",
    "inverted_opening",
    "dialogue_opening",
    "options_header",
    "hint",
)
LABELS = ("letter", "LETTER", "number", "roman", "ROMAN")
# kind of pair -> fields of its templates, how many of them have a fixed place
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "plain": (("question", "answer"), 2),
    "options": (("question", "options", "answer"), 3),
    "reasoning": (("question", "reasoning", "answer"), 1),
    "options_reasoning": (("question", "options", "reasoning", "answer"), 2),
}
_STOPS = (".", "。")
_ENDINGS = (".", "!", "?", "…", "。", "！", "？")
MARKS = "\ue000", "\ue001"  # around a part, where its place in the text is to be seen
_CLOSING = "\"'”’»)]*" + MARKS[1]

T = TypeVar("T", bound=Hashable)
R = TypeVar("R")


class Template:
    """Text with named fields in braces, parsed once.

    `fill` inserts values unchanged, so braces and format characters in values have no effect. A
    full stop directly after a field is dropped if the value already ends a sentence.
    """

    __slots__ = ("_pieces", "_printf", "_values", "fields", "source")

    def __init__(self, source: str) -> None:
        """Raises UserError if a brace is open or a field is more than a name."""
        pieces: list[tuple[str, bool, str]] = []
        after_field = False
        for literal, field, specification, conversion in Formatter().parse(source):
            if field is not None and (not field.isidentifier() or specification or conversion):
                raise UserError(
                    f"field {{{field}}} is not a plain name (a literal brace is doubled)"
                )
            pieces.append((literal, after_field and literal.startswith(_STOPS), field or ""))
            after_field = field is not None
        self.source = source
        self.fields = tuple(field for _, _, field in pieces if field)
        self._pieces = pieces if any(is_stop for _, is_stop, _ in pieces) else ()
        self._printf = "".join(
            literal.replace("%", "%%") + ("%s" if field else "") for literal, _, field in pieces
        )
        self._values: Callable[[Mapping[str, str]], Any] = (
            itemgetter(*self.fields) if self.fields else lambda values: ()
        )

    def fill(self, **values: str) -> str:
        if not self._pieces:
            return self._printf % self._values(values)
        parts: list[str] = []
        for literal, is_stop, field in self._pieces:
            if is_stop and parts[-1].rstrip(_CLOSING).endswith(_ENDINGS):
                literal = literal[1:]
            parts.append(literal)
            if field:
                parts.append(values[field])
        return "".join(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self.source == other.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"Template({self.source!r})"


@dataclass(frozen=True)
class Spaced:
    """A template that is repeated, and the separator."""

    text: Template
    separator: str


@dataclass(frozen=True)
class OptionFormat:
    item: Template  # {option} and perhaps one label
    answer: Template  # that label, or {option} where items have none
    separator: str


@dataclass(frozen=True)
class NumberedFormat:
    questions: str  # heading
    question: Template
    answers: str  # heading
    answer: Template
    separator: str


@dataclass(frozen=True)
class ExamplesFormat:
    opening: str
    example: Template  # each pair but the last
    last: Template
    separator: str


@dataclass(frozen=True)
class Pools:
    """All pools of templates. Pools are never empty and have no two equal entries."""

    without: Mapping[str, float]  # share of texts that go without an optional part
    starts: tuple[Template, ...]
    gaps: tuple[str, ...]
    separators: tuple[str, ...]
    bridges: tuple[str, ...]
    inverted_openings: tuple[str, ...]
    inverted_starts: tuple[Template, ...]
    pairs: Mapping[str, tuple[Spaced, ...]]  # by kind of pair
    options_headers: tuple[str, ...]
    option_formats: tuple[OptionFormat, ...]
    hints: tuple[Template, ...]
    conclusions: tuple[Template, ...]
    explanations: tuple[Template, ...]
    speakers: tuple[tuple[str, str], ...]
    turns: tuple[Spaced, ...]
    dialogue_openings: tuple[Template, ...]
    numbered: tuple[NumberedFormat, ...]
    inline_few_shot: tuple[ExamplesFormat, ...]
    next_turn: tuple[ExamplesFormat, ...]


def load_pools(name: str) -> Pools:
    """The included pools `name`, or those in the file `name`, merged with the files that it
    extends.

    Raises MissingFileError if there is no such file, UserError with file and entry if one is
    invalid.
    """
    return _Reader(_files(pools_path(name))).pools()


def pools_path(name: str, folder: Path = Path(), key: str = "rendering.templates=") -> Path:
    """The file for `name`: an included one, or a path relative to `folder`. Raises
    MissingFileError, which names `key`, if there is none.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name}.yaml" if name in shipped else folder / name
    if not path.is_file():
        raise MissingFileError(
            f"{key}{name}: no such file, and not among the shipped pools ({', '.join(shipped)})"
        )
    return path


def pools_digest(name: str) -> str:
    """SHA-256 of all files of `rendering.templates`, an input of the stage because they determine
    the texts.
    """
    return hashlib.sha256(b"".join(file.digest for file in _files(pools_path(name)))).hexdigest()


# Reading
# ----------------------------------------------------------------------------------------------


class _File(NamedTuple):
    path: Path
    content: dict[str, Any]  # without `extends`
    digest: bytes  # of the whole file


def _files(path: Path, extending: tuple[Path, ...] = ()) -> list[_File]:
    """The files that `path` extends, then `path`. `extending` are the files that refer to it."""
    if path.resolve() in extending:
        circle = " -> ".join(
            passed.name for passed in (*extending[extending.index(path.resolve()) :], path)
        )
        raise UserError(
            f"{extending[-1]}: extends makes a circle ({circle}): one of these files must extend "
            "none"
        )
    data = path.read_bytes()
    content = parse_yaml(data, path) or {}
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected pools under their names as in "
            f"{FOLDER / 'default.yaml'}"
        )
    name = content.pop("extends", None)
    if name is not None and not (isinstance(name, str) and name):
        raise UserError(
            f"{path}: extends is {name!r}, expected the name of shipped pools or the path of one "
            "file"
        )
    base = (
        _files(pools_path(name, path.parent, f"{path}: extends: "), (*extending, path.resolve()))
        if name
        else []
    )
    return [*base, _File(path, content, hashlib.sha256(data).digest())]


class _Reader:
    """Turns the content of files, each of which extends the previous one, into pools. Errors name
    the entry.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = files
        self.known: set[str] = set()

    def pools(self) -> Pools:
        pools = Pools(
            without={name: self.share(f"without.{name}") for name in OPTIONAL},
            starts=self.pool("documents.starts", template("context")),
            gaps=self.pool("documents.gaps", text),
            separators=self.pool("documents.separators", text),
            bridges=self.pool("documents.bridges", text),
            inverted_openings=self.pool("inverted.openings", text),
            inverted_starts=self.pool("inverted.starts", template("context")),
            pairs={
                kind: self.pool(f"pairs.{kind}", spaced(*fields), by_text, combined)
                for kind, fields in KINDS.items()
            },
            options_headers=self.pool("options.headers", text),
            option_formats=self.pool("options.formats", option_format),
            hints=self.pool("reasoning.hints", template("question")),
            conclusions=self.pool("reasoning.conclusions", template("reasoning", "answer")),
            explanations=self.pool("reasoning.explanations", template("answer", "reasoning")),
            speakers=self.pool("dialogue.speakers", two_names),
            turns=self.pool("dialogue.turns", spaced(("speaker", "turn"), 2)),
            dialogue_openings=self.pool("dialogue.openings", opening),
            numbered=self.pool("numbered", numbered_format),
            inline_few_shot=self.pool("inline_few_shot", examples_format),
            next_turn=self.pool("next_turn", examples_format),
        )
        for file in self.files:
            unknown = sorted(set(_names(file.content)) - self.known)
            if unknown:
                raise UserError(
                    f"{file.path}: unknown pool {unknown[0]}, expected only "
                    f"{', '.join(sorted(self.known))}"
                )
        return pools

    def pool(
        self,
        name: str,
        read: Callable[[Any], T],
        identity: Callable[[T], Hashable] = lambda entry: entry,
        expand: Callable[[Any], Iterable[Any]] = lambda entry: (entry,),
    ) -> tuple[T, ...]:
        """The entries of one pool in all files: `expand` gives what an entry stands for, `read`
        reads each of it.

        No two may have the same `identity`.
        """
        seen: dict[Hashable, str] = {}
        result: list[T] = []
        for file, entries in self.values(name):
            if not isinstance(entries, list) or not entries:
                raise UserError(f"{file.path}: {name} must be a list with at least one entry")
            for index, entry in enumerate(entries):
                place = f"{file.path}: {name}[{index}]"
                for expanded in _at(place, entry, expand):
                    result.append(_at(place, expanded, read))
                    key = identity(result[-1])
                    if key in seen:
                        first = seen[key].removeprefix(f"{file.path}: ")
                        raise UserError(f"{place} {expanded!r} equals {first}: remove one of them")
                    seen[key] = place
        return tuple(result)

    def share(self, name: str) -> float:
        file, value = self.values(name)[-1]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{file.path}: {name} is {value!r}, expected a share between 0 and 1")
        return float(value)

    def values(self, name: str) -> list[tuple[_File, Any]]:
        """The values of `name` in all files. The first file extends none, so it must contain the
        name.
        """
        self.known.add(name)
        found = [
            (file, value)
            for file in self.files
            if (value := _value(file.content, name)) is not _NOTHING
        ]
        if not found or found[0][0] is not self.files[0]:
            raise UserError(
                f"{self.files[0].path}: {name} is missing; add it, or begin the file with "
                "`extends: default`"
            )
        return found


_NOTHING = object()


def _value(content: Any, name: str) -> Any:
    for key in name.split("."):
        if not isinstance(content, dict) or key not in content:
            return _NOTHING
        content = content[key]
    return content


def _at(place: str, entry: Any, read: Callable[[Any], R]) -> R:
    try:
        return read(entry)
    except (ValueError, TypeError) as error:
        raise UserError(f"{place} {entry!r}: {error}") from None


def _names(content: Any, prefix: str = "") -> Iterable[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# Entries: each takes what the file holds, and raises UserError with what is wrong
# ---------------------------------------


def text(entry: Any) -> str:
    if not isinstance(entry, str) or not entry:
        raise UserError("expected a text that is not empty")
    return entry


def template(*fields: str, fixed: int | None = None) -> Callable[[Any], Template]:
    """Reads a template with exactly these fields, once each; the first `fixed` (default: all) in
    this order.
    """
    fixed = len(fields) if fixed is None else fixed

    def read(entry: Any) -> Template:
        result = Template(text(entry))
        if sorted(result.fields) != sorted(fields):
            raise UserError(
                f"has the fields {_braced(result.fields)}, expected {_braced(fields)}, each once"
            )
        if result.fields[:fixed] != fields[:fixed]:
            raise UserError(
                f"has its fields in the order {_braced(result.fields)}, expected "
                f"{_braced(fields[:fixed])} first"
            )
        return result

    return read


def spaced(fields: tuple[str, ...], fixed: int) -> Callable[[Any], Spaced]:
    def read(entry: Any) -> Spaced:
        keys = (
            {"text": entry} if isinstance(entry, str) else _keys(entry, ("text",), ("separator",))
        )
        return Spaced(
            template(*fields, fixed=fixed)(keys["text"]), text(keys.get("separator", "\n\n"))
        )

    return read


def by_text(entry: Spaced) -> Hashable:
    return entry.text


def combined(entry: Any) -> Iterable[Any]:
    """Every question part of `{questions: [...], answers: [...]}` followed by every answer part;
    any other entry stands for itself.
    """
    if not isinstance(entry, dict) or not {"questions", "answers"} & set(entry):
        return (entry,)
    keys = _keys(entry, ("questions", "answers"), ("separator",))
    for name in ("questions", "answers"):
        if (
            not isinstance(keys[name], list)
            or not keys[name]
            or not all(isinstance(part, str) and part for part in keys[name])
        ):
            raise UserError(f"{name} must be a list of texts that are not empty")
    separator = {"separator": keys["separator"]} if "separator" in keys else {}
    return [
        {"text": question + answer, **separator}
        for question, answer in product(keys["questions"], keys["answers"])
    ]


def option_format(entry: Any) -> OptionFormat:
    keys = _keys(entry, ("item", "answer"), ("separator",))
    item, answer = Template(text(keys["item"])), Template(text(keys["answer"]))
    labels = tuple(field for field in item.fields if field in LABELS)
    if sorted(item.fields) != sorted(("option", *labels)) or len(labels) > 1:
        raise UserError(
            f"item has the fields {_braced(item.fields)}, expected {{option}} and at most one of "
            f"{_braced(LABELS)}"
        )
    if answer.fields != (labels or ("option",)):
        raise UserError(
            f"answer has the fields {_braced(answer.fields)}, expected "
            f"{_braced(labels or ('option',))} as its items"
        )
    if answer.source not in item.source:
        raise UserError(
            "answer is not part of item, so a reader would not know which option it means"
        )
    return OptionFormat(item, answer, text(keys.get("separator", "\n")))


def two_names(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, list) or len(entry) != 2 or len(set(entry)) != 2:
        raise UserError("expected two different names: who asks, who answers")
    return text(entry[0]), text(entry[1])


def opening(entry: Any) -> Template:
    result = Template(text(entry))
    if not set(result.fields) <= {"asker", "answerer"}:
        raise UserError(
            f"has the fields {_braced(result.fields)}, expected at most {{asker}} and {{answerer}}"
        )
    return result


def numbered_format(entry: Any) -> NumberedFormat:
    keys = _keys(entry, ("questions", "question", "answers", "answer"), ("separator",))
    question, answer = Template(text(keys["question"])), Template(text(keys["answer"]))
    labels = tuple(field for field in question.fields if field in LABELS)
    if (
        len(labels) != 1
        or question.fields != (*labels, "question")
        or answer.fields != (*labels, "answer")
    ):
        raise UserError(
            f"question and answer must hold the same one of {_braced(LABELS)}, then {{question}} "
            f"or {{answer}}"
        )
    return NumberedFormat(
        _heading(keys["questions"]),
        question,
        _heading(keys["answers"]),
        answer,
        text(keys.get("separator", "\n")),
    )


def examples_format(entry: Any) -> ExamplesFormat:
    keys = _keys(entry, ("opening", "example", "last"), ("separator",))
    read = template("question", "answer")
    return ExamplesFormat(
        _heading(keys["opening"]),
        read(keys["example"]),
        read(keys["last"]),
        text(keys.get("separator", "\n\n")),
    )


def _heading(entry: Any) -> str:
    if not isinstance(entry, str):
        raise UserError('expected a heading, "" for none')
    return entry


def _keys(entry: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(entry, dict) or not set(required) <= set(entry) <= {*required, *optional}:
        raise UserError(f"expected the keys {', '.join(required)}; optional: {', '.join(optional)}")
    return entry


def _braced(names: Iterable[str]) -> str:
    return " ".join(f"{{{name}}}" for name in names) or "none"
