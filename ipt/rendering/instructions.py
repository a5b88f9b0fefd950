"""General instruction data: turns rows of common schemas into texts to train on.

An instruction and its response are joined by one space, as the cards of the published domain models
do (paper section 8); so are the turns of a longer conversation. System prompts are dropped, because
this format has no place for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ipt.corpus.documents import LeftOut
from ipt.errors import UserError

NO_RESPONSE = "an instruction without a response"
NO_INSTRUCTION = "a response without an instruction"
BLANK_TURN = "a conversation with a turn without text"
NO_TEXT = "an instruction or a response is not a string"

# What the columns of published data sets are called, by what they hold. A row is read by all of its
# columns, so none with text is lost: Alpaca has instruction, input, output; Dolly instruction,
# context, response; OpenOrca question, response; FLAN inputs, targets.
# WizardLM (from, value), LIMA (strings), chat (role, content)
CONVERSATIONS = ("conversations", "conversation", "messages")
INSTRUCTIONS = ("instruction", "question", "prompt", "inputs", "query")  # what is asked
MATERIALS = ("input", "context")  # what the instruction is about; a lone `input` is the instruction
RESPONSES = ("response", "output", "completion", "targets")
ANSWER = "answer"  # the response where there is no other
HISTORY = "history"  # turns before the instruction
# what conversations call who speaks and what is said
ROLES, WORDS = (("from", "role"), ("value", "content"))
INVISIBLE = "\u200b\u2060\ufeff"


def instruction_text(row: Mapping[str, Any]) -> str:
    """`{instruction} {response}` of a row, with one space between turns.

    A column that is null or blank counts as missing. Raises LeftOut for a row without an
    instruction or a response (LIMA's test questions have none), UserError for columns of other data
    and for two different responses.

    >>> instruction_text({"instruction": "When?", "context": "Began 2000.", "response": "2000."})
    'When?\\nBegan 2000. 2000.'
    """
    columns = {str(name).lower(): value for name, value in row.items()}
    turns = _conversation(columns)
    if turns is None:
        turns = _single(columns)
    if turns is None:
        known = [
            *CONVERSATIONS,
            f"{' or '.join((*INSTRUCTIONS, MATERIALS[0]))} with "
            f"{' or '.join((*RESPONSES, ANSWER))}",
        ]
        raise UserError(
            f"has the fields {', '.join(row) or 'none'}, expected those of instruction data: "
            f"{'; '.join(known)}"
        )
    return _joined(turns)


def _conversation(columns: Mapping[str, Any]) -> list[str] | None:
    """The turns of a row with a complete conversation."""
    found = [columns[name] for name in CONVERSATIONS if name in columns]
    given = next((value for value in found if not _is_missing(value) and value != []), None)
    if given is None:
        return None if not found or _single(columns) else []
    return _spoken(given)


def _single(columns: Mapping[str, Any]) -> list[str] | None:
    """The earlier turns, the instruction with its context, and the response of a row; None for
    other data.
    """
    asked = [name for name in (*INSTRUCTIONS, MATERIALS[0]) if name in columns]
    answers = [name for name in (*RESPONSES, ANSWER) if name in columns]
    if not asked or not answers:
        return None
    parts = _distinct(columns, INSTRUCTIONS)
    parts += [part for part in _distinct(columns, MATERIALS) if part not in parts]
    opening = [turn for turn in _turns(columns.get(HISTORY)) if turn]
    if prompt := next((columns[name] for name in asked if isinstance(columns[name], list)), None):
        opening += _spoken(prompt)
    elif parts or not opening:
        opening.append("\n".join(parts))
    return [*opening, _response(columns)]


def _distinct(columns: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The texts of the columns, without those contained in another one."""
    texts = [_text(columns.get(name)) for name in names if not isinstance(columns.get(name), list)]
    longest = sorted(set(filter(None, texts)), key=len, reverse=True)
    kept = [
        text
        for number, text in enumerate(longest)
        if not any(text in other for other in longest[:number])
    ]
    return [text for text in dict.fromkeys(texts) if text in kept]


def _response(columns: Mapping[str, Any]) -> str:
    given = {name: _answered(columns[name]) for name in RESPONSES if name in columns}
    texts = {name: text for name, text in given.items() if text}
    if len(set(texts.values())) > 1:
        message = "kind=texts with a template says which to train on"
        raise UserError(f"has more than one response ({', '.join(texts)}): {message}")
    return next(iter(texts.values()), "") or _answered(columns.get(ANSWER))


def _answered(value: Any) -> str:
    return " ".join(_spoken(value)) if isinstance(value, list) else _text(value)


def _joined(turns: Sequence[str]) -> str:
    if len(turns) < 2 or not turns[-1]:
        raise LeftOut(NO_RESPONSE)
    if not turns[0]:
        raise LeftOut(NO_INSTRUCTION)
    if not all(turns):
        raise LeftOut(BLANK_TURN)
    return " ".join(turns)


def _turns(history: Any) -> Iterator[str]:
    """Earlier turns: pairs of instruction and response, objects, or texts."""
    if _is_missing(history):
        return
    if not isinstance(history, list):
        raise UserError(f"its history is {type(history).__name__}, expected a list of turns")
    for turn in history:
        yield from map(_text, turn) if isinstance(turn, list) else _spoken([turn])


def _spoken(turns: Any) -> list[str]:
    """The text of each turn of a conversation, given as strings or as objects with a speaker."""
    if not isinstance(turns, list):
        raise UserError(f"its conversation is {type(turns).__name__}, expected a list of turns")
    return [
        _said(turn)
        for turn in turns
        if not (isinstance(turn, dict) and _field(turn, ROLES) == "system")
    ]


def _said(turn: Any) -> str:
    content = _field(turn, WORDS) if isinstance(turn, dict) else turn
    if isinstance(content, list):  # parts, as those of messages with images
        return "\n".join(
            _text(part.get("text") if isinstance(part, dict) else part) for part in content
        )
    return _text(content)


def _field(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = next((name for name in names if name in turn), None)
    if found is None:
        raise UserError(
            f"a turn has the fields {', '.join(turn) or 'none'}, expected one of {', '.join(names)}"
        )
    return turn[found]


def _text(value: Any) -> str:
    """A stripped text; empty if missing or blank. Raises UserError for any other type."""
    if _is_missing(value):
        return ""
    if not isinstance(value, str):
        raise UserError(NO_TEXT)
    return value.strip() if value.strip().strip(INVISIBLE).strip() else ""


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN, as pandas writes for null
