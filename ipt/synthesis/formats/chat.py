"""Any instruction-tuned model as a synthesizer (`synthesis.format=chat`): prompts in the model's
chat template, and the reading of its JSON output (see `prompt_file`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ipt.chat_templates import TemplateFails, render
from ipt.errors import UserError
from ipt.synthesis.formats.base import Message, Prompt, Vocabulary
from ipt.synthesis.formats.json_output import Json, after_reasoning, read_json
from ipt.synthesis.formats.prompt_file import (
    DOCUMENT,
    FIELD,
    ChatPrompt,
    PairTemplate,
    Template,
    load_prompt,
)
from ipt.synthesis.formats.tags import Pair, Parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import SynthesisConfig


class ChatFormat:
    """Conversations in the model's chat template: each document is a turn of the user, followed by
    the model's output.

    Raises UserError if the model has no chat template, or one without multi-turn conversations.
    """

    pair_end = "}"
    grammar: str | None = None

    def __init__(self, vocabulary: Vocabulary, config: "SynthesisConfig") -> None:
        self._prompt = load_prompt(config.prompt)
        self.schema = self._prompt.schema
        self._vocabulary = vocabulary
        tokenizer = vocabulary.tokenizer
        self._frame = _frame(tokenizer, self._prompt, config.chat_template_kwargs)
        self._begin = [_template_ids(tokenizer, text) for text in self._frame.first]
        self._follow = [_template_ids(tokenizer, text) for text in self._frame.later]
        end_of_turn = _end_of_turn(vocabulary, self._follow[0])
        self.stop_ids = list(dict.fromkeys([*end_of_turn, vocabulary.eos]))

    def begin(self, document: str) -> Prompt:
        before, after = self._begin
        ids = [*before, *self._vocabulary.encode_continuation(document), *after]
        return Prompt(ids, (*self._frame.system, self._frame.turn(document)))

    def follow(self, history: Prompt, document: str) -> Prompt:
        before, after = self._follow
        ids = [*history.ids, *before, *self._vocabulary.encode_continuation(document), *after]
        return Prompt(ids, (*history.messages, self._frame.turn(document)))

    def parse(self, output: str) -> Parsed:
        """Pairs and rewrite of an output. From a truncated output the complete list items are used.

        Reasons of rejection: not_json, wrong_shape, truncated, empty_question, empty_answer,
        empty_rewrite, repeated_question.
        """
        return self._read(output)[0]

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        """See `PromptFormat`. The ids of the output are used if all of it was accepted, because the
        engine has them in its prefix cache; otherwise the accepted part is encoded. `follow` adds
        the token that ends the turn.
        """
        accepted = self._read(output)[1]
        ids = output_ids
        if accepted != output or self._vocabulary.special.intersection(output_ids):
            ids = self._vocabulary.encode_continuation(accepted)
        return Prompt([*prompt.ids, *ids], (*prompt.messages, Message("assistant", accepted)))

    def _read(self, output: str) -> tuple[Parsed, str]:
        """The content of an output, and the output without the rejected parts."""
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


# The model's chat template
# ----------------------------------------------------------------------------------------------

# Stand for document and answer in a conversation that shows what the template adds around them.
PLACES = "ipt-first-document", "ipt-first-answer", "ipt-second-document"


class _Frame(NamedTuple):
    """The text around documents in a conversation, and the same as messages."""

    first: tuple[str, str]  # before and after the first document of a conversation
    # before and after a later document; begins with the end of the model's turn
    later: tuple[str, str]
    system: tuple[Message, ...]
    user: tuple[str, str]

    def turn(self, document: str) -> Message:
        return Message("user", self.user[0] + document + self.user[1])


def _frame(
    tokenizer: "PreTrainedTokenizerBase", prompt: ChatPrompt, kwargs: Mapping[str, Any]
) -> _Frame:
    """Derive the frame from the chat template. If the template has no system role, the system text
    becomes part of the user's turn.
    """
    model = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"synthesis.format=chat: the tokenizer of {model} has no chat template: use an "
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
        reason = "it drops or repeats texts"
        places = [first.count(PLACES[0]), *(history.count(place) for place in PLACES)]
        if places == [1, 1, 1, 1] and all(message.content in first for message in system):
            before, _, after = first.partition(PLACES[0])
            between, _, end = history.partition(PLACES[1])[2].partition(PLACES[2])
            head, _, tail = user.partition(DOCUMENT)
            return _Frame((before, after), (between, end), system, (head, tail))
    raise UserError(
        f"synthesis.format=chat: the chat template of {model} cannot render a conversation of user "
        f"and assistant: {reason}"
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    system: tuple[Message, ...],
    user: str,
    turns: int,
    kwargs: Mapping[str, Any],
) -> str:
    """A conversation with one or two documents in the chat template."""
    messages = [*system, Message("user", user.replace(DOCUMENT, PLACES[0]))]
    if turns == 2:
        messages.append(Message("assistant", PLACES[1]))
        messages.append(Message("user", user.replace(DOCUMENT, PLACES[2])))
    return render(tokenizer, [message._asdict() for message in messages], kwargs)


def _template_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a template's text, in which special tokens count as such. See `Vocabulary` for
    the line break.
    """
    anchor, anchored, alone = tokenizer(["\n", "\n" + text, text], add_special_tokens=False)[
        "input_ids"
    ]
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone


def _end_of_turn(vocabulary: Vocabulary, between: Sequence[int]) -> list[int]:
    """The special token that the template puts after the model's output; empty without one."""
    added = vocabulary.tokenizer.added_tokens_decoder
    for token in between:
        if token in vocabulary.special or (token in added and added[token].special):
            return [token]
    return []


# Outputs
# ----------------------------------------------------------------------------------------------


def _read_text(output: str) -> tuple[Parsed, str]:
    """The rewrite in an output without a schema: all of it, except reasoning."""
    answer = after_reasoning(output)
    text = answer.text.strip()
    rejected: Counter[str] = Counter()
    if not text:
        rejected["empty_rewrite" if answer.ended else "truncated"] += 1
    return Parsed([], rejected, text), output if answer.text == output else text


class _Blank(Exception):
    """A field of a question or an answer is empty."""


def fill(template: Template, fields: Mapping[str, Any], required: bool = False) -> str:
    """Insert `fields` into a valid template. Raises KeyError for a missing field and TypeError for
    a field of another type.

    Braces in fields are text. With `required`, an empty field or list raises _Blank.
    """
    if isinstance(template, str):
        return FIELD.sub(lambda match: _field_text(fields[match[1]], required), template)
    if isinstance(template, list):
        return "".join(fill(part, fields, required) for part in template)
    items = fields[template["each"]]
    if not isinstance(items, list):
        raise TypeError(f"{template['each']} is not a list")
    if required and not items:
        raise _Blank
    return template.get("join", "").join(
        fill(template["text"], _with_item(fields, item), required) for item in items
    )


def _field_text(value: Any, required: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is not a text")
    text = _encodable(str(value).strip())
    if required and not text:
        raise _Blank
    return text


def _encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON can contain but UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _with_item(fields: Mapping[str, Any], item: Any) -> dict[str, Any]:
    return {**fields, **(item if isinstance(item, dict) else {"item": item})}


def _read_pairs(
    templates: Sequence[PairTemplate], found: Json, rejected: Counter[str]
) -> list[Pair]:
    """The pairs. Rejected items are counted and removed from the lists in `found.value`."""
    output = Json(dict(found.value), found.whole)  # unchanged, for the other templates
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
    """The items that become pairs: those of a list, or the output itself if it is complete."""
    if template.each is None:
        return [{}] if found.whole else []
    items = found.value.get(template.each)
    if isinstance(items, list):
        return items
    if found.whole:  # a truncated output may lack it
        rejected["wrong_shape"] += 1
    return []


def _read_pair(template: PairTemplate, fields: Mapping[str, Any]) -> Pair | str:
    """The pair, or the reason of its rejection."""
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
        if found.whole:  # a truncated output may lack it
            rejected["wrong_shape"] += 1
        return ""
    if not text:
        rejected["empty_rewrite"] += 1
    return text
