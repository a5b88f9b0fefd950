"""Prompt files of `synthesis.format=chat`: YAML with the instructions to the model, the JSON schema
of its output, and templates that build pairs or a rewritten text from that output.

Nothing in a prompt file and nothing that a model writes is executed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ipt.errors import MissingFileError, UserError
from ipt.files import parse_yaml

SHIPPED = Path(__file__).parent / "chat_prompts"
DOCUMENT = "{document}"
TEXT_KEYS = ("description", "language", "system", "user")
KEYS = (*TEXT_KEYS, "schema", "pairs", "rewrite")
FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
# A text with {fields}; a list of templates, which are joined; or {each: LIST, text: TEMPLATE, join:
# TEXT}, with the template for each item of a list.
Template = str | list[Any] | dict[str, Any]


class PairTemplate(NamedTuple):
    """How the output, or each item of its list `each`, becomes a pair."""

    question: Template
    answer: Template
    each: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A valid prompt file."""

    user: str  # contains {document} once
    system: str = ""
    # None: the output is free text, and all of it is the rewrite
    schema: dict[str, Any] | None = None
    pairs: tuple[PairTemplate, ...] = ()
    rewrite: Template | None = None
    description: str = ""
    language: str = ""


def prompt_path(name: str) -> Path:
    """The file of a prompt: `name` is a shipped prompt or the path of a .yaml file. Raises
    UserError if there is none.
    """
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise MissingFileError(f"synthesis.prompt={name}: no such file")
        return Path(name)
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise UserError(
            f"synthesis.prompt={name}: must be one of {shipped}, or the path of a .yaml file"
        )
    return path


def load_prompt(name: str) -> ChatPrompt:
    """Read and check the prompt `name`. Raises UserError with file and key for an invalid one."""
    path = prompt_path(name)
    try:
        return _checked(parse_yaml(path.read_bytes(), path))
    except _Mistake as mistake:
        raise UserError(f"{path}: {mistake}") from None


class _Mistake(Exception):
    """In a prompt file."""


def _checked(content: Any) -> ChatPrompt:
    keys = ", ".join(KEYS)
    if not isinstance(content, dict):
        raise _Mistake(f"expected the keys {keys}, found {type(content).__name__}")
    for key in content:
        if key not in KEYS:
            raise _Mistake(f"{key}: no such key, expected some of {keys}")
    texts: dict[str, Any] = {}
    for key in TEXT_KEYS:
        text = content.get(key, "")
        if not isinstance(text, str):
            raise _Mistake(f"{key}: expected a text, found {text!r}")
        texts[key] = text.strip()
    if texts["user"].count(DOCUMENT) != 1 or DOCUMENT in texts["system"]:
        raise _Mistake(f"{DOCUMENT} must occur once in user, and not in system")
    schema, pairs, rewrite = content.get("schema"), content.get("pairs", []), content.get("rewrite")
    if schema is None:
        if pairs != [] or rewrite is not None:
            raise _Mistake("pairs and rewrite need a schema of the output: add one or remove them")
        return ChatPrompt(**texts)
    fields = _properties(schema, "schema")
    if not isinstance(pairs, list) or not (pairs or rewrite):
        raise _Mistake("expected pairs (a list), rewrite, or both")
    templates = []
    for number, pair in enumerate(pairs):
        templates.append(_checked_pair(pair, fields, f"pairs[{number}]"))
    if rewrite is not None:
        _check_template(rewrite, fields, "rewrite")
    return ChatPrompt(schema=schema, pairs=tuple(templates), rewrite=rewrite, **texts)


def _checked_pair(pair: Any, fields: Mapping[str, Any], where: str) -> PairTemplate:
    if not _has_keys(pair, required={"question", "answer"}, optional="each"):
        raise _Mistake(f"{where}: expected question, answer, and optionally each (a list)")
    if "each" in pair:
        fields = _fields_of_items(pair["each"], fields, f"{where}.each")
    for key in ("question", "answer"):
        _check_template(pair[key], fields, f"{where}.{key}")
    return PairTemplate(**pair)


def _check_template(template: Any, fields: Mapping[str, Any], where: str) -> None:
    """`fields` are the schemas of the available fields."""
    if isinstance(template, str):
        for name in FIELD.findall(template):
            if name not in fields:
                raise _Mistake(
                    f"{where}: no field {{{name}}}, expected some of {', '.join(fields)}"
                )
            if fields[name].get("type") in ("array", "object"):
                raise _Mistake(
                    f"{where}: {{{name}}} is not a text: write {{each: {name}, text: …, join: …}} "
                    "for a list"
                )
    elif isinstance(template, list):
        for part in template:
            _check_template(part, fields, where)
    elif _has_keys(template, required={"each", "text"}, optional="join"):
        if not isinstance(template.get("join", ""), str):
            raise _Mistake(f"{where}: join must be a text")
        _check_template(template["text"], _fields_of_items(template["each"], fields, where), where)
    else:
        raise _Mistake(
            f"{where}: expected a text, a list of parts, or each, text and join, found {template!r}"
        )


def _has_keys(value: Any, required: set[str], optional: str) -> bool:
    return isinstance(value, dict) and required <= set(value) <= required | {optional}


def _fields_of_items(name: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The available fields for each item of the list `name`: also the fields of the item, or
    {item}.
    """
    field = fields.get(name) if isinstance(name, str) else None
    if field is None or field.get("type") != "array" or not isinstance(field.get("items"), dict):
        raise _Mistake(
            f"{where}: {name} must be a list of the output: type array, with items, in the schema"
        )
    items = field["items"]
    if items.get("type") != "object":
        return {**fields, "item": items}
    return {**fields, **_properties(items, f"schema, items of {name}")}


def _properties(schema: Any, where: str) -> dict[str, Any]:
    is_object = isinstance(schema, dict) and schema.get("type") == "object"
    properties = schema.get("properties") if is_object else None
    if not isinstance(properties, dict) or not all(
        isinstance(field, dict) for field in properties.values()
    ):
        raise _Mistake(f"{where}: expected type: object with properties")
    return properties
