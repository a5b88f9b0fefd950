"""Template pools: the sentences and formats that rendering chooses from, read from a data file and checked as a whole.

`templates/*.yaml` are shipped; a user's own file has the same keys (docs/rendering.md).
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

import yaml

FOLDER = Path(__file__).parent / "templates"
OPTIONAL = ("document_start", "bridge", "inverted_opening", "dialogue_opening", "options_header", "hint")
LABELS = ("letter", "LETTER", "number", "roman", "ROMAN")
KINDS: dict[str, tuple[tuple[str, ...], int]] = {  # kind of pair -> fields of its templates, how many of them have a fixed place
    "plain": (("question", "answer"), 2),
    "options": (("question", "options", "answer"), 3),
    "reasoning": (("question", "reasoning", "answer"), 1),
    "options_reasoning": (("question", "options", "reasoning", "answer"), 2),
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times faster, where libyaml is there
_STOPS = (".", "。")
_ENDINGS = (".", "!", "?", "…", "。", "！", "？")
_CLOSING = "\"'”’»)]*"

T = TypeVar("T", bound=Hashable)


class Template:
    """Text with named fields in braces, taken apart once.

    `fill` puts each value in as it is, so braces and format characters in values mean nothing. A full stop right after a
    field is left out where the field's value already ends a sentence.
    """

    __slots__ = ("_pieces", "fields", "source")

    def __init__(self, source: str) -> None:
        """Raises ValueError if a brace is open or a field is more than a name."""
        pieces: list[tuple[str, bool, str]] = []
        after_field = False
        for literal, field, specification, conversion in Formatter().parse(source):
            if field is not None and (not field.isidentifier() or specification or conversion):
                raise ValueError(f"field {{{field}}} is not a plain name (a literal brace is doubled)")
            pieces.append((literal, after_field and literal.startswith(_STOPS), field or ""))
            after_field = field is not None
        self.source = source
        self.fields = tuple(field for _, _, field in pieces if field)
        self._pieces = pieces

    def fill(self, **values: str) -> str:
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
    """A template that is repeated, and what stands between two of it."""

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
    """Everything a text is put together from. Pools are never empty and hold no two equal entries."""

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
    """The pools that are shipped as `name`, or those in the file `name`.

    Raises FileNotFoundError if there is no such file, ValueError naming file and entry if one is not as it must be.
    """
    path = pools_path(name)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file in UTF-8: {' '.join(str(error).split())}") from None
    return _Reader(path, content).pools()


def pools_path(name: str) -> Path:
    """The file behind `rendering.templates`; raises FileNotFoundError if there is none."""
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"rendering.templates={name}: no such file, and not among the shipped pools ({', '.join(shipped)})")
    return path


def pools_digest(name: str) -> str:
    """SHA-256 of the file behind `rendering.templates`: an input of the stage, since its content decides the texts."""
    return hashlib.sha256(pools_path(name).read_bytes()).hexdigest()


# Reading -------------------------------------------------------------------------------------------------------------


class _Reader:
    """Turns the content of one file into pools and names the entry where something is wrong."""

    def __init__(self, path: Path, content: Any) -> None:
        self.path, self.content = path, content
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
            pairs={kind: self.pool(f"pairs.{kind}", spaced(*fields), by_text) for kind, fields in KINDS.items()},
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
        unknown = sorted(set(_names(self.content)) - self.known)
        if unknown:
            raise ValueError(f"{self.path}: unknown pool {unknown[0]}, expected only {', '.join(sorted(self.known))}")
        return pools

    def pool(self, name: str, read: Callable[[Any], T], identity: Callable[[T], Hashable] = lambda entry: entry) -> tuple[T, ...]:
        """The entries of one pool, each read by `read`; no two may have the same `identity`."""
        entries = self.get(name)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path}: {name} must be a list with at least one entry")
        seen: dict[Hashable, int] = {}
        result = []
        for index, entry in enumerate(entries):
            try:
                result.append(read(entry))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}: {name}[{index}] {entry!r}: {error}") from None
            first = seen.setdefault(identity(result[-1]), index)
            if first != index:
                raise ValueError(f"{self.path}: {name}[{index}] {entry!r} equals {name}[{first}]: remove one of them")
        return tuple(result)

    def share(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{self.path}: {name} is {value!r}, expected a share between 0 and 1")
        return float(value)

    def get(self, name: str) -> Any:
        self.known.add(name)
        value = self.content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{self.path}: {name} is missing; copy what you do not change from {FOLDER / 'default.yaml'}")
            value = value[key]
        return value


def _names(content: Any, prefix: str = "") -> Iterable[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# Entries: each takes what the file holds, and raises ValueError with what is wrong ---------------------------------------


def text(entry: Any) -> str:
    if not isinstance(entry, str) or not entry:
        raise ValueError("expected a text that is not empty")
    return entry


def template(*fields: str, fixed: int | None = None) -> Callable[[Any], Template]:
    """Reads a template with exactly these fields, once each; the first `fixed` (default: all) in this order."""
    fixed = len(fields) if fixed is None else fixed

    def read(entry: Any) -> Template:
        result = Template(text(entry))
        if sorted(result.fields) != sorted(fields):
            raise ValueError(f"has the fields {_braced(result.fields)}, expected {_braced(fields)}, each once")
        if result.fields[:fixed] != fields[:fixed]:
            raise ValueError(f"has its fields in the order {_braced(result.fields)}, expected {_braced(fields[:fixed])} first")
        return result

    return read


def spaced(fields: tuple[str, ...], fixed: int) -> Callable[[Any], Spaced]:
    def read(entry: Any) -> Spaced:
        keys = {"text": entry} if isinstance(entry, str) else _keys(entry, ("text",), ("separator",))
        return Spaced(template(*fields, fixed=fixed)(keys["text"]), text(keys.get("separator", "\n\n")))

    return read


def by_text(entry: Spaced) -> Hashable:
    return entry.text


def option_format(entry: Any) -> OptionFormat:
    keys = _keys(entry, ("item", "answer"), ("separator",))
    item, answer = Template(text(keys["item"])), Template(text(keys["answer"]))
    labels = tuple(field for field in item.fields if field in LABELS)
    if sorted(item.fields) != sorted(("option", *labels)) or len(labels) > 1:
        raise ValueError(f"item has the fields {_braced(item.fields)}, expected {{option}} and at most one of {_braced(LABELS)}")
    if answer.fields != (labels or ("option",)):
        raise ValueError(f"answer has the fields {_braced(answer.fields)}, expected {_braced(labels or ('option',))} as its items")
    if answer.source not in item.source:
        raise ValueError("answer is not part of item, so a reader would not know which option it means")
    return OptionFormat(item, answer, text(keys.get("separator", "\n")))


def two_names(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, list) or len(entry) != 2 or len(set(entry)) != 2:
        raise ValueError("expected two different names: who asks, who answers")
    return text(entry[0]), text(entry[1])


def opening(entry: Any) -> Template:
    result = Template(text(entry))
    if not set(result.fields) <= {"asker", "answerer"}:
        raise ValueError(f"has the fields {_braced(result.fields)}, expected at most {{asker}} and {{answerer}}")
    return result


def numbered_format(entry: Any) -> NumberedFormat:
    keys = _keys(entry, ("questions", "question", "answers", "answer"), ("separator",))
    question, answer = Template(text(keys["question"])), Template(text(keys["answer"]))
    labels = tuple(field for field in question.fields if field in LABELS)
    if len(labels) != 1 or question.fields != (*labels, "question") or answer.fields != (*labels, "answer"):
        raise ValueError(f"question and answer must hold the same one of {_braced(LABELS)}, then {{question}} or {{answer}}")
    return NumberedFormat(_heading(keys["questions"]), question, _heading(keys["answers"]), answer, text(keys.get("separator", "\n")))


def examples_format(entry: Any) -> ExamplesFormat:
    keys = _keys(entry, ("opening", "example", "last"), ("separator",))
    read = template("question", "answer")
    return ExamplesFormat(_heading(keys["opening"]), read(keys["example"]), read(keys["last"]), text(keys.get("separator", "\n\n")))


def _heading(entry: Any) -> str:
    if not isinstance(entry, str):
        raise ValueError('expected a heading, "" for none')
    return entry


def _keys(entry: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(entry, dict) or not set(required) <= set(entry) <= {*required, *optional}:
        raise ValueError(f"expected the keys {', '.join(required)}; optional: {', '.join(optional)}")
    return entry


def _braced(names: Iterable[str]) -> str:
    return " ".join(f"{{{name}}}" for name in names) or "none"
