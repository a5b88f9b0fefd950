"""Finding the JSON object in a model's output, and the part after its reasoning."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Strings, the last of which may lack its end, and brackets outside of strings.
JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*(?P<end>"?)|[\[\]{}]', re.DOTALL)
CLOSING = {"[": "]", "{": "}"}
BEGINS_NOTHING = ' \t\r\n,:{[]}"'
OBJECT_START = re.compile(r'\{(?=\s*(?:["}]|$))')
# truncated objects without a complete item that are tried; each try reads to the end of the text
MOST_UNREADABLE = 100
LONGEST_TOKEN = 6  # characters of \uXXXX; an error closer to the end may come from truncation
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}

# Reasoning tags of DeepSeek, Qwen, Seed and EXAONE; Magistral; Kimi; Command A; OpenThinker; and
# gpt-oss, if the server does not separate its channels.
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
    whole: bool = True  # false: truncated, `value` has only the complete items of lists
    reason: str = ""  # not_json; truncated: inside an item


class Answer(NamedTuple):
    """An output without its reasoning."""

    text: str
    ended: bool = True  # false: the output ends inside its reasoning, and `text` is empty


NOT_JSON = Json({}, reason="not_json")
TRUNCATED = Json({}, False, "truncated")


def after_reasoning(output: str) -> Answer:
    """The part of an output after its reasoning, or all of it if there is none.

    There may be several blocks of reasoning, and the opening tag may be missing, because many chat
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
    """The JSON object in an output, which may be truncated; reasoning and text around it are
    ignored.

    Among several objects, the last one that fits `schema` counts (see `fits`), or if none does, the
    one with most of its properties. An output that never closes its reasoning tag must end with an
    object that fits.
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

    Limits such as maxLength are ignored, because models without a grammar violate them.
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
    """The last complete object of a text that fits, and its end."""
    last = None
    for start, end in _spans(text):
        if end < 0:
            continue
        value = _decode(text, start)[0]
        if schema is None or fits(value, schema):
            last = value, end
    return last


def _is_in_object(text: str, spans: list[tuple[int, int]], begin: int, place: int) -> bool:
    """Whether `place` is inside an object; a truncated one must start at `begin`."""
    number = bisect_left(spans, (place,)) - 1
    if number < 0:
        return False
    start, end = spans[number]
    return place < end or (end < 0 and begin <= start and not text[begin:start].strip())


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each object of a text. The last one may be truncated: its end is -1."""
    start, unreadable = -1, 0
    while unreadable < MOST_UNREADABLE and (match := OBJECT_START.search(text, start + 1)):
        start = match.start()
        try:
            _, end = _decode(text, start)
        except (ValueError, RecursionError) as error:
            if _may_be_cut(error, text):
                if _read_at(text, start) is not NOT_JSON:
                    yield start, -1
                    return
                unreadable += 1
            continue
        yield start, end
        start = end - 1


def _decode(text: str, start: int) -> tuple[dict[str, Any], int]:
    # not strict: accepts line breaks in strings, which models without a grammar write
    value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
    assert isinstance(value, dict)
    return value, end


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether the end of the text may be the reason why an object is invalid."""
    if not isinstance(error, json.JSONDecodeError):
        return isinstance(error, RecursionError)
    at_end = error.pos >= len(text.rstrip()) - LONGEST_TOKEN
    return at_end or error.msg.startswith("Unterminated string")


def _read_at(output: str, start: int) -> Json:
    """The complete items of a truncated object that starts at `start`, or NOT_JSON."""
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
    """The end of the last complete item of an outermost list in a truncated JSON object, and the
    brackets that close what is open there.

    The end is `start` without such an item, and -1 if the output is not the start of an object.
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
        if not still_open:  # a complete object, which is invalid
            return -1, ""
        if (text in "]}" or part["end"]) and still_open[-1] == "]" and still_open.count("]") == 1:
            end, closing = part.end(), "".join(reversed(still_open))
    return end, closing
