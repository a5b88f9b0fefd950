"""Answers and errors as servers of several makes write them."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from ipt.synthesis.engines.answers import (
    Fault,
    Kind,
    end_of,
    fault_in,
    fault_of_status,
    is_unknown,
    line,
    read_answer,
    seconds_to_wait,
)


def body(content="A heart.", finish="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


@pytest.mark.parametrize(
    ("finish", "end"),
    [
        *(
            (word, "stop")
            for word in (
                "stop",
                "eos_token",
                "stop_sequence",
                "eos",
                "end_turn",
                "tool_calls",
                "function_call",
            )
        ),
        *(
            (word, "stop")
            for word in (None, "", "STOP", "some_new_word", 3, {"type": "stop", "matched": 2})
        ),
        *(
            (word, "length")
            for word in ("length", "max_tokens", "model_length", "MAX_TOKENS", {"type": "length"})
        ),
        *((word, "stop") for word in ("null", "None")),
        *((word, "length") for word in ("ERROR_LIMIT", "model_context_window_exceeded")),
        *(
            (word, Kind.PROMPT)
            for word in (
                "content_filter",
                "content-filter",
                "SAFETY",
                "RECITATION",
                "blocklist",
                "prohibited_content",
            )
        ),
        ("ERROR_TOXIC", Kind.PROMPT),
        *((word, Kind.TRANSIENT) for word in ("error", "abort", "insufficient_system_resource")),
    ],
)
def test_finish_reasons(finish, end):
    answer = read_answer(body(finish=finish))
    if isinstance(end, str):
        assert end_of(answer) == end
    else:
        with pytest.raises(Fault) as raised:
            end_of(answer)
        assert raised.value.kind is end


def test_a_stream_that_repeats_its_message_at_the_end_says_it_once():
    last = {"choices": [{"delta": {}, "message": {"content": "A heart."}, "finish_reason": "stop"}]}
    assert read_answer(last, streamed=True).text == "" and read_answer(last).text == "A heart."
    assert (
        read_answer({"choices": [{"delta": {"content": "A heart."}}]}, streamed=True).text
        == "A heart."
    )
    assert read_answer({"choices": [{"message": "A heart."}]}).text == "A heart."


def test_an_answer_in_a_list():
    assert read_answer([body()]).text == "A heart."


def test_a_choice_without_a_finish_reason_has_ended_if_it_says_something():
    answer = {"choices": [{"text": "A heart."}]}
    assert end_of(read_answer(answer)) == "stop"
    with pytest.raises(Fault) as raised:
        end_of(read_answer(body(content=None, finish=None)))
    assert raised.value.kind is Kind.TRANSIENT


@pytest.mark.parametrize(
    "named", [{"stop_reason": "max_tokens"}, {"finish_details": {"type": "max_tokens"}}]
)
def test_a_reason_under_another_name(named):
    answer = {"choices": [{"message": {"content": "A he"}, "finish_reason": None, **named}]}
    assert end_of(read_answer(answer)) == "length"


def test_an_unknown_finish_reason_without_a_text_is_a_refusal():
    with pytest.raises(Fault, match="finish_reason=other") as raised:
        end_of(read_answer(body(content="", finish="OTHER")))
    assert raised.value.kind is Kind.PROMPT and raised.value.answered


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ("A heart.", "A heart.", ""),
        (None, "", ""),
        ([], "", ""),
        ([{"type": "text", "text": "A "}, {"type": "text", "text": "heart."}], "A heart.", ""),
        ([{"type": "output_text", "text": "A heart."}], "A heart.", ""),
        (["A ", "heart."], "A heart.", ""),
        ({"type": "text", "text": "A heart."}, "A heart.", ""),
        ([{"type": "text", "text": {"value": "A heart."}}], "A heart.", ""),
        ({"questions": []}, '{"questions": []}', ""),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Well."}]},
                {"type": "text", "text": "A heart."},
            ],
            "A heart.",
            "Well.",
        ),
        (
            [
                {"type": "image_url", "image_url": {"url": "x"}},
                None,
                3,
                {"type": "text", "text": "A heart."},
            ],
            "A heart.",
            "",
        ),
    ],
)
def test_contents(content, text, reasoning):
    answer = read_answer(body(content))
    assert (answer.text, answer.reasoning) == (text, reasoning)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_no_text(name):
    assert read_answer(body("A heart.", **{name: "Well."}))[:2] == ("A heart.", "Well.")
    assert read_answer(body(None, **{name: "Well."}))[:2] == ("", "Well.")
    assert read_answer(body("A heart.", **{name: None}))[:2] == ("A heart.", "")


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens_details": None},
        [],
        {"prompt_tokens_details": {"cached_tokens": None}},
    ],
)
def test_usage_may_be_missing(usage):
    assert read_answer({**body(), "usage": usage}).cached_tokens == 0
    assert (
        read_answer(
            {**body(), "usage": {"prompt_tokens_details": {"cached_tokens": 4}}}
        ).cached_tokens
        == 4
    )


def test_a_refusal_of_the_model_is_one_of_the_prompt():
    with pytest.raises(Fault, match="the model refuses: I cannot") as raised:
        read_answer(body(None, refusal="I cannot."))
    with pytest.raises(Fault, match="the model refuses: I cannot"):
        read_answer(body([{"type": "refusal", "refusal": "I cannot."}]))
    assert raised.value.kind is Kind.PROMPT and raised.value.answered
    assert read_answer(body(refusal=None)).text == "A heart."


@pytest.mark.parametrize(
    "answer", [{}, {"choices": None}, {"choices": []}, {"choices": [None]}, [], "text", None, 3]
)
def test_an_answer_without_choices_may_pass(answer):
    with pytest.raises(Fault) as raised:
        read_answer(answer)
    assert raised.value.kind is Kind.TRANSIENT
    if isinstance(answer, dict):  # the last event of a stream has none
        assert read_answer(answer, streamed=True).text == ""


ERRORS_IN_200 = [
    ({"error": {"message": "slow down", "code": 429}}, Kind.TRANSIENT, "slow down"),
    ({"error": {"message": "slow down", "code": "429"}}, Kind.TRANSIENT, "slow down"),
    (
        {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
        Kind.TRANSIENT,
        "slow down",
    ),
    ({"error": {"message": "oops", "type": "server_error"}}, Kind.TRANSIENT, "oops"),
    ({"error": "busy"}, Kind.TRANSIENT, "busy"),
    (
        {"error": {"message": "gone", "code": 502, "metadata": {"raw": "upstream is down"}}},
        Kind.TRANSIENT,
        "gone: upstream is down",
    ),
    (
        [{"error": {"message": "wait", "code": 503, "status": "UNAVAILABLE"}}],
        Kind.TRANSIENT,
        "wait",
    ),
    (
        {"object": "error", "message": "no memory", "type": "InternalServerError", "code": 500},
        Kind.TRANSIENT,
        "no memory",
    ),
    ({"detail": "starting"}, Kind.TRANSIENT, "starting"),
    ({"error": {"message": "pay first", "code": 402}}, Kind.SERVER, "pay first"),
    ({"error": {"message": "who are you", "code": "invalid_api_key"}}, Kind.SERVER, "who are you"),
    (
        {
            "error": {
                "message": "no quota",
                "code": "insufficient_quota",
                "type": "insufficient_quota",
            }
        },
        Kind.SERVER,
        "no quota",
    ),
    ({"error": {"message": "no such model", "code": 404}}, Kind.SERVER, "no such model"),
    ({"error": {"message": "flagged", "code": 403}}, Kind.PROMPT, "flagged"),
    ({"error": {"message": "not this one", "code": "content_filter"}}, Kind.PROMPT, "not this one"),
    ({"error": {"message": "this prompt was flagged"}}, Kind.PROMPT, "this prompt was flagged"),
    (
        {"error": {"message": "exceeds the available context size", "code": 400}},
        Kind.PROMPT,
        "exceeds the available context size",
    ),
]


@pytest.mark.parametrize(("answer", "kind", "words"), ERRORS_IN_200)
def test_errors_inside_a_200_are_what_their_codes_say(answer, kind, words):
    with pytest.raises(Fault) as raised:
        read_answer(answer)
    assert (raised.value.kind, raised.value.reason) == (kind, words)


def test_an_error_inside_a_choice():
    choice = {
        "index": 0,
        "finish_reason": "error",
        "error": {"code": 502, "message": "it broke"},
        "message": {"content": "A he"},
    }
    with pytest.raises(Fault, match="it broke") as raised:
        read_answer({"choices": [choice]})
    assert raised.value.kind is Kind.TRANSIENT


@pytest.mark.parametrize(
    "error", [None, {}, "", False, {"code": 0, "message": ""}, {"message": None, "code": None}]
)
def test_an_empty_error_is_none(error):
    answer = body()
    answer["error"] = answer["choices"][0]["error"] = error
    assert fault_in(answer) is None and read_answer(answer).text == "A heart."


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        *(
            (status, {"error": {"message": "x"}}, Kind.TRANSIENT)
            for status in (408, 409, 424, 425, 429, 500, 502, 503, 504, 529)
        ),
        *(
            (status, {"error": {"message": "x"}}, Kind.SERVER)
            for status in (401, 402, 404, 405, 501)
        ),
        *(
            (status, {"error": {"message": "x"}}, Kind.PROMPT)
            for status in (400, 403, 413, 422, 451)
        ),
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}, Kind.SERVER),
        (
            429,
            {"error": {"message": "requests exceed the context window of your plan"}},
            Kind.TRANSIENT,
        ),
        (400, {"error": {"message": "x", "code": "content_filter", "innererror": {}}}, Kind.PROMPT),
        (400, {"error": {"message": "x", "type": "rate_limit_exceeded"}}, Kind.TRANSIENT),
        (
            429,
            {
                "error": {
                    "message": "Request too large for x: Limit 30, Requested 50",
                    "code": "rate_limit_exceeded",
                }
            },
            Kind.PROMPT,
        ),
        (
            500,
            {"error": {"message": "context shift is disabled", "type": "server_error"}},
            Kind.PROMPT,
        ),
        (413, {"error": {"message": "x", "code": "rate_limit_exceeded"}}, Kind.PROMPT),
        (500, {"error": "the input length exceeds the context length"}, Kind.PROMPT),
        (422, {"error": "x", "error_type": "validation"}, Kind.PROMPT),
        (503, "<html><body>x</body></html>", Kind.TRANSIENT),
        (400, None, Kind.PROMPT),
    ],
)
def test_statuses(status, content, kind):
    text = content if isinstance(content, str) else json.dumps(content)
    assert fault_of_status(status, text, {}).kind is kind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "Too\nlong."}}, "Too long."),
        ({"error": "Too long.", "error_type": "validation"}, "Too long."),
        (
            {"object": "error", "message": "Too long.", "type": "BadRequestError", "code": 400},
            "Too long.",
        ),
        ({"message": "Too long.", "request_id": "x"}, "Too long."),
        ({"detail": "Too long."}, "Too long."),
        (
            {"detail": [{"loc": ["body", "max_tokens"], "msg": "no"}]},
            '[{"loc": ["body", "max_tokens"], "msg": "no"}]',
        ),
        (
            [{"error": {"code": 400, "message": "Too long.", "status": "INVALID_ARGUMENT"}}],
            "Too long.",
        ),
        ("plain text", "plain text"),
        ("", "HTTP status 400"),
        (
            "<!DOCTYPE html><head><style>p {}</style><title>502 "
            "Bad\nGateway</title></head><p>nginx</p>",
            "502 Bad Gateway nginx",
        ),
    ],
)
def test_the_words_of_an_error_are_the_servers(content, words):
    text = content if isinstance(content, str) else json.dumps(content)
    assert fault_of_status(400, text, {}).reason == words


def test_a_message_is_one_line_of_bounded_length():
    assert line("a\n" * 1000) == ("a " * 1000)[:300]


def test_seconds_to_wait():
    assert seconds_to_wait({}) is None and seconds_to_wait({"retry-after": "soon"}) is None
    assert (
        seconds_to_wait({"retry-after": "7"}) == 7
        and seconds_to_wait({"retry-after": "0.5"}) == 0.5
    )
    assert seconds_to_wait({"retry-after-ms": "20", "retry-after": "7"}) == 0.02
    later = datetime.now(UTC) + timedelta(hours=2)
    assert 3600 < seconds_to_wait({"retry-after": format_datetime(later, usegmt=True)}) <= 7200
    assert seconds_to_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            True,
        ),
        ("max_tokens is not known to this model, use max_completion_tokens", True),
        ("Unrecognized request argument supplied: max_tokens", True),
        (
            '[{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs are '
            'not permitted"}]',
            True,
        ),
        ("max_tokens must be at least 1", False),
        ("'max_tokens' or 'max_completion_tokens' is too large: 99999", False),
        (
            "This model's maximum context length is 8192 tokens, you asked for 9000 (max_tokens "
            "1024)",
            False,
        ),
        ("Unsupported parameter: 'temperature'", False),
    ],
)
def test_whether_a_parameter_is_unknown_or_its_value_is_wrong(words, unknown):
    assert is_unknown("max_tokens", "max_completion_tokens", words) == unknown
