"""Faulty servers: no answer, half an answer, an error, or garbage."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

# The behaviour after the first GOOD requests, which get a valid answer.
MODES = (
    "never answers",
    "answers half and hangs",
    "answers half and breaks off",
    "answers 500 and recovers",
    "answers 500",
    "garbage",
)
GOOD = 5  # requests with a valid answer
ERRORS = 3  # answers with status 500 before the server recovers


class Server(ThreadingHTTPServer):
    """Implements the part of the OpenAI protocol that the engine uses. The generated text depends
    on the prompt alone. A negative `good` means that the server never answers any request.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, mode: str = "", good: int = GOOD) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode, self.good, self.requests = mode, good, 0
        self.released = threading.Event()
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def number(self) -> int:
        """Count a request and return its number after the valid answers: 0 or less for those."""
        with self._lock:
            self.requests += 1
            return self.requests - self.good


@contextmanager
def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.good < 0:
            self.server.released.wait()
            return
        self._send(
            {
                "object": "list",
                "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "drill"}],
            }
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, mode = self.server.number(), self.server.mode
        if self.server.good < 0 or (number > 0 and mode == "never answers"):
            self.server.released.wait()
        elif number > 0 and (
            mode == "answers 500" or (mode == "answers 500 and recovers" and number <= ERRORS)
        ):
            self.send_error(500)
        elif number > 0 and mode == "garbage":
            self._send_bytes(b"<html>\xff\x00 not a completion", "text/html")
        else:
            self._answer(request, half=number > 0 and mode.startswith("answers half"))

    def _answer(self, request: dict[str, Any], half: bool) -> None:
        choice = {
            "index": 0,
            "text": _output(request["prompt"]),
            "finish_reason": "stop",
            "logprobs": None,
        }
        answer = {
            "id": "0",
            "object": "text_completion",
            "created": 0,
            "model": "served",
            "choices": [choice],
        }
        stream = bool(request.get("stream"))
        content = json.dumps(answer).encode()
        content = b"data: " + content + b"\n\ndata: [DONE]\n\n" if stream else content
        self._send_bytes(content, "text/event-stream" if stream else "application/json", half)

    def _send(self, value: Any) -> None:
        self._send_bytes(json.dumps(value).encode(), "application/json")

    def _send_bytes(self, content: bytes, kind: str, half: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        self.wfile.flush()
        if half and self.server.mode == "answers half and hangs":
            self.server.released.wait()
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


def _output(prompt: list[int]) -> str:
    from ipt.synthesis.formats.tags import Pair, pairs_text

    number = crc32(str(prompt).encode()) % 100
    return pairs_text(
        [
            Pair(f"Which number has part {part}?", f"It has number {number + part}.")
            for part in range(2)
        ]
    )
