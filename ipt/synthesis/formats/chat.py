"""Any instruction-tuned model as a synthesizer (`synthesis.format=chat`): prompt files, and their
prompts through a model's chat template.

A prompt file says in plain data what the model is told, which JSON it has to write, and how pairs
or a rewritten text come out of that. Nothing in a file and nothing that a model says is ever run.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipt.chat_templates import TemplateFails, render
from ipt.errors import MissingFileError, UserError
from ipt.files import parse_yaml
from ipt.synthesis.formats.base import Message, Prompt, Vocabulary
from ipt.synthesis.formats.json_output import Json, after_reasoning, read_json
from ipt.synthesis.formats.tags import Pair, Parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import SynthesisConfig

SHIPPED = Path(__file__).parent / "chat_prompts"
DOCUMENT = "{document}"
KEYS = ("description", "language", "system", "user", "schema", "pairs", "rewrite")
FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
# A text, into which {fields} are put; several templates one after the other; or {each: LIST, text:
# TEMPLATE, join: TEXT}.
Template = str | list[Any] | dict[str, Any]


class PairTemplate(NamedTuple):
    """How a pair is made of the output, or of each item of one of its lists."""

    question: Template
    answer: Template
    each: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A checked prompt file."""

    user: str  # holds {document} once
    system: str = ""
    schema: dict[str, Any] | None = (
        None  # without it the output is free text, and the whole of it the rewrite
    )
    pairs: tuple[PairTemplate, ...] = ()
    rewrite: Template | None = None
    description: str = ""
    language: str = ""


class ChatFormat:
    """Conversations in the model's own chat template: a turn with each document, and the model's
    answer to it before the next one.

    Raises UserError if the model has no chat template, or one that shows no conversation.
    """

    pair_end = "}"
    grammar: str | None = None

    def __init__(self, vocabulary: Vocabulary, config: "SynthesisConfig") -> None:
        self._prompt = load_prompt(config.prompt)
        self.schema = self._prompt.schema
        self._vocabulary = vocabulary
        self._frame = frame = _frame(
            vocabulary.tokenizer, self._prompt, config.chat_template_kwargs
        )
        self._begin = [_template_ids(vocabulary.tokenizer, text) for text in frame.first]
        self._follow = [_template_ids(vocabulary.tokenizer, text) for text in frame.later]
        self.stop_ids = list(
            dict.fromkeys([*_end_of_turn(vocabulary, self._follow[0]), vocabulary.eos])
        )

    def begin(self, document: str) -> Prompt:
        before, behind = self._begin
        ids = [*before, *self._vocabulary.encode_continuation(document), *behind]
        return Prompt(ids, (*self._frame.system, self._frame.turn(document)))

    def follow(self, history: Prompt, document: str) -> Prompt:
        before, behind = self._follow
        ids = [*history.ids, *before, *self._vocabulary.encode_continuation(document), *behind]
        return Prompt(ids, (*history.messages, self._frame.turn(document)))

    def parse(self, output: str) -> Parsed:
        """Pairs and rewrite of an output; one that was cut gives those of its items that are
        complete.

        What is left out is counted: not_json, wrong_shape, truncated, empty_question, empty_answer,
        empty_rewrite, repeated_question.
        """
        return self._read(output)[0]

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        """The output's own ids where all of it was accepted, so that the engine finds them in its
        prefix cache.

        Otherwise what was accepted is encoded anew. The token that ends the turn is left to
        `follow`, which has it from the template.
        """
        accepted = self._read(output)[1]
        ids = output_ids
        if accepted != output or self._vocabulary.special.intersection(output_ids):
            ids = self._vocabulary.encode_continuation(accepted)
        return Prompt([*prompt.ids, *ids], (*prompt.messages, Message("assistant", accepted)))

    def _read(self, output: str) -> tuple[Parsed, str]:
        """What is in the output, and the output without what was rejected."""
        if self.schema is None:
            return _read_text(output)
        found = read_json(output, self.schema)
        rejected = Counter([found.reason] if found.reason else [])
        if found.reason == "not_json":
            return Parsed([], rejected), ""
        pairs = _read_pairs(self._prompt.pairs, found, rejected)
        rewrite = _read_rewrite(self._prompt.rewrite, found, rejected)
        parsed = Parsed(pairs, rejected, rewrite)
        if found.whole and not rejected and after_reasoning(output).text == output:
            return parsed, output
        return parsed, _encodable(json.dumps(found.value, ensure_ascii=False))


# Prompt files
# ----------------------------------------------------------------------------------------------


def prompt_path(name: str) -> Path:
    """The file of a prompt: `name` is a shipped one, or the path of a .yaml file. Raises a one-line
    error if there is none.
    """
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise MissingFileError(f"synthesis.prompt={name}: there is no such file")
        return Path(name)
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise UserError(
            f"synthesis.prompt={name}: must be one of {shipped}, or the path of a .yaml file"
        )
    return path


def load_prompt(name: str) -> ChatPrompt:
    """Read and check the prompt `name`. Raises UserError, one line that names file and key, for one
    that cannot work.
    """
    path = prompt_path(name)
    try:
        return _checked(parse_yaml(path.read_bytes(), path))
    except _Mistake as mistake:
        raise UserError(f"{path}: {mistake}") from None


class _Mistake(Exception):
    """In a prompt file."""


def _checked(content: Any) -> ChatPrompt:
    if not isinstance(content, dict):
        raise _Mistake(f"expected the keys {', '.join(KEYS)}, found {type(content).__name__}")
    for key in content:
        if key not in KEYS:
            raise _Mistake(f"{key}: no such key, expected some of {', '.join(KEYS)}")
    texts = {key: content.get(key, "") for key in ("description", "language", "system", "user")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise _Mistake(f"{key}: expected a text, found {text!r}")
    if texts["user"].count(DOCUMENT) != 1 or DOCUMENT in texts["system"]:
        raise _Mistake(f"{DOCUMENT} must stand once in user, and not in system")
    schema, pairs, rewrite = content.get("schema"), content.get("pairs", []), content.get("rewrite")
    if schema is None:
        if pairs != [] or rewrite is not None:
            raise _Mistake(
                "pairs and rewrite are made of fields of the output: give it a schema (without one "
                "the whole output is the rewrite)"
            )
    else:
        fields = _properties(schema, "schema")
        if not isinstance(pairs, list) or not (pairs or rewrite):
            raise _Mistake("say what becomes of the output: pairs (a list), rewrite, or both")
        pairs = [
            _checked_pair(pair, fields, f"pairs[{number}]") for number, pair in enumerate(pairs)
        ]
        if rewrite is not None:
            _check_template(rewrite, fields, "rewrite")
    return ChatPrompt(
        schema=schema,
        pairs=tuple(pairs),
        rewrite=rewrite,
        **{key: text.strip() for key, text in texts.items()},
    )


def _checked_pair(pair: Any, fields: Mapping[str, Any], where: str) -> PairTemplate:
    if not isinstance(pair, dict) or not {"question", "answer"} <= set(pair) <= {
        "question",
        "answer",
        "each",
    }:
        raise _Mistake(
            f"{where}: expected question and answer, and each where there is one pair for each "
            "item of a list"
        )
    if "each" in pair:
        fields = _fields_of_items(pair["each"], fields, f"{where}.each")
    for key in ("question", "answer"):
        _check_template(pair[key], fields, f"{where}.{key}")
    return PairTemplate(**pair)


def _check_template(template: Any, fields: Mapping[str, Any], where: str) -> None:
    """`fields`: the schemas of what may stand in braces."""
    if isinstance(template, str):
        for name in FIELD.findall(template):
            if name not in fields:
                raise _Mistake(
                    f"{where}: {{{name}}} is no field here, there are {', '.join(fields)}"
                )
            if fields[name].get("type") in ("array", "object"):
                raise _Mistake(
                    f"{where}: {{{name}}} is no text: write {{each: {name}, text: …, join: …}} for "
                    "a list"
                )
    elif isinstance(template, list):
        for part in template:
            _check_template(part, fields, where)
    elif isinstance(template, dict) and {"each", "text"} <= set(template) <= {
        "each",
        "text",
        "join",
    }:
        if not isinstance(template.get("join", ""), str):
            raise _Mistake(f"{where}: join must be a text")
        _check_template(template["text"], _fields_of_items(template["each"], fields, where), where)
    else:
        raise _Mistake(
            f"{where}: expected a text, a list of parts, or each, text and join, found {template!r}"
        )


def _fields_of_items(name: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What may stand in braces where `name`, a list, is gone through: the fields of its items, or
    {item}.
    """
    field = fields.get(name) if isinstance(name, str) else None
    if field is None or field.get("type") != "array" or not isinstance(field.get("items"), dict):
        raise _Mistake(
            f"{where}: {name} must be a list of the output: a field of type array, with items, in "
            "the schema"
        )
    items = field["items"]
    return {
        **fields,
        **(
            _properties(items, f"schema, items of {name}")
            if items.get("type") == "object"
            else {"item": items}
        ),
    }


def _properties(schema: Any, where: str) -> dict[str, Any]:
    properties = (
        schema.get("properties")
        if isinstance(schema, dict) and schema.get("type") == "object"
        else None
    )
    if not isinstance(properties, dict) or not all(
        isinstance(field, dict) for field in properties.values()
    ):
        raise _Mistake(f"{where}: expected type: object with properties")
    return properties


# The model's chat template
# ----------------------------------------------------------------------------------------------

# Put in place of document and answer where the template is asked for what it writes around them.
PLACES = "ipt-first-document", "ipt-first-answer", "ipt-second-document"


class _Frame(NamedTuple):
    """What stands around documents: as text, and as messages."""

    first: tuple[str, str]  # before and behind the first document of a conversation
    later: tuple[str, str]  # before and behind a later one; begins with the end of the model's turn
    system: tuple[Message, ...]
    user: tuple[str, str]

    def turn(self, document: str) -> Message:
        return Message("user", self.user[0] + document + self.user[1])


def _frame(
    tokenizer: "PreTrainedTokenizerBase", prompt: ChatPrompt, kwargs: Mapping[str, Any]
) -> _Frame:
    """Ask the chat template. The system text goes into the user's turn where the template has no
    place for it.
    """
    model = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"synthesis.format=chat: the tokenizer of {model} has no chat template: take an "
            "instruction-tuned model"
        )
    merged = "\n\n".join(text for text in (prompt.system, prompt.user) if text)
    for system, user in (((Message("system", prompt.system),), prompt.user), ((), merged)):
        if system and not prompt.system:
            continue
        try:
            first, history = (_render(tokenizer, system, user, turns, kwargs) for turns in (1, 2))
        except TemplateFails as error:
            reason = error.reason
            continue
        reason = "it leaves texts out or writes them twice"
        places = [first.count(PLACES[0]), *(history.count(place) for place in PLACES)]
        if places == [1, 1, 1, 1] and all(message.content in first for message in system):
            before, _, behind = first.partition(PLACES[0])
            between, _, end = history.partition(PLACES[1])[2].partition(PLACES[2])
            head, _, tail = user.partition(DOCUMENT)
            return _Frame((before, behind), (between, end), system, (head, tail))
    raise UserError(
        f"synthesis.format=chat: the chat template of {model} cannot show a conversation of user "
        f"and assistant: {reason}"
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    system: tuple[Message, ...],
    user: str,
    turns: int,
    kwargs: Mapping[str, Any],
) -> str:
    contents = user.replace(DOCUMENT, PLACES[0]), PLACES[1], user.replace(DOCUMENT, PLACES[2])
    turn = [
        Message("assistant" if number % 2 else "user", content)
        for number, content in enumerate(contents)
    ]
    return render(
        tokenizer, [message._asdict() for message in (*system, *turn[: 2 * turns - 1])], kwargs
    )


def _template_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of what a template writes: special tokens that it spells out are such. See
    `Vocabulary` for the line break.
    """
    anchor, anchored, alone = tokenizer(["\n", "\n" + text, text], add_special_tokens=False)[
        "input_ids"
    ]
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone


def _end_of_turn(vocabulary: Vocabulary, between: Sequence[int]) -> list[int]:
    """The special token that the template puts behind the model's answer; empty if there is none."""
    added = {
        token
        for token, content in vocabulary.tokenizer.added_tokens_decoder.items()
        if content.special
    }
    return [token for token in between if token in added | vocabulary.special][:1]


# Outputs
# ----------------------------------------------------------------------------------------------


def _read_text(output: str) -> tuple[Parsed, str]:
    """The rewrite that an output without a schema is; reasoning before it is no part of it."""
    answer = after_reasoning(output)
    text = answer.text.strip()
    rejected: Counter[str] = Counter()
    if not text:
        rejected["empty_rewrite" if answer.ended else "truncated"] += 1
    return Parsed([], rejected, text), output if answer.text == output else text


class _Blank(Exception):
    """A field of a question or an answer says nothing."""


def fill(template: Template, fields: Mapping[str, Any], required: bool = False) -> str:
    """Put `fields` into a checked template. Raises KeyError or TypeError for one that is missing or
    of another shape.

    Braces in a field stay as they are. With `required`, a field that is blank and a list without
    items raise _Blank.
    """
    if isinstance(template, str):
        return FIELD.sub(lambda match: _field_text(fields[match[1]], required), template)
    if isinstance(template, list):
        return "".join(fill(part, fields, required) for part in template)
    items = fields[template["each"]]
    if not isinstance(items, list):
        raise TypeError(f"{template['each']} is no list")
    if required and not items:
        raise _Blank
    return template.get("join", "").join(
        fill(template["text"], _with_item(fields, item), required) for item in items
    )


def _field_text(value: Any, required: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is no text")
    text = _encodable(str(value).strip())
    if required and not text:
        raise _Blank
    return text


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell, is no text that a tokenizer or a file could
    take.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _with_item(fields: Mapping[str, Any], item: Any) -> dict[str, Any]:
    return {**fields, **(item if isinstance(item, dict) else {"item": item})}


def _read_pairs(
    templates: Sequence[PairTemplate], found: Json, rejected: Counter[str]
) -> list[Pair]:
    """The pairs; what is rejected is counted, and taken out of `found.value` where it is an item of
    a list.
    """
    output = Json(dict(found.value), found.whole)  # as it was, for further templates
    pairs: list[Pair] = []
    seen: set[str] = set()
    for template in templates:
        accepted = []
        for item in _items(template, output, rejected):
            read = _read_pair(template, _with_item(output.value, item))
            if isinstance(read, Pair) and read.question.lower() in seen:
                read = "repeated_question"
            if isinstance(read, str):
                rejected[read] += 1
            else:
                seen.add(read.question.lower())
                pairs.append(read)
                accepted.append(item)
        if template.each is not None and isinstance(found.value.get(template.each), list):
            found.value[template.each] = accepted
    return pairs


def _items(template: PairTemplate, found: Json, rejected: Counter[str]) -> list[Any]:
    """What each of which gives a pair: the items of a list, or the whole output as long as that is
    whole.
    """
    if template.each is None:
        return [{}] if found.whole else []
    items = found.value.get(template.each)
    if isinstance(items, list):
        return items
    if found.whole:  # of an unfinished output it is yet to come
        rejected["wrong_shape"] += 1
    return []


def _read_pair(template: PairTemplate, fields: Mapping[str, Any]) -> Pair | str:
    """The pair, or why there is none."""
    reason = "empty_question"
    try:
        question = fill(template.question, fields, required=True)
        reason = "empty_answer"
        return Pair(question.strip(), fill(template.answer, fields, required=True).strip())
    except _Blank:
        return reason
    except (KeyError, TypeError):
        return "wrong_shape"


def _read_rewrite(template: Template | None, found: Json, rejected: Counter[str]) -> str:
    if template is None:
        return ""
    try:
        text = fill(template, found.value).strip()
    except (KeyError, TypeError):
        if found.whole:  # of an unfinished output it is yet to come
            rejected["wrong_shape"] += 1
        return ""
    if not text:
        rejected["empty_rewrite"] += 1
    return text
