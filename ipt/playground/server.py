"""Serves the page, by default to this machine only, and without anything from other hosts."""

import ipaddress
import logging
import os
import tempfile
from importlib.util import find_spec
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ipt.config import Config, PlaygroundConfig
from ipt.console import console
from ipt.errors import UserError
from ipt.models import check_model

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A browser may fetch from this server only. Some of Gradio's scripts are inline or created at run
# time.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'none'; "
    "form-action 'none'; base-uri 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
FIRST_PORT = 7860

log = logging.getLogger(__name__)


def check_page(config: PlaygroundConfig) -> None:
    """Raise UserError or MissingFileError for an invalid value. Loads no model."""
    if find_spec("gradio") is None:
        raise UserError("the playground needs the package gradio: pip install 'ipt[playground]'")
    if config.port is not None and not 0 < config.port < 65536:
        raise UserError(
            f"playground.port={config.port}: expected a number from 1 to 65535, or null for a "
            "free port"
        )
    for key in ("max_characters", "max_file_mib"):
        if getattr(config, key) < 1:
            raise UserError(f"playground.{key}={getattr(config, key)}: must be at least 1")
    for name in config.models:
        check_model(name)


def serve(config: Config) -> None:
    """Serve the page until Ctrl-C. Raises UserError if the port is taken."""
    with tempfile.TemporaryDirectory(prefix="ipt-playground-") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        from ipt.playground.models import Models
        from ipt.playground.page import build_page
        from ipt.playground.stops import Stops
        from ipt.playground.synthesizer import Synthesizer

        stops, synthesizer = Stops(), Synthesizer(config.synthesis, config.seed)
        page = build_page(config, synthesizer, Models(config), stops)
        try:
            address = _launch(page, config.playground)
            console.print(f"playground: {address} (press Ctrl-C to stop)", highlight=False)
            if not is_loopback(config.playground.host):
                log.warning(
                    "playground: anyone who can reach this machine can use the page without a "
                    "password"
                )
            Event().wait()
        except KeyboardInterrupt:
            log.info("playground stopped")
        finally:
            stops.stop_all()
            page.close(verbose=False)
            synthesizer.close()


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware that adds the security headers, and rejects DNS rebinding.

    A server that listens on a loopback address answers only requests for a loopback host, so that a
    foreign host name that resolves to this machine does not reach the page.
    """

    def __init__(self, app: "ASGIApp", host: str) -> None:
        self._app, self._local = app, is_loopback(host)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        names = [urlsplit(f"//{host}").hostname or "" for host in hosts or [""]]
        if self._local and not all(map(is_loopback, names)):
            await send({"type": "http.response.start", "status": 421, "headers": []})
            return await send(
                {"type": "http.response.body", "body": b"This page is served to localhost only."}
            )

        async def guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self._app(scope, receive, guarded)


def _launch(page: "gr.Blocks", config: PlaygroundConfig) -> str:
    """Start the server in a thread and return its address."""
    from starlette.middleware import Middleware

    from ipt.playground.page import STYLE, theme

    options: dict[str, Any] = {
        "theme": theme(),
        "css": STYLE.read_text(encoding="utf-8"),
        "footer_links": [],
        "run_history": False,
    }
    closed: dict[str, Any] = {
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
    }
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=f"{config.max_file_mib}mb",
            app_kwargs={
                "middleware": [Middleware(Guard, host=config.host)],
                "docs_url": None,
                "redoc_url": None,
            },
            prevent_thread_lock=True,
            quiet=True,
            **options,
            **closed,
        )
    except OSError:
        problem = f"all ports from {FIRST_PORT} on are taken"
        if config.port:
            problem = f"playground.port={config.port} is taken"
        raise UserError(
            f"{problem}: choose another one with playground.port=NUMBER, or leave it out for the "
            "next free one"
        ) from None
    return address
