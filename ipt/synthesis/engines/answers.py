"""How servers that speak OpenAI's protocol answer, each in its own way, read into one form.

Pure functions on decoded JSON. What is no answer raises a `Fault`, which says whether trying again
may help, whether the prompt is at fault, or whether every request would fail.
"""

import json
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from time import time
from typing import Any, NamedTuple

PART_KEYS = {"type", "text", "content", "value", "thinking", "reasoning"}
LINE_LENGTH = 300  # characters of a server's message in an error
NO_ERROR = 200

# Finish reasons in lower case. Any other word ends an output like "stop".
ENDS = frozenset(
    (
        *("stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "function_call"),
        *("tool_use", "stop_token", "stop_str", "end", "complete", "completed", "done"),
    )
)
CUT = frozenset(
    (
        *("length", "max_tokens", "model_length", "max_length", "max_new_tokens"),
        *("max_output_tokens", "max_completion_tokens", "token_limit", "context_length"),
        *("error_limit", "model_context_window_exceeded"),
    )
)
BROKEN_OFF = frozenset(
    (
        *("error", "abort", "aborted", "cancelled", "canceled", "failed", "timeout"),
        *("engine_error", "server_error", "insufficient_system_resource"),
    )
)
REFUSAL = re.compile(
    "filter|safety|recitation|block|prohibited|spii|refus|sensitive|moderat|guardrail|flagged|policy|toxic"
)
NO_REASON = frozenset(("null", "none"))  # written as a text

# HTTP statuses. 424 is how TGI reports a failed generation.
PASSING = frozenset((408, 409, 424, 425, 429))
EVERY_REQUEST = frozenset((401, 402, 404, 405, 407, 410, 501, 505))
TOO_LARGE = 413

# Codes and types of errors, in lower case and without anything but letters and digits.
NAMES_OF_SERVER = re.compile(
    "insufficient(quota|credit|balance|fund)|billing|payment|invalidapikey|authentication|deactivated|modelnotfound|deploymentnotfound"
)
NAMES_OF_PROMPT = re.compile(
    "contentfilter|contentpolicy|responsibleai|moderation|safety|flagged|contextlength|contextsize"
    "|exceedcontext|invalidprompt|blocked|recitation|toolong"
)
NAMES_OF_PASSING = re.compile(
    "ratelimit|toomanyrequests|throttl|overload|capacity|timeout|timedout|deadline|unavailable"
    "|servererror|internal|busy|resourceexhausted|badgateway|upstream|loading"
)
WORDS_OF_LENGTH = re.compile(
    r"context[_ ](length|window|size|shift)|maximum context|(prompt|input) is too long|too many input tokens"
    r"|exceeds? the (available |maximum )?context",
    re.IGNORECASE,
)
WORDS_OF_SIZE = re.compile(
    "request too large", re.IGNORECASE
)  # OpenAI: more tokens than the limit of a minute
WORDS_OF_POLICY = re.compile(
    r"\bflagged\b|content[_ ](filter|policy|management)|\bmoderation\b|safety (system|filter|policy)",
    re.IGNORECASE,
)
WORDS_OF_VALUE = re.compile(
    r"too (large|big|high|many|small)|at (most|least)|(less|greater) than|exceed|maximum",
    re.IGNORECASE,
)
WORDS_OF_UNKNOWN = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|invalid (param|field|arg)|extra (input|field)"
    r"|not (be )?(supported|known|permitted|allowed|recogni[sz]ed)",
    re.IGNORECASE,
)


class Kind(Enum):
    """Whom a fault concerns."""

    PASSING = auto()  # the same request may work later
    PROMPT = auto()  # this prompt, or every request: only another prompt can tell
    SERVER = auto()  # every request


class Fault(Exception):
    """Why there is no answer.

    `words`: the server's own; `said`: the same for an error message, such as "answers 500 (…)";
    `status`: HTTP status, or that which the error names; None if the server cannot be reached;
    `answered`: the model itself, or a filter behind it, declined: so the request was in order;
    `in_stream`: a stream had begun; `wait`: seconds to wait as the server asks.
    """

    def __init__(
        self,
        kind: Kind,
        words: str,
        said: str = "",
        *,
        status: int | None = NO_ERROR,
        answered: bool = False,
        wait: float | None = None,
    ) -> None:
        self.kind, self.words, self.status = kind, line(words), status
        self.said = said or f"fails ({self.words})"
        self.answered, self.wait, self.in_stream = answered, wait, False
        super().__init__(self.words)


class StreamEnded(Fault):
    """A stream ended without a finish_reason; `empty`: it had no events, so perhaps it was none."""

    def __init__(self, empty: bool) -> None:
        super().__init__(Kind.PASSING, "a stream without its end", "ends its streams early")
        self.in_stream, self.empty = True, empty


class Answer(NamedTuple):
    """An answer, or a piece of a streamed one."""

    text: str = ""
    reasoning: str = ""  # text outside of the content
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""  # the server's word in lower case; "" if there is none
    cached_tokens: int = 0


def read_answer(body: Any, streamed: bool = False) -> Answer:
    """What an answer of either endpoint says. Raises Fault for an error and for an empty answer."""
    fault = fault_in(body)
    if fault is not None:
        raise fault
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, Mapping):
        raise not_json(str(body))
    cached_tokens = _cached_tokens(body.get("usage"))
    choice = _first_choice(body)
    if choice is None:
        if streamed:
            return Answer(cached_tokens=cached_tokens)
        words = f"an answer without choices: {json.dumps(body)}"
        raise Fault(Kind.PASSING, words, f"gives no answer in choices ({line(json.dumps(body))})")
    fault = fault_in({"error": choice.get("error")})
    if fault is not None:
        raise fault
    message = _message(choice, streamed)
    refusal = message.get("refusal") or _refusal(message.get("content"))
    if refusal:
        raise Fault(Kind.PROMPT, f"the model refuses: {refusal}", answered=True)
    text, reasoning = _texts(message.get("content"))
    beside = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    reasoning += next((value for value in beside if isinstance(value, str) and value), "")
    text = text or _texts(choice.get("text"))[0]
    ids = choice.get("token_ids")
    token_ids = tuple(ids) if isinstance(ids, list) else ()
    named = [
        choice.get(key)
        for key in ("finish_reason", "stop_reason", "finish_details", "native_finish_reason")
    ]
    finish_reason = next(filter(None, map(_finish_reason, named)), "")
    return Answer(text, reasoning, token_ids, finish_reason, cached_tokens)


def end_of(answer: Answer) -> str:
    """stop or length: how a whole answer ended.

    Raises Fault where the server refused to go on or broke off. A server that names no reason, or
    an unknown one, has ended if it has said something.
    """
    reason = answer.finish_reason
    is_empty = not (answer.text or answer.reasoning or answer.token_ids)
    if reason in CUT:
        return "length"
    if reason in BROKEN_OFF:
        said = f"breaks off its answers with finish_reason={reason}"
        raise Fault(Kind.PASSING, f"finish_reason={reason}", said)
    if reason and reason not in ENDS and (is_empty or REFUSAL.search(reason)):
        raise Fault(Kind.PROMPT, f"finish_reason={reason}", answered=True)
    if is_empty and not reason:
        raise Fault(Kind.PASSING, "an empty answer", "gives empty answers without a finish_reason")
    return "stop"


# Faults
# ----------------------------------------------------------------------------------------------


def fault_of_status(status: int, content: str, headers: Mapping[str, str]) -> Fault:
    """The fault of an answer with a status of 300 or more."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = content
    error = _error(body)
    words = _words(body if error is None else error) or f"HTTP status {status}"
    kind = _kind(status, _names(body, error), words)
    said = f"answers {status} ({line(words)})"
    return Fault(kind, words, said, status=status, wait=seconds_to_wait(headers))


def fault_in(body: Any) -> Fault | None:
    """The error that a body with status 200 holds; None if it holds none."""
    error = _error(body)
    if error is None:
        return None
    words = _words(error)
    status = _status_in(error) or _status_in(body) or NO_ERROR
    kind = _kind(status, _names(body, error), words)
    named = "" if status == NO_ERROR else f" {status}"
    return Fault(kind, words, f"answers with an error{named} ({line(words)})", status=status)


def not_json(content: str) -> Fault:
    """The fault of a body that cannot be decoded, such as a proxy's page or half an answer."""
    words = line(content)
    said = f"does not answer with JSON ({words}): does it speak this protocol?"
    return Fault(Kind.PASSING, f"no JSON: {words}", said, status=NO_ERROR)


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None without one."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time())
    except (TypeError, ValueError, OverflowError):
        return None


def line(text: str) -> str:
    """One line of bounded length; of an HTML page its text."""
    if re.search(r"<(!doctype|html|head|body|title)\b", text, re.IGNORECASE):
        text = re.sub(
            r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE
        )
    return " ".join(text.split())[:LINE_LENGTH]


def is_about_length(words: str) -> bool:
    """Whether an error is about the model's context window."""
    return bool(WORDS_OF_LENGTH.search(words))


def is_unknown(parameter: str, other: str, words: str) -> bool:
    """Whether an error says that a parameter is not known, or that `other` takes its place.

    An error about the value of a parameter, such as one that is too large, says neither.
    """
    if is_about_length(words) or WORDS_OF_VALUE.search(words):
        return False
    return other in words or (parameter in words and bool(WORDS_OF_UNKNOWN.search(words)))


def _kind(status: int, names: str, words: str) -> Kind:
    if status in EVERY_REQUEST or NAMES_OF_SERVER.search(names):
        return Kind.SERVER
    if status == TOO_LARGE or NAMES_OF_PROMPT.search(names):
        return Kind.PROMPT
    about_prompt = is_about_length(words) or WORDS_OF_POLICY.search(words)
    if (about_prompt and status not in PASSING) or WORDS_OF_SIZE.search(words):
        return Kind.PROMPT
    passing = status in PASSING or status >= 500 or NAMES_OF_PASSING.search(names)
    return Kind.PASSING if passing or status == NO_ERROR else Kind.PROMPT


def _error(body: Any) -> Any:
    """The error in a body: in OpenAI's envelope, as a text, or its fields without an envelope."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    if isinstance(error, Mapping) and not any(error.values()):
        error = None  # a form that is not filled in
    if error:
        return error
    if body.get("object") == "error" or body.get("type") == "error":
        return body
    if "detail" in body and "choices" not in body:
        return body
    return None


def _words(error: Any) -> str:
    """What an error says, in the server's own words."""
    if isinstance(error, str):
        return error
    if not isinstance(error, Mapping):
        return json.dumps(error, ensure_ascii=False)
    found = [error.get(name) for name in ("message", "detail", "msg", "error", "description")]
    message = next((value for value in found if value), None)
    words = _words(error if message is None else message) if message else json.dumps(dict(error))
    metadata = error.get("metadata")
    # OpenRouter puts the provider's own words there.
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f"{words}: {_words(raw)}" if raw else words


def _names(body: Any, error: Any) -> str:
    """Codes and types that a body gives its error."""
    names = []
    for part in (body, error):
        if isinstance(part, Mapping):
            names += [part.get(key) for key in ("code", "type", "error_type", "status")]
    texts = [name for name in names if isinstance(name, str)]
    return " ".join(re.sub(r"[\W_]", "", text.lower()) for text in texts)


def _status_in(error: Any) -> int | None:
    if not isinstance(error, Mapping):
        return None
    for key in ("code", "status", "status_code", "http_status"):
        value = error.get(key)
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


# Answers
# ----------------------------------------------------------------------------------------------


def _first_choice(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = body.get("choices")
    choices = choices if isinstance(choices, list) else [choices]
    return next((choice for choice in choices if isinstance(choice, Mapping)), None)


def _message(choice: Mapping[str, Any], streamed: bool) -> Mapping[str, Any]:
    names = ("delta", "message") if streamed else ("message", "delta")
    for name in names:
        if isinstance(choice.get(name), Mapping):
            message: Mapping[str, Any] = choice[name]
            return message
    return {"content": choice.get(names[0])}


def _texts(content: Any) -> tuple[str, str]:
    """Text and reasoning of a content: a text, a part, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, list):
        both = [_texts(part) for part in content]
        return "".join(text for text, _ in both), "".join(thought for _, thought in both)
    if not isinstance(content, Mapping):
        return "", ""
    if not content.keys() & PART_KEYS:  # JSON that the server has parsed already
        return json.dumps(content, ensure_ascii=False), ""
    kind = str(content.get("type", "text"))
    if kind in ("thinking", "reasoning", "reasoning_text"):
        inner = content.get("thinking") or content.get("reasoning") or content.get("text")
        return "", "".join(_texts(inner))
    if kind not in ("text", "output_text"):
        return "", ""
    inner = content.get("text", content.get("content", content.get("value")))
    return _texts({"type": "text", **inner} if isinstance(inner, Mapping) else inner)


def _refusal(content: Any) -> str:
    """What the refusal among the parts of a content says; "" if there is none."""
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping) and part.get("refusal"):
            return str(part["refusal"])
    return ""


def _finish_reason(value: Any) -> str:
    """In lower case; of an object, as SGLang has it, its type; "" if none is given."""
    if isinstance(value, Mapping):
        value = value.get("type")
    reason = "" if value is None else str(value).strip().lower().replace("-", "_")
    return "" if reason in NO_REASON else reason


def _cached_tokens(usage: Any) -> int:
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return cached if isinstance(cached, int) else 0
