"""A client for servers with OpenAI's protocol that distinguishes faults of one prompt from others.

Transient faults (429, 5xx, a broken connection, an error inside an answer) are retried with growing
pauses, or after the time that the server asks for. A rejected prompt concerns only that prompt if
the server has answered another one since the last rejection; if not, a short probe with the same
parameters decides. So an unknown parameter or exhausted credit stops the run, and a flagged
document does not.

The openai package sends the requests. Its own retries are off, because they do not cover errors
inside answers with status 200, streams that end early and responses that are not JSON.
"""

import asyncio
import json
import logging
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied, PromptRefused
from ipt.synthesis.engines.answers import (
    Answer,
    Fault,
    Kind,
    end_of,
    fault_in,
    fault_of_status,
    is_known_end,
    is_unknown,
    line,
    not_json,
    read_answer,
)

if TYPE_CHECKING:
    from ipt.config import JudgeConfig, SynthesisConfig

T = TypeVar("T")
COMPLETIONS, CHAT = "/completions", "/chat/completions"
PROBE = "The heart pumps blood through the body."  # the document of a probe
NO_KEY = "none"  # for a server without keys: the openai package requires one
SHORTEST_SECRET = 8  # characters; placeholders such as "none" and "EMPTY" are shorter
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between tries
LONGEST_WAIT = 600.0  # seconds; a server that asks for more stops the run
OLD_LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
KEPT = "finished work is kept, run the same command again"

log = logging.getLogger(__name__)


class Request(NamedTuple):
    path: str
    body: dict[str, Any]


class ServerFails(EngineDied):
    """The server answers, but after all retries only with transient errors."""


Send = Callable[[Request], Awaitable[T]]


class Server:
    """The server of a section of the config (synthesis or filters.judge).

    `probe` is a short request with the parameters of all others. `unlisted` is added to errors if
    the server does not list the model and has not answered yet.
    """

    def __init__(
        self,
        config: "SynthesisConfig | JudgeConfig",
        section: str,
        probe: Request,
        unlisted: str = "",
    ) -> None:
        import openai

        self._config = config
        self._section = section
        self._probe = probe
        self._unlisted = unlisted
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key(config, section),
            max_retries=0,
            timeout=config.timeout,
            # The default client closes itself in whatever event loop runs when it is collected.
            http_client=openai.DefaultAsyncHttpxClient(timeout=config.timeout),
        )
        self._has_answered = False
        # whether a request was answered that was sent after the last rejected prompt
        self._has_answered_lately = False
        self._rejected = 0
        self._checking = asyncio.Lock()
        self._accepted: set[str] = set()  # parameters of answered requests
        self._wants_new_limit = False
        self._logged: set[str] = set()

    async def ask(self, request: Request, send: Send[T]) -> T:
        """The result of `send(request)`, which raises Fault if there is none.

        Raises PromptRefused if the server rejects this prompt, UserError if it rejects all prompts
        and EngineDied if it keeps failing.
        """
        rejected = self._rejected
        try:
            result = await self._retry(request, send)
        except Fault as fault:
            if fault.kind is not Kind.PROMPT:
                raise self._error(fault) from fault
            if fault.answered:
                self._has_answered = True
            else:
                await self._check()
            raise PromptRefused(fault.reason) from fault
        self._has_answered = True
        self._has_answered_lately |= rejected == self._rejected
        return result

    async def whole(self, request: Request) -> Any:
        """The decoded body of the response. Raises Fault."""
        with faults(self._config, self._section):
            body = await self._client.post(request.path, body=request.body, cast_to=object)
        return decoded(body)

    async def stream(self, request: Request, usage: bool = True) -> AsyncGenerator[Any, None]:
        """The decoded events of a streamed response. Raises Fault."""
        import openai

        body = {**request.body, "stream": True}
        if usage:
            body["stream_options"] = {"include_usage": True}
        begun = False
        try:
            with faults(self._config, self._section):
                stream = await self._client.post(
                    request.path,
                    body=body,
                    cast_to=object,
                    stream=True,
                    stream_cls=openai.AsyncStream[object],
                )
                begun = True
                async with stream:
                    async for event in stream:
                        yield event
        except Fault as fault:
            fault.in_stream = begun
            raise

    def read_end(self, answer: Answer) -> str:
        """How a complete answer ended: stop or length. Unusual answers are logged once."""
        end = end_of(answer)
        reason = answer.finish_reason
        if end == "stop" and not is_known_end(reason):
            self.warn_once(
                "finish_reason",
                f"the server's finish_reason={line(reason)} is unknown and counts as a normal end",
            )
        if not answer.text and not answer.token_ids:
            message = "the server returned empty content"
            if answer.reasoning:
                message += (
                    ", the text is in its reasoning: disable reasoning on the server or allow more "
                    "tokens"
                )
            self.warn_once("empty", message)
        return end

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning, one for each topic."""
        if topic not in self._logged:
            self._logged.add(topic)
            log.warning("%s: %s", self._section, message)

    async def close(self) -> None:
        await self._client.close()

    async def _retry(self, request: Request, send: Send[T]) -> T:
        for attempt in count():
            try:
                return await self._adapt(request, send)
            except Fault as fault:
                wait = fault.wait or _pause(attempt)
                last = attempt >= self._config.max_retries or wait > LONGEST_WAIT
                if last or fault.kind is not Kind.TRANSIENT:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError

    async def _adapt(self, request: Request, send: Send[T]) -> T:
        """Send a request, with max_completion_tokens once the server has rejected max_tokens."""
        sent = _with_new_limit(request) if self._wants_new_limit else request
        try:
            result = await send(sent)
        except Fault as fault:
            if not self._is_about_limit(sent, fault):
                raise
            sent = _with_new_limit(request)
            try:
                result = await send(sent)
            except Fault as other:
                raise fault if NEW_LIMIT in other.reason else other from None
            self._wants_new_limit = True
        self._accepted.update(sent.body)
        return result

    def _is_about_limit(self, request: Request, fault: Fault) -> bool:
        """Whether max_tokens is unknown to the server, as opposed to too large."""
        if OLD_LIMIT not in request.body or OLD_LIMIT in self._accepted:
            return False
        return fault.kind is not Kind.TRANSIENT and is_unknown(OLD_LIMIT, NEW_LIMIT, fault.reason)

    async def _check(self) -> None:
        """Raise an error unless the server accepts other prompts than the rejected one."""
        async with self._checking:
            if self._has_answered_lately:
                self._has_answered_lately = False
                self._rejected += 1
                return
            try:
                await self._retry(self._probe, self._send_probe)
            except Fault as other:
                if not other.answered:
                    raise self._error(other) from other
            self._has_answered = self._has_answered_lately = True

    async def _send_probe(self, request: Request) -> None:
        end_of(read_answer(await self.whole(request)))

    def _error(self, fault: Fault) -> UserError:
        """The error that stops the run."""
        config, section = self._config, self._section
        server = f"the server at {section}.base_url={config.base_url} {fault.message}"
        if fault.wait is not None and fault.wait > LONGEST_WAIT:
            server += f" and asks to wait {fault.wait:.0f} seconds"
        if self._unlisted and not self._has_answered:
            return UserError(f"{section}.model={config.model}: {server}; {self._unlisted}")
        if fault.kind is Kind.TRANSIENT:
            fails = EngineDied if fault.status is None else ServerFails
            return fails(f"{section}: {server}{' ' if server.endswith('?') else ': '}{KEPT}")
        if fault.kind is Kind.SERVER:
            return UserError(
                f"{section}: {server}: check the address (most end in /v1), "
                f"{section}.model={config.model} and the key in the environment variable "
                f"{config.api_key_env}; {KEPT}"
            )
        return UserError(
            f"{section}: {server} to every request, also to one with a short document: change the "
            f"setting in its message, or check {section}.model={config.model} and the key in "
            f"{config.api_key_env}"
        )


def api_key(config: "SynthesisConfig | JudgeConfig", section: str) -> str:
    """The key for a server. Raises UserError, without the key, if it cannot be sent."""
    key = os.environ.get(config.api_key_env, "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{section}.api_key_env={config.api_key_env}: the key in this environment variable has "
            "characters that are invalid in a key, such as line breaks: set it again"
        )
    return key


def decoded(body: Any) -> Any:
    """A body as JSON; the openai package leaves it a string if its content type is another."""
    if not isinstance(body, str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise not_json(body) from None


@contextmanager
def faults(config: "SynthesisConfig | JudgeConfig", section: str) -> Iterator[None]:
    """Turns errors of the openai package into faults."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        try:
            content = error.response.text
        except RuntimeError:  # the connection broke before the body was read
            content = error.message
        key = api_key(config, section)
        if len(key) >= SHORTEST_SECRET:  # some servers repeat a wrong key
            content = content.replace(key, "…")
        raise fault_of_status(error.status_code, content, error.response.headers) from error
    except openai.APITimeoutError as error:
        message = f"does not answer in time ({section}.timeout={config.timeout:g} seconds)"
        raise Fault(Kind.TRANSIENT, "timeout", message, status=None) from error
    except openai.APIConnectionError as error:
        cause = line(str(error.__cause__ or error))
        message = f"cannot be reached ({cause}): is it running?"
        raise Fault(Kind.TRANSIENT, cause, message, status=None) from error
    except openai.APIError as error:  # in an event of a stream
        body = {"error": error.body or error.message}
        raise fault_in(body) or Fault(Kind.TRANSIENT, error.message) from error
    except (ValueError, RecursionError) as error:  # a cut body, or invalid UTF-8
        raise not_json(str(error)) from error


def _with_new_limit(request: Request) -> Request:
    body = dict(request.body)
    if OLD_LIMIT in body:
        body[NEW_LIMIT] = body.pop(OLD_LIMIT)
    return Request(request.path, body)


def _pause(attempt: int) -> float:
    return min(FIRST_PAUSE * 2.0 ** min(attempt, 10), LONGEST_PAUSE) * random.uniform(0.75, 1.0)
