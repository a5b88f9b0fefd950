"""Command-line arguments as people type them, quoted where Hydra's grammar would reject or change a
value.

`corpus.path=data/year=2024/ä.jsonl` becomes `corpus.path='data/year=2024/ä.jsonl'`. What Hydra
understands keeps its meaning: lists, dictionaries, sweeps, interpolations, quoted values, and the
prefixes + and ~.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException

OVERRIDE = re.compile(r"(\+{0,2}[^\W\d][\w./@:-]*)=(.*)", re.DOTALL)
MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
)
# what Hydra lets people write for a character of its grammar
ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")
CLOSING = {"(": ")", "[": "]", "{": "}"}


def plain_arguments(arguments: Sequence[str], schema: Any) -> list[str]:
    """The arguments, with values quoted where that is needed for Hydra to take them as typed.

    `schema` is the dataclass of the config. For its keys with the metadata `plain` a value is a
    text whatever it looks like (`1e3`, `a,b`, `[a]`), apart from null and, with -m, from sweeps.
    Other values are quoted only if Hydra cannot parse them.
    """
    sweeps = any(argument in MULTIRUN for argument in arguments)
    result: list[str] = []
    is_value = False
    for argument in arguments:
        result.append(argument if is_value else _plain_argument(argument, schema, sweeps))
        is_value = argument in WITH_VALUE
    return result


def _plain_argument(argument: str, schema: Any, sweeps: bool) -> str:
    found = OVERRIDE.fullmatch(argument)
    if found is None:
        return argument
    is_plain = bool(_metadata(schema, found[1].lstrip("+")).get("plain"))
    return f"{found[1]}={_plain_value(found[2], is_plain, sweeps)}"


def _metadata(schema: Any, key: str) -> dict[str, Any]:
    """The metadata of a key of the config; {} for other keys."""
    name, _, rest = key.partition(".")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(schema)}
    if name not in known:
        return {}
    field = known[name]
    if not rest:
        return dict(field.metadata)
    if "values" in field.metadata:
        return _metadata(field.metadata["values"], rest.partition(".")[2])
    nested = field.type
    return _metadata(nested, rest) if hasattr(nested, "__dataclass_fields__") else {}


def _plain_value(value: str, is_plain: bool, sweeps: bool) -> str:
    parsed = _parsed(value)
    if parsed is not None:
        return (
            value
            if _is_meant(parsed, value, is_plain, sweeps)
            else _quoted(value, is_plain, sweeps)
        )
    inside = re.fullmatch(r"\[(.*)\]", value, re.DOTALL)
    if inside and not is_plain:
        entries = ",".join(_plain_value(entry.strip(), True, False) for entry in _split(inside[1]))
        return f"[{entries}]" if _parsed(f"[{entries}]") is not None else _quote(value)
    return _quoted(value, is_plain, sweeps)


def _is_meant(parsed: Override, value: str, is_plain: bool, sweeps: bool) -> bool:
    """Whether what Hydra reads is what was typed, or what only a user of Hydra's grammar types."""
    found = parsed._value
    if not is_plain or found is None or isinstance(found, QuotedString):
        return True
    if isinstance(found, ChoiceSweep) and found.simple_form:  # a,b
        return sweeps and all(_is_text(entry) for entry in found.list)
    if isinstance(found, Sweep):  # choice(a,b)
        return True
    return isinstance(found, str) and (
        found == value or "${" in value or ESCAPED.search(value) is not None
    )


def _is_text(entry: Any) -> bool:
    return entry is None or isinstance(entry, str | QuotedString)


def _quoted(value: str, is_plain: bool, sweeps: bool) -> str:
    """The value in quotes; of a sweep each of its values."""
    call = re.fullmatch(r"(choice)\((.*)\)", value, re.DOTALL)
    if sweeps and call:
        return f"choice({_each(call[2], is_plain)})"
    if sweeps and len(list(_split(value))) > 1:
        return _each(value, is_plain)
    return _quote(value)


def _each(values: str, is_plain: bool) -> str:
    return ",".join(_plain_value(value.strip(), is_plain, sweeps=False) for value in _split(values))


def _quote(value: str) -> str:
    return str(QuotedString(value, Quote.single).with_quotes())


def _parsed(value: str) -> Override | None:
    """How Hydra reads a value; None if it does not."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except (HydraException, ValueError, RecursionError):
        # numbers of too many digits, brackets nested too deep
        return None


def _split(values: str) -> Iterator[str]:
    """The parts between commas that are in no quotes and no brackets."""
    start, quote = 0, ""
    open_brackets: list[str] = []
    for place, character in enumerate(values):
        if quote:
            quote = "" if character == quote and values[place - 1] != "\\" else quote
        elif character in "'\"" and values[start:place].strip() == "":
            quote = character
        elif character in CLOSING:
            open_brackets.append(CLOSING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character == "," and not open_brackets:
            yield values[start:place]
            start = place + 1
    yield values[start:]
