import asyncio
import sys

import pytest

from ipt.config import PlaygroundConfig
from ipt.playground import server
from ipt.playground.server import POLICY, Guard, check_page, is_loopback


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 0}, "playground.port=0"),
        ({"max_characters": 0}, "max_characters=0"),
        ({"models": ["embedded:none"]}, "unknown embedded model"),
    ],
)
def test_values_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        check_page(PlaygroundConfig(**changes))


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ipt\[playground\]'"):
        check_page(PlaygroundConfig())


def test_checking_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys, ipt.pipeline.validation; sys.exit(bool({'gradio', 'torch'} & "
        "set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_names_of_this_machine():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "192.168.0.1", "localhost.evil.example", ""]))


@pytest.mark.parametrize(
    ("listens", "asked", "status"),
    [
        ("127.0.0.1", b"127.0.0.1:7860", 200),
        ("127.0.0.1", b"localhost", 200),
        ("127.0.0.1", b"[::1]:7860", 200),
        ("127.0.0.1", b"evil.example:7860", 421),
        ("127.0.0.1", b"", 421),
        ("0.0.0.0", b"lab.example:7860", 200),
    ],
)
def test_who_is_answered(listens, asked, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, listens)({"type": "http", "headers": [(b"host", asked)]}, None, send))
    assert sent[0]["status"] == status
    assert status != 200 or {(b"a", b"b"), (b"content-security-policy", POLICY.encode())} <= set(
        sent[0]["headers"]
    )
