"""What the tests of quality, filters and judge share: a finished part with known pairs, and a judge
behind a real HTTP server.
"""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ipt.synthesis.chains import Piece, Round
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.tags import Pair, Parsed
from ipt.synthesis.shards import Shard, ShardPlan

HEART = "The heart pumps blood through the body."


def write_chains(folder, chains, index=0, dropped=None, long_documents=None):
    """A part as the synthesis stage writes it. `chains` holds lists of (doc_id, text, [(question,
    answer)]) or with a rewrite as fourth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = list(dict.fromkeys(row[0].partition("#")[0] for chain in chains for row in chain))
    pieces = [
        [Piece(row[0], row[1], None, documents.index(row[0].partition("#")[0])) for row in chain]
        for chain in chains
    ]
    dropped = Counter(dropped or {})
    shard = Shard(
        folder,
        index,
        ShardPlan(len(documents) + dropped.total(), pieces, dropped, Counter(long_documents or {})),
    )
    for number, chain in enumerate(chains):
        previous = False
        for place, (_, _, pairs, *rewrite) in enumerate(chain):
            parsed = Parsed([Pair(*pair) for pair in pairs], Counter(), *rewrite)
            generation = Generation([5] * 7, "written", "stop", 4)
            shard.add(
                number,
                Round(
                    place, pieces[number][place], 10, generation, parsed, previous and parsed.found
                ),
            )
            previous = parsed.found
    return folder


def verdict(right=True, relevant=True, task="definition"):
    return json.dumps(
        {"reason": "seen", "about_document": relevant, "answer_is_right": right, "task": task}
    )


class JudgeServer:
    """Speaks the protocol of chat completions.

    `reply(request, n)` gives the n-th answer: a verdict's text, an HTTP status, or a whole body.
    """

    def __init__(self, reply):
        self.requests = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(request)
                    number = len(server.requests) - 1
                answer = reply(request, number)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": answer}
                body = {"error": {"message": "no"}} if status != 200 else {
                    "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }  # fmt: skip
                if isinstance(answer, dict):
                    body = answer
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def judge_server(reply):
    server = JudgeServer(reply)
    thread = threading.Thread(
        target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
