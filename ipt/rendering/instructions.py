"""General instruction data: rows of the usual schemas as texts to train on.

An instruction and its response are joined by one space, as the cards of the published domain models say (paper section 8); so are
the turns of a longer conversation. What a system prompt says is left out, as it has no place in that form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ipt.corpus.documents import LeftOut

NO_RESPONSE = "an instruction without a response"
NO_TEXT = "an instruction or a response is not a string"
ROLES, WORDS = ("from", "role"), ("value", "content")  # what conversations call who speaks and what is said

# Fields that tell a schema -> the turns of a row. The first whose fields are all there is taken.
SCHEMAS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Sequence[Any]]] = {
    ("conversations",): lambda row: _spoken(row["conversations"]),  # WizardLM_evol_instruct_V2 (from, value), LIMA (strings)
    ("conversation",): lambda row: _spoken(row["conversation"]),
    ("messages",): lambda row: _spoken(row["messages"]),  # role, content
    ("question", "response"): lambda row: (row["question"], row["response"]),  # OpenOrca
    ("instruction", "input", "output"): lambda row: ("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]),  # Alpaca
    ("instruction", "output"): lambda row: (row["instruction"], row["output"]),  # WizardLM_evol_instruct_70k
    ("instruction", "response"): lambda row: (row["instruction"], row["response"]),
    ("prompt", "response"): lambda row: (row["prompt"], row["response"]),
    ("prompt", "completion"): lambda row: (row["prompt"], row["completion"]),
    ("inputs", "targets"): lambda row: (row["inputs"], row["targets"]),  # FLAN
}


def instruction_text(row: Mapping[str, Any]) -> str:
    """`{instruction} {response}` of a row, with one space between turns.

    Raises LeftOut for a row that lacks one of them (LIMA's test questions have no response), ValueError for one of no schema.
    """
    try:
        turns = next((read(row) for names, read in SCHEMAS.items() if all(name in row for name in names)), None)
    except TypeError:  # what is to be joined is no text
        raise ValueError(NO_TEXT) from None
    if turns is None:
        known = "; ".join(" + ".join(names) for names in SCHEMAS)
        raise ValueError(f"has the fields {', '.join(row) or 'none'}, expected those of instruction data: {known}")
    if len(turns) < 2 or not all(turns):
        raise LeftOut(NO_RESPONSE)
    if not all(isinstance(turn, str) for turn in turns):
        raise ValueError(NO_TEXT)
    return " ".join(turn.strip() for turn in turns)


def _spoken(turns: Any) -> list[Any]:
    """What is said in each turn of a conversation, of strings or of objects that name the speaker."""
    if not isinstance(turns, list):
        raise ValueError(f"its conversation is {type(turns).__name__}, expected a list of turns")
    return [_said(turn) for turn in turns if not (isinstance(turn, dict) and _field(turn, ROLES) == "system")]


def _said(turn: Any) -> Any:
    return _field(turn, WORDS) if isinstance(turn, dict) else turn


def _field(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = next((name for name in names if name in turn), None)
    if found is None:
        raise ValueError(f"a turn has the fields {', '.join(turn) or 'none'}, expected one of {', '.join(names)}")
    return turn[found]
