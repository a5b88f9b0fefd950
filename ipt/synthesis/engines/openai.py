"""Generation by a server that speaks OpenAI's protocol, such as `vllm serve`.

Prompts go out as token ids, so that the server adds nothing to them and reads no special token from a document. Only chat prompts go
out as messages, because servers other than vLLM take a JSON schema with those alone. What fails for a reason that may pass (429, 5xx,
a broken connection) is tried again after longer and longer pauses, by the client library.
"""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from ipt.console import console
from ipt.synthesis.engines import EngineDied, Generation, PromptRefused, Repetitions, Watch
from ipt.synthesis.prompts import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    import openai

    from ipt.config import SynthesisConfig

NO_KEY = "none"  # for a server that wants no key: the library insists on one
START_RETRIES = 2  # a server that is not there is told at once, one that hiccups is not
START_TIMEOUT = 30.0  # seconds to list its models: one that hangs is told before long
REFUSED = (400, 413, 422)  # this prompt cannot be run, others may
LISTED_MODELS = 8  # in an error
# vLLM alone is asked for more than the protocol has, because servers may refuse what they do not know (OpenAI's own does). These put
# back what `vllm serve` would take from the model's folder.
VLLM_OPTIONS = {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class OpenAIEngine:
    """The model `config.model` of the server at `config.base_url`.

    Raises ValueError if the server does not accept the key or has no such model, EngineDied if there is no server.
    """

    def __init__(self, config: "SynthesisConfig", vocabulary: Vocabulary, prompt_format: PromptFormat, seed: int) -> None:
        self._is_vllm = _find_model(config).owned_by == "vllm"
        self._config, self._vocabulary, self._format, self._seed = config, vocabulary, prompt_format, seed
        self._repetitions = Repetitions(vocabulary, prompt_format)
        if prompt_format.grammar and not self._is_vllm:
            console.print("synthesis: only a vLLM server takes synthesis.max_pairs: outputs are not held to their format", style="yellow")
        self._client = new_client(config.base_url, config.api_key_env, config.max_retries, config.timeout)

    async def generate(self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None) -> Generation:
        """See `Engine`. The server knows no priority; with `stop_at_repetition` what it generates is streamed and broken off."""
        import openai

        create, request = self._request(prompt)
        with _errors(self._config):
            if watch or self._config.stop_at_repetition:
                stream = await create(**request, stream=True, stream_options={"include_usage": True})
                try:
                    async with stream:
                        return await self._read(stream, watch)
                except openai.APIConnectionError:
                    pass  # the library does not try again what breaks off midway: asked for once more below, as a whole
            return await self._read(_alone(await create(**request)))

    def close(self) -> None:
        """Nothing to end: the connections go with the event loop."""

    def _request(self, prompt: Prompt) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The method of the client that this prompt is for, and its arguments."""
        config, schema = self._config, self._format.schema
        request: dict[str, Any] = {"model": config.model, "max_tokens": config.max_new_tokens, "temperature": config.temperature}
        if config.temperature > 0:
            request |= {"top_p": 1, "seed": (self._seed + crc32(bytes(str(prompt.ids), "ascii"))) % 2**31}
        more = {"min_p": config.min_p} if config.min_p else {}  # vLLM, llama.cpp and others know it, the protocol's owner does not
        shape: dict[str, Any] = {}
        if schema is not None:
            shape = {"response_format": {"type": "json_schema", "json_schema": {"name": "output", "strict": True, "schema": schema}}}
        elif self._format.grammar is not None and self._is_vllm:  # no part of the protocol
            shape = {"structured_outputs": {"grammar": self._format.grammar}}
        if prompt.messages and not self._is_vllm:
            messages = [message._asdict() for message in prompt.messages]
            return self._client.chat.completions.create, {**request, "messages": messages, **shape, "extra_body": more}
        extra = {**VLLM_OPTIONS, "stop_token_ids": self._format.stop_ids, **shape, **more} if self._is_vllm else more
        return self._client.completions.create, {**request, "prompt": prompt.ids, "extra_body": extra}

    async def _read(self, events: AsyncIterator[Any], watch: Watch | None = None) -> Generation:
        """Put an output together, up to its first repetition. The text is encoded anew where the server does not tell token ids."""
        ids: list[int] = []
        text, finish_reason, cached_tokens = "", None, 0
        async for event in events:
            chunk = _chunk(event)
            cached_tokens = cached_tokens or chunk.cached_tokens
            finish_reason = chunk.finish_reason or finish_reason
            for token in chunk.token_ids:
                ids.append(token)
                if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids):
                    return Generation(ids, self._vocabulary.decode_continuation(ids), "repetition", cached_tokens)
            text += chunk.text
            if not ids and self._repeats(chunk.text, text):
                return Generation(self._vocabulary.encode_continuation(text), text, "repetition", cached_tokens)
            if watch:
                watch(text)
        if finish_reason not in ("stop", "length"):
            raise PromptRefused(f"the server ended the request with finish_reason={finish_reason}")
        if ids:
            text = self._vocabulary.decode_continuation(ids[:-1] if ids[-1] in self._format.stop_ids else ids)
        else:
            ids = self._vocabulary.encode_continuation(text) + self._format.stop_ids[:1] * (finish_reason == "stop")
        return Generation(ids, text, finish_reason, cached_tokens)

    def _repeats(self, last: str, text: str) -> bool:
        """Whether `text`, of which `last` has just come, asks a question again."""
        if not self._config.stop_at_repetition or self._format.pair_end[-1] not in last:
            return False
        return self._format.parse(text).rejected["repeated_question"] > 0


def new_client(base_url: str, api_key_env: str, max_retries: int, timeout: float) -> "openai.AsyncOpenAI":
    """A client for the server at `base_url`, with the key from the environment variable `api_key_env` if that is set."""
    import openai

    key = os.environ.get(api_key_env) or NO_KEY
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout)


class _Chunk(NamedTuple):
    text: str
    token_ids: list[int]
    finish_reason: str | None
    cached_tokens: int


def _chunk(event: Any) -> _Chunk:
    """What is in an answer, or in a piece of a streamed one, of either endpoint."""
    details = event.usage and event.usage.prompt_tokens_details
    cached_tokens = (details and details.cached_tokens) or 0
    if not event.choices:
        return _Chunk("", [], None, cached_tokens)
    choice = event.choices[0]
    message = getattr(choice, "delta", None) or getattr(choice, "message", None)
    text = choice.text if message is None else message.content
    return _Chunk(text or "", getattr(choice, "token_ids", None) or [], choice.finish_reason, cached_tokens)


async def _alone(event: Any) -> AsyncIterator[Any]:
    yield event


def _find_model(config: "SynthesisConfig") -> "openai.types.Model":
    """What the server says of `config.model`."""
    import openai

    retries, timeout = min(START_RETRIES, config.max_retries), min(START_TIMEOUT, config.timeout)
    key = os.environ.get(config.api_key_env) or NO_KEY
    with _errors(config), openai.OpenAI(base_url=config.base_url, api_key=key, max_retries=retries, timeout=timeout) as client:
        try:
            models = {model.id: model for model in client.models.list()}
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ValueError(
                f"synthesis.base_url={config.base_url}: the server does not accept the key in the environment variable "
                f"{config.api_key_env} (synthesis.api_key_env): {_line(error.message)}"
            ) from None
    if config.model not in models:
        more = f" and {len(models) - LISTED_MODELS} more" if len(models) > LISTED_MODELS else ""
        raise ValueError(
            f"synthesis.model={config.model}: the server at synthesis.base_url={config.base_url} has no such model, "
            f"it has {', '.join([*models][:LISTED_MODELS]) or 'none'}{more}"
        )
    return models[config.model]


@contextmanager
def _errors(config: "SynthesisConfig") -> Iterator[None]:
    """The library's errors as those of engines."""
    import openai

    server = f"synthesis.engine=openai: the server at synthesis.base_url={config.base_url}"
    remedy = "what is finished is kept, run the same command again"
    try:
        yield
    except openai.APIStatusError as error:
        if error.status_code in REFUSED:
            raise PromptRefused(_line(error.message)) from error
        if error.status_code in (401, 403, 404):
            remedy = f"check the address (most end in /v1), synthesis.model={config.model} and the key in {config.api_key_env}"
        raise EngineDied(f"{server} answers {error.status_code} ({_line(error.message)}): {remedy}") from error
    except openai.APITimeoutError as error:
        raise EngineDied(f"{server} does not answer in time (synthesis.timeout={config.timeout:g} seconds): {remedy}") from error
    except openai.APIConnectionError as error:
        raise EngineDied(f"{server} cannot be reached ({_line(str(error.__cause__ or error))}): is it running? {remedy}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EngineDied(f"{server} answers with what is no JSON ({_line(str(error))}): does it speak this protocol? {remedy}") from error
    except openai.APIError as error:  # told in the middle of a stream
        raise EngineDied(f"{server} has failed ({_line(error.message)}): {remedy}") from error


def _line(message: str) -> str:
    return " ".join(message.split())[:300]
