"""The JSON object in a model's output, and the part of an output that follows its reasoning."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Strings, the last one perhaps without its end, and brackets outside of strings.
JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*(?P<end>"?)|[\[\]{}]', re.DOTALL)
CLOSING = {"[": "]", "{": "}"}
BEGINS_NOTHING = ' \t\r\n,:{[]}"'
OBJECT_START = re.compile(r'\{(?=\s*(?:["}]|$))')
LONGEST_TOKEN = 6  # characters of \uXXXX; an error nearer to the end than that may come from a cut
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}

# How models write reasoning into their output: DeepSeek, Qwen, Seed, EXAONE; Magistral; Kimi;
# Command A; OpenThinker; and gpt-oss where the server does not take the channels apart.
TAG = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
OPEN_TAG = re.compile(
    rf"<{TAG}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>"
    r"|<\|channel\|>analysis<\|message\|>",
    re.IGNORECASE,
)
BLANK_OPEN_TAG = re.compile(rf"\s*(?:{OPEN_TAG.pattern})", re.IGNORECASE)
CLOSE_TAG = re.compile(
    rf"</{TAG}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>"
    r"|<\|channel\|>final[^<]*<\|message\|>",
    re.IGNORECASE,
)
FENCE = re.compile(r"[`\s]*")


class Json(NamedTuple):
    value: dict[str, Any]
    whole: bool = True  # false: of a beginning, `value` has the items of lists that are complete
    reason: str = ""  # not_json; truncated: something had begun where it ends


class Answer(NamedTuple):
    """An output without its reasoning."""

    text: str
    ended: bool = True  # false: the output ends inside the reasoning, and `text` is empty


NOT_JSON = Json({}, reason="not_json")
TRUNCATED = Json({}, False, "truncated")


def after_reasoning(output: str) -> Answer:
    """The part of an output that follows its reasoning; the whole output without reasoning.

    Several blocks may follow one another, and the opening tag may be missing, because many chat
    templates put it into the prompt. A tag inside a JSON string of the answer is text.
    """
    place, spans = 0, list(_spans(output)) if CLOSE_TAG.search(output) else []
    for closed in CLOSE_TAG.finditer(output):
        if _is_in_object(output, spans, place, closed.start()):
            continue
        opened = OPEN_TAG.search(output, place, closed.start())
        if opened and output[place : opened.start()].strip():
            break  # the text is about tags
        place = closed.end()
    if BLANK_OPEN_TAG.match(output, place):
        return Answer("", ended=False)
    return Answer(output[place:])


def read_json(output: str, schema: Mapping[str, Any] | None = None) -> Json:
    """The JSON object in an output, also one that was cut; reasoning and text around it are
    ignored.

    Of several objects the last one that fits `schema` counts (see `fits`), or if none does the one
    that has most of its properties. An output that never closes its reasoning tag has an answer
    only if it ends with an object that fits.
    """
    answer = after_reasoning(output)
    if not answer.ended:
        last = _last_fitting(output, schema)
        return TRUNCATED if last is None or not FENCE.fullmatch(output, last[1]) else Json(last[0])
    fitting = _last_fitting(answer.text, schema)
    if fitting is not None:
        return Json(fitting[0])
    found, known = NOT_JSON, set((schema or {}).get("properties", {}))
    for start, end in _spans(answer.text):
        other = _read_at(answer.text, start) if end < 0 else Json(_decode(answer.text, start)[0])
        if len(known & other.value.keys()) >= len(known & found.value.keys()):
            found = other
    return found


def fits(value: Any, schema: Any) -> bool:
    """Whether `value` has the structure of a JSON schema: types, required properties and items.

    Bounds such as maxLength are not looked at, because models without a grammar overstep them.
    """
    if not isinstance(schema, Mapping):
        return True
    named = schema.get("type")
    kinds = named if isinstance(named, list) else [named]
    if not any(_is_a(value, kind) for kind in kinds):
        return False
    if isinstance(value, list):
        items = schema.get("items", {})
        return all(fits(item, items) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties") or {}
    if not set(schema.get("required", ())) <= value.keys():
        return False
    return all(fits(value[name], properties[name]) for name in properties.keys() & value.keys())


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # an int, for Python
        return kind in ("boolean", None)
    return kind not in TYPES or isinstance(value, TYPES[kind])


def _last_fitting(text: str, schema: Mapping[str, Any] | None) -> tuple[dict[str, Any], int] | None:
    """The last whole object of a text that fits, and where it ends."""
    last = None
    for start, end in _spans(text):
        if end < 0:
            continue
        value = _decode(text, start)[0]
        if schema is None or fits(value, schema):
            last = value, end
    return last


def _is_in_object(text: str, spans: list[tuple[int, int]], begin: int, place: int) -> bool:
    """Whether `place` is inside an object; a cut one counts only if it starts at `begin`."""
    number = bisect_left(spans, (place,)) - 1
    if number < 0:
        return False
    start, end = spans[number]
    return place < end or (end < 0 and begin <= start and not text[begin:start].strip())


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the objects of a text start and end; the end of a cut one, which is the last, is -1."""
    start = -1
    while match := OBJECT_START.search(text, start + 1):
        start = match.start()
        try:
            _, end = _decode(text, start)
        except (ValueError, RecursionError) as error:
            if _may_be_cut(error, text) and _read_at(text, start) is not NOT_JSON:
                yield start, -1
                return
            continue
        yield start, end
        start = end - 1


def _decode(text: str, start: int) -> tuple[dict[str, Any], int]:
    # not strict: takes line breaks in strings, as models without a grammar write them
    value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
    assert isinstance(value, dict)
    return value, end


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether an object could not be read because the text ends inside it."""
    if not isinstance(error, json.JSONDecodeError):
        return isinstance(error, RecursionError)
    at_end = error.pos >= len(text.rstrip()) - LONGEST_TOKEN
    return at_end or error.msg.startswith("Unterminated string")


def _read_at(output: str, start: int) -> Json:
    """The complete items of an object that starts at `start` and is cut; NOT_JSON if it is none."""
    end, closing = _last_item(output, start)
    if end < 0:
        return NOT_JSON
    try:
        decoder = json.JSONDecoder(strict=False)
        value = decoder.decode(output[start:end] + closing) if closing else {}
    except (ValueError, RecursionError):
        return NOT_JSON
    begun = not closing or output[end:].strip(BEGINS_NOTHING)
    return Json(value, False, "truncated" if begun else "")


def _last_item(output: str, start: int) -> tuple[int, str]:
    """Where the last complete item of an outermost list ends in a cut JSON object, and the brackets
    that are open there.

    The end is `start` if there is no such item, and -1 if the output is no beginning of an object.
    """
    end, closing = start, ""
    still_open: list[str] = []
    for part in JSON_PART.finditer(output, start):
        text = part[0]
        if text in CLOSING:
            still_open.append(CLOSING[text])
            continue
        if text in "]}" and still_open.pop() != text:
            return -1, ""
        if not still_open:  # it has an end, and yet it could not be read
            return -1, ""
        if (text in "]}" or part["end"]) and still_open[-1] == "]" and still_open.count("]") == 1:
            end, closing = part.end(), "".join(reversed(still_open))
    return end, closing
