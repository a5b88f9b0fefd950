"""A client for servers that speak OpenAI's protocol, which tells faults of a prompt from others.

A fault that may pass (429, 5xx, a broken connection, an error inside an answer) is retried with
growing pauses, or after as long as the server asks. A rejected prompt concerns this prompt alone
only if the server has answered another one since the last rejection; if it has not, a short probe
with the same parameters decides. So a parameter that the server does not know, or credit that runs
out, stops the run, and a flagged document does not.
"""

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ipt.console import console
from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied, PromptRefused
from ipt.synthesis.engines.answers import (
    ENDS,
    Answer,
    Fault,
    Kind,
    end_of,
    fault_in,
    fault_of_status,
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
NO_KEY = "none"  # for a server that wants no key: the library insists on one
SHORTEST_SECRET = 8  # characters; placeholders such as "none" and "EMPTY" are shorter
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between tries
LONGEST_WAIT = 600.0  # seconds: a server that asks for more stops the run
OLD_LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
KEPT = "what is finished is kept, run the same command again"


class Request(NamedTuple):
    """A request to an endpoint. `more`: parameters that the protocol does not have."""

    path: str
    body: dict[str, Any]


class ServerFails(EngineDied):
    """The server answers, but after all tries only with errors that may pass."""


Send = Callable[[Request], Awaitable[T]]


class Server:
    """The server that a section of the config (synthesis or filters.judge) names.

    `probe` is a short request with the parameters of all others. `unlisted` is what an error adds
    if the server does not list the model and has answered nothing.
    """

    def __init__(
        self,
        config: "SynthesisConfig | JudgeConfig",
        section: str,
        probe: Request,
        unlisted: str = "",
    ) -> None:
        import openai

        self._config, self._section, self._probe = config, section, probe
        self._unlisted = unlisted
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key(config, section),
            max_retries=0,  # counted here, together with those after errors inside answers
            timeout=config.timeout,
            # The library's own closes itself when it is collected, in whatever event loop runs
            # then.
            http_client=openai.DefaultAsyncHttpxClient(timeout=config.timeout),
        )
        self._has_answered = False  # ever
        self._has_answered_lately = False  # a request that was sent after the last rejected prompt
        self._rejected = 0
        self._checking = asyncio.Lock()
        self._accepted: set[str] = set()  # parameters of requests that were answered
        self._wants_new_limit = False
        self._said: set[str] = set()

    async def ask(self, request: Request, send: Send[T]) -> T:
        """The result of `send(request)`, which raises Fault where there is none.

        Raises PromptRefused if the server does not take this prompt, UserError if it takes none and
        EngineDied if it keeps failing.
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
            raise PromptRefused(fault.words) from fault
        self._has_answered = True
        self._has_answered_lately |= rejected == self._rejected
        return result

    async def whole(self, request: Request) -> Any:
        """The decoded body of the answer to a request. Raises Fault."""
        with faults(self._config, self._section):
            body = await self._client.post(request.path, body=request.body, cast_to=object)
        return decoded(body)

    async def stream(self, request: Request, usage: bool = True) -> AsyncGenerator[Any, None]:
        """The decoded events of a streamed answer, as they come. Raises Fault."""
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
        """stop or length: how a whole answer ended; what is odd about it is logged once."""
        end = end_of(answer)
        reason = answer.finish_reason
        if end == "stop" and reason and reason not in ENDS:
            said = (
                f"the server's finish_reason={line(reason)} is unknown and counts as a normal end"
            )
            self.say_once(said, "finish_reason")
        if not answer.text and not answer.token_ids:
            said = "the server returned empty content"
            if answer.reasoning:
                said += (
                    ", the text is in its reasoning: disable that on the server or allow more "
                    "tokens"
                )
            self.say_once(said, "empty")
        return end

    def say_once(self, message: str, topic: str) -> None:
        """Show a message, one for each topic."""
        if topic not in self._said:
            self._said.add(topic)
            console.print(f"{self._section}: {message}", style="yellow", markup=False)

    async def close(self) -> None:
        await self._client.close()

    async def _retry(self, request: Request, send: Send[T]) -> T:
        for attempt in count():
            try:
                return await self._adapt(request, send)
            except Fault as fault:
                wait = fault.wait or _pause(attempt)
                last = attempt >= self._config.max_retries or wait > LONGEST_WAIT
                if last or fault.kind is not Kind.PASSING:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError

    async def _adapt(self, request: Request, send: Send[T]) -> T:
        """Send a request, with max_completion_tokens once the server rejects max_tokens."""
        asked = _with_new_limit(request) if self._wants_new_limit else request
        try:
            result = await send(asked)
        except Fault as fault:
            if not self._is_about_limit(asked, fault):
                raise
            asked = _with_new_limit(request)
            try:
                result = await send(asked)
            except Fault as other:
                raise fault if NEW_LIMIT in other.words else other from None
            self._wants_new_limit = True
        self._accepted.update(asked.body)
        return result

    def _is_about_limit(self, request: Request, fault: Fault) -> bool:
        """Whether a server does not know max_tokens, rather than finding it too large."""
        if OLD_LIMIT not in request.body or OLD_LIMIT in self._accepted:
            return False
        return fault.kind is not Kind.PASSING and is_unknown(OLD_LIMIT, NEW_LIMIT, fault.words)

    async def _check(self) -> None:
        """Raise an error unless the server takes other prompts than the rejected one."""
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

    def _error(self, fault: Fault) -> Exception:
        """What stops the run."""
        config, section = self._config, self._section
        server = f"the server at {section}.base_url={config.base_url} {fault.said}"
        if fault.wait is not None and fault.wait > LONGEST_WAIT:
            server += f" and asks to wait {fault.wait:.0f} seconds"
        if self._unlisted and not self._has_answered:
            return UserError(f"{section}.model={config.model}: {server}; {self._unlisted}")
        server = f"{section}: {server}"
        if fault.kind is Kind.PASSING:
            fails = EngineDied if fault.status is None else ServerFails
            return fails(f"{server}{' ' if server.endswith('?') else ': '}{KEPT}")
        if fault.kind is Kind.SERVER:
            remedy = (
                f"check the address (most end in /v1), {section}.model={config.model} and the key "
                f"in the environment variable {config.api_key_env}"
            )
            return UserError(f"{server}: {remedy}; {KEPT}")
        return UserError(
            f"{server} to every request, also to one with a short document: change the setting "
            "that it "
            f"names, or check {section}.model={config.model} and the key in {config.api_key_env}"
        )


def api_key(config: "SynthesisConfig | JudgeConfig", section: str) -> str:
    """The key for a server. Raises UserError for one that cannot be sent; the key is not shown."""
    key = os.environ.get(config.api_key_env, "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{section}.api_key_env={config.api_key_env}: the key in this environment variable has "
            "characters that no key has (line breaks, quotes of a word processor): set it again"
        )
    return key


def decoded(body: Any) -> Any:
    """A body as JSON: the library leaves it a text where its content type is another."""
    if not isinstance(body, str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise not_json(body) from None


@contextmanager
def faults(config: "SynthesisConfig | JudgeConfig", section: str) -> Iterator[None]:
    """The library's errors as faults."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        try:
            content = error.response.text
        except RuntimeError:  # it broke off before it could be read
            content = error.message
        key = api_key(config, section)
        if len(key) >= SHORTEST_SECRET:  # some servers repeat a wrong key
            content = content.replace(key, "…")
        raise fault_of_status(error.status_code, content, error.response.headers) from error
    except openai.APITimeoutError as error:
        said = f"does not answer in time ({section}.timeout={config.timeout:g} seconds)"
        raise Fault(Kind.PASSING, "timeout", said, status=None) from error
    except openai.APIConnectionError as error:
        cause = line(str(error.__cause__ or error))
        said = f"cannot be reached ({cause}): is it running?"
        raise Fault(Kind.PASSING, cause, said, status=None) from error
    except openai.APIError as error:  # an event of a stream
        body = {"error": error.body or error.message}
        raise fault_in(body) or Fault(Kind.PASSING, error.message) from error
    except (ValueError, RecursionError) as error:  # half an answer, or bytes that are no text
        raise not_json(str(error)) from error


def _with_new_limit(request: Request) -> Request:
    body = dict(request.body)
    if OLD_LIMIT in body:
        body[NEW_LIMIT] = body.pop(OLD_LIMIT)
    return Request(request.path, body)


def _pause(attempt: int) -> float:
    return min(FIRST_PAUSE * 2.0 ** min(attempt, 10), LONGEST_PAUSE) * random.uniform(0.75, 1.0)
