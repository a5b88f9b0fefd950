"""Responses of servers with OpenAI's protocol, which differ between servers, in one form.

Pure functions on decoded JSON. A response without an answer raises a `Fault`, which says whether a
retry may help, and whether the fault concerns one prompt or every request.
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

# Finish reasons in lower case, to be matched as a whole. Any other one ends an output like "stop".
STOPPED = re.compile(
    "stop(_sequence|_token|_str)?|eos(_token)?|end(_turn)?|tool_calls|tool_use|function_call"
    "|completed?|done"
)
CUT = re.compile(
    "(model_|max_|context_)?length|max_((new|output|completion)_)?tokens|token_limit|error_limit"
    "|model_context_window_exceeded"
)
ABORTED = re.compile(
    "((engine|server)_)?error|abort(ed)?|cancell?ed|failed|timeout|insufficient_system_resource"
)
REFUSAL = re.compile(
    "filter|safety|recitation|block|prohibited|spii|refus|sensitive|moderat|guardrail|flagged"
    "|policy|toxic"
)
NO_REASON = ("", "null", "none")  # as strings

# HTTP statuses. TGI reports a failed generation as 424.
TRANSIENT = frozenset((408, 409, 424, 425, 429))
EVERY_REQUEST = frozenset((401, 402, 404, 405, 407, 410, 501, 505))
TOO_LARGE = 413

# Codes and types of errors, in lower case, letters and digits only.
SERVER_CODES = re.compile(
    "insufficient(quota|credit|balance|fund)|billing|payment|invalidapikey|authentication"
    "|deactivated|modelnotfound|deploymentnotfound"
)
PROMPT_CODES = re.compile(
    "contentfilter|contentpolicy|responsibleai|moderation|safety|flagged|contextlength|contextsize"
    "|exceedcontext|invalidprompt|blocked|recitation|toolong"
)
TRANSIENT_CODES = re.compile(
    "ratelimit|toomanyrequests|throttl|overload|capacity|timeout|timedout|deadline|unavailable"
    "|servererror|internal|busy|resourceexhausted|badgateway|upstream|loading"
)
# Error messages.
ABOUT_LENGTH = re.compile(
    r"context[_ ](length|window|size|shift)|maximum context|(prompt|input) is too long"
    r"|too many input tokens|exceeds? the (available |maximum )?context",
    re.IGNORECASE,
)
# OpenAI: one request has more tokens than the limit per minute
ABOUT_SIZE = re.compile("request too large", re.IGNORECASE)
ABOUT_POLICY = re.compile(
    r"\bflagged\b|content[_ ](filter|policy|management)|\bmoderation\b"
    r"|safety (system|filter|policy)",
    re.IGNORECASE,
)
ABOUT_VALUE = re.compile(
    r"too (large|big|high|many|small)|at (most|least)|(less|greater) than|exceed|maximum",
    re.IGNORECASE,
)
ABOUT_UNKNOWN = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|invalid (param|field|arg)"
    r"|extra (input|field)|not (be )?(supported|known|permitted|allowed|recogni[sz]ed)",
    re.IGNORECASE,
)


class Kind(Enum):
    """The scope of a fault."""

    TRANSIENT = auto()  # the same request may work later
    PROMPT = auto()  # this prompt, or every request: another prompt has to be tried
    SERVER = auto()  # every request


class Fault(Exception):
    """A request without an answer.

    `reason`: the server's message. `message`: the same as the predicate of an error message, such
    as "answers 500 (…)". `status`: the HTTP status, or the one in the error; None if the server
    cannot be reached. `answered`: the model or a content filter declined, so the request was valid.
    `in_stream`: the fault occurred inside a stream. `wait`: seconds to wait, from the server.
    """

    def __init__(
        self,
        kind: Kind,
        reason: str,
        message: str = "",
        *,
        status: int | None = NO_ERROR,
        answered: bool = False,
        wait: float | None = None,
    ) -> None:
        self.kind = kind
        self.reason = line(reason)
        self.message = message or f"fails ({self.reason})"
        self.status = status
        self.answered = answered
        self.wait = wait
        self.in_stream = False
        super().__init__(self.reason)


class StreamEnded(Fault):
    """A stream without a finish_reason. `empty`: it had no events, so it may not be a stream."""

    def __init__(self, empty: bool) -> None:
        super().__init__(Kind.TRANSIENT, "an incomplete stream", "ends its streams early")
        self.in_stream = True
        self.empty = empty


class Answer(NamedTuple):
    """An answer, or one event of a streamed answer."""

    text: str = ""
    reasoning: str = ""  # text that is not part of the content
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""  # as the server gives it, in lower case; "" without one
    cached_tokens: int = 0


def read_answer(body: Any, streamed: bool = False) -> Answer:
    """The answer in a response of either endpoint. Raises Fault without one."""
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
        content = json.dumps(body)
        raise Fault(
            Kind.TRANSIENT,
            f"a response without choices: {content}",
            f"returns no choices ({line(content)})",
        )
    fault = fault_in({"error": choice.get("error")})
    if fault is not None:
        raise fault
    message = _message(choice, streamed)
    refusal = message.get("refusal") or _refusal(message.get("content"))
    if refusal:
        raise Fault(Kind.PROMPT, f"the model refuses: {refusal}", answered=True)
    text, reasoning = _texts(message.get("content"))
    for name in ("reasoning_content", "reasoning", "thinking"):
        value = message.get(name)
        if isinstance(value, str) and value:
            reasoning += value
            break
    text = text or _texts(choice.get("text"))[0]
    ids = choice.get("token_ids")
    token_ids = tuple(ids) if isinstance(ids, list) else ()
    return Answer(text, reasoning, token_ids, _finish_reason(choice), cached_tokens)


def end_of(answer: Answer) -> str:
    """How a complete answer ended: stop or length.

    Raises Fault if the server refused the prompt or aborted the output. Without a finish reason, or
    with an unknown one, an answer that is not empty counts as ended.
    """
    reason = answer.finish_reason
    is_empty = not (answer.text or answer.reasoning or answer.token_ids)
    if CUT.fullmatch(reason):
        return "length"
    if ABORTED.fullmatch(reason):
        named = f"finish_reason={reason}"
        raise Fault(Kind.TRANSIENT, named, f"aborts its answers with {named}")
    if not is_known_end(reason) and (is_empty or REFUSAL.search(reason)):
        raise Fault(Kind.PROMPT, f"finish_reason={reason}", answered=True)
    if is_empty and not reason:
        raise Fault(
            Kind.TRANSIENT, "an empty answer", "returns empty answers without a finish_reason"
        )
    return "stop"


def is_known_end(reason: str) -> bool:
    """Whether a finish reason is a known word for a normal end, or absent."""
    return not reason or bool(STOPPED.fullmatch(reason))


# Faults
# ----------------------------------------------------------------------------------------------


def fault_of_status(status: int, content: str, headers: Mapping[str, str]) -> Fault:
    """The fault of a response with status 300 or above."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = content
    error = _error(body)
    reason = _reason(body if error is None else error) or f"HTTP status {status}"
    kind = _kind(status, _codes(body, error), reason)
    message = f"answers {status} ({line(reason)})"
    return Fault(kind, reason, message, status=status, wait=seconds_to_wait(headers))


def fault_in(body: Any) -> Fault | None:
    """The error in a body with status 200, if there is one."""
    error = _error(body)
    if error is None:
        return None
    reason = _reason(error)
    status = _status_in(error) or _status_in(body) or NO_ERROR
    kind = _kind(status, _codes(body, error), reason)
    named = "" if status == NO_ERROR else f" {status}"
    return Fault(kind, reason, f"answers with an error{named} ({line(reason)})", status=status)


def not_json(content: str) -> Fault:
    """The fault of a body that cannot be decoded, such as the page of a proxy or a cut response."""
    reason = line(content)
    return Fault(
        Kind.TRANSIENT,
        f"not JSON: {reason}",
        f"does not answer with JSON ({reason}): is it a server with this protocol?",
    )


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, which is a number or a date; None without one."""
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
    """One line of limited length; for an HTML page its text."""
    if re.search(r"<(!doctype|html|head|body|title)\b", text, re.IGNORECASE):
        tags = r"<(script|style)\b.*?</\1>|<[^>]*>"
        text = re.sub(tags, " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(text.split())[:LINE_LENGTH]


def is_about_length(reason: str) -> bool:
    """Whether an error message is about the model's context window."""
    return bool(ABOUT_LENGTH.search(reason))


def is_unknown(parameter: str, other: str, reason: str) -> bool:
    """Whether an error message says that a parameter is unknown, or that `other` replaces it.

    A message about the value of a parameter, such as a value that is too large, says neither.
    """
    if is_about_length(reason) or ABOUT_VALUE.search(reason):
        return False
    return other in reason or (parameter in reason and bool(ABOUT_UNKNOWN.search(reason)))


def _kind(status: int, codes: str, reason: str) -> Kind:
    if status in EVERY_REQUEST or SERVER_CODES.search(codes):
        return Kind.SERVER
    if status == TOO_LARGE or PROMPT_CODES.search(codes) or ABOUT_SIZE.search(reason):
        return Kind.PROMPT
    about_prompt = is_about_length(reason) or ABOUT_POLICY.search(reason)
    if about_prompt and status not in TRANSIENT:
        return Kind.PROMPT
    is_transient = status in TRANSIENT or status >= 500 or TRANSIENT_CODES.search(codes)
    return Kind.TRANSIENT if is_transient or status == NO_ERROR else Kind.PROMPT


def _error(body: Any) -> Any:
    """The error in a body: in OpenAI's envelope, as a string, or its fields without an envelope."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    if isinstance(error, Mapping) and not any(error.values()):
        error = None  # all fields are empty
    if error:
        return error
    is_error = body.get("object") == "error" or body.get("type") == "error"
    return body if is_error or ("detail" in body and "choices" not in body) else None


def _reason(error: Any) -> str:
    """The message of an error."""
    if isinstance(error, str):
        return error
    if not isinstance(error, Mapping):
        return json.dumps(error, ensure_ascii=False)
    reason = json.dumps(dict(error))
    for name in ("message", "detail", "msg", "error", "description"):
        if error.get(name):
            reason = _reason(error[name])
            break
    metadata = error.get("metadata")  # OpenRouter has the provider's message there
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f"{reason}: {_reason(raw)}" if raw else reason


def _codes(body: Any, error: Any) -> str:
    """Codes and types of an error."""
    codes = []
    for part in (body, error):
        if isinstance(part, Mapping):
            codes += [part.get(key) for key in ("code", "type", "error_type", "status")]
    return " ".join(re.sub(r"[\W_]", "", code.lower()) for code in codes if isinstance(code, str))


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
        message = choice.get(name)
        if isinstance(message, Mapping):
            return message
    return {"content": choice.get(names[0])}


def _texts(content: Any) -> tuple[str, str]:
    """Text and reasoning of a content, which is a string, a part, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, list):
        both = [_texts(part) for part in content]
        return "".join(text for text, _ in both), "".join(thought for _, thought in both)
    if not isinstance(content, Mapping):
        return "", ""
    if not content.keys() & PART_KEYS:  # JSON output that the server has parsed
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
    """The text of a refusal among the parts of a content."""
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping) and part.get("refusal"):
            return str(part["refusal"])
    return ""


def _finish_reason(choice: Mapping[str, Any]) -> str:
    """The finish reason of a choice in lower case, under whatever name; "" without one."""
    for key in ("finish_reason", "stop_reason", "finish_details", "native_finish_reason"):
        value = choice.get(key)
        if isinstance(value, Mapping):  # as SGLang writes it
            value = value.get("type")
        reason = "" if value is None else str(value).strip().lower().replace("-", "_")
        if reason not in NO_REASON:
            return reason
    return ""


def _cached_tokens(usage: Any) -> int:
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return cached if isinstance(cached, int) else 0
