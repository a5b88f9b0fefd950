"""Generation by a server that speaks OpenAI's protocol, such as `vllm serve`.

Prompts go out as token ids, so that the server adds nothing to them and reads no special token from
a document. Only chat prompts go out as messages, because servers other than vLLM take a JSON schema
with those alone. See `Server` for retries and errors.
"""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ipt.console import console
from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied, Generation, Repetitions, Watch
from ipt.synthesis.engines.answers import (
    NO_ERROR,
    Answer,
    Fault,
    Kind,
    StreamEnded,
    fault_in,
    read_answer,
)
from ipt.synthesis.engines.server import (
    CHAT,
    COMPLETIONS,
    KEPT,
    PROBE,
    Request,
    Server,
    api_key,
    decoded,
    faults,
)
from ipt.synthesis.formats.base import Prompt, PromptFormat, Vocabulary

if TYPE_CHECKING:
    from ipt.config import SynthesisConfig

START_RETRIES = 2  # a server that is not there is told at once, one that hiccups is not
START_TIMEOUT = 30.0  # seconds to list its models: one that hangs is told before long
LISTED_MODELS = 8  # in an error
# vLLM alone is asked for more than the protocol has, because servers may refuse what they do not
# know (OpenAI's own does). These put back what `vllm serve` would take from the model's folder.
VLLM_OPTIONS = {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SECTION = "synthesis"


class OpenAIEngine:
    """The model `config.model` of the server at `config.base_url`.

    Raises UserError if the server does not accept the key, EngineDied if there is no server.
    """

    def __init__(
        self,
        config: "SynthesisConfig",
        vocabulary: Vocabulary,
        prompt_format: PromptFormat,
        seed: int,
    ) -> None:
        models = _list_models(config)
        self._is_vllm = models is not None and models.get(config.model) == "vllm"
        self._config, self._vocabulary, self._format, self._seed = (
            config,
            vocabulary,
            prompt_format,
            seed,
        )
        self._repetitions = Repetitions(vocabulary, prompt_format)
        if prompt_format.grammar and not self._is_vllm:
            console.print(
                "synthesis: only a vLLM server takes synthesis.max_pairs: outputs are not held to "
                "their format",
                style="yellow",
            )
        unlisted = "" if models is None else _unlisted(config, models)
        self._server = Server(config, SECTION, self._request(prompt_format.begin(PROBE)), unlisted)
        if unlisted:
            self._server.say_once(
                f"model={config.model}: the server says that {unlisted}; trying it anyway", "models"
            )
        self._streams = self._streams_usage = True  # until the server says otherwise

    async def generate(
        self, prompt: Prompt, *, priority: int, lane: int, watch: Watch | None = None
    ) -> Generation:
        """See `Engine`. The server knows no priority; with `stop_at_repetition` what it generates
        is streamed and broken off.
        """

        async def send(request: Request) -> Generation:
            wanted = bool(watch) or self._config.stop_at_repetition
            while wanted and self._streams:
                try:
                    return await self._read(
                        self._server.stream(request, self._streams_usage), True, watch
                    )
                except Fault as fault:
                    if fault.in_stream and fault.kind is Kind.PASSING:
                        return await self._ask_whole(request, fault)
                    if not self._adapt_streams(fault):
                        raise
            return await self._read(self._whole(request), False)

        return await self._server.ask(self._request(prompt), send)

    def close(self) -> None:
        """Nothing to end: the connections go with the event loop."""

    def _request(self, prompt: Prompt) -> Request:
        config, schema = self._config, self._format.schema
        body: dict[str, Any] = {
            "model": config.model,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }
        if config.temperature > 0:
            body |= {
                "top_p": 1,
                "seed": (self._seed + crc32(bytes(str(prompt.ids), "ascii"))) % 2**31,
            }
        more: dict[str, Any] = {}
        if config.min_p:  # vLLM, llama.cpp and others know it, OpenAI does not
            more["min_p"] = config.min_p
        shape: dict[str, Any] = {}
        if schema is not None:
            shape = {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "strict": True, "schema": schema},
                }
            }
        elif self._format.grammar is not None and self._is_vllm:  # no part of the protocol
            shape = {"structured_outputs": {"grammar": self._format.grammar}}
        if prompt.messages and not self._is_vllm:
            messages = [message._asdict() for message in prompt.messages]
            return Request(CHAT, {**body, "messages": messages, **shape, **more})
        if self._is_vllm:
            more = {**VLLM_OPTIONS, "stop_token_ids": self._format.stop_ids, **shape, **more}
        return Request(COMPLETIONS, {**body, "prompt": prompt.ids, **more})

    def _adapt_streams(self, fault: Fault) -> bool:
        """Ask otherwise from now on where the server rejects what streaming adds to a request."""
        if fault.kind is Kind.PASSING or not re.search(r"\bstream", fault.words, re.IGNORECASE):
            return False
        if self._streams_usage and "stream_options" in fault.words:
            self._streams_usage = False
        else:
            self._streams = False
        return True

    async def _ask_whole(self, request: Request, fault: Fault) -> Generation:
        """Ask again without streaming after a stream that broke off, or that was none."""
        generation = await self._read(self._whole(request), False)
        if isinstance(fault, StreamEnded) and fault.empty:
            self._streams = False
        return generation

    async def _whole(self, request: Request) -> AsyncGenerator[Any, None]:
        yield await self._server.whole(request)

    async def _read(
        self, events: AsyncGenerator[Any, None], streamed: bool, watch: Watch | None = None
    ) -> Generation:
        """Put an output together, up to its first repetition. The text is encoded anew where the
        server does not tell token ids.
        """
        ids: list[int] = []
        text, reasoning, finish_reason, cached_tokens, empty = "", "", "", 0, True
        async with aclosing(events):
            async for event in events:
                piece, empty = read_answer(event, streamed), False
                cached_tokens = cached_tokens or piece.cached_tokens
                finish_reason = piece.finish_reason or finish_reason
                reasoning += piece.reasoning
                for token in piece.token_ids:
                    ids.append(token)
                    if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids):
                        return Generation(
                            ids,
                            self._vocabulary.decode_continuation(ids),
                            "repetition",
                            cached_tokens,
                        )
                text += piece.text
                if not ids and self._repeats(piece.text, text):
                    return Generation(
                        self._vocabulary.encode_continuation(text),
                        text,
                        "repetition",
                        cached_tokens,
                    )
                if watch:
                    watch(text)
        if not finish_reason and streamed:
            raise StreamEnded(empty)
        if not finish_reason:  # so a stream of this server cannot tell that it is whole
            self._streams = False
        return self._generation(Answer(text, reasoning, tuple(ids), finish_reason, cached_tokens))

    def _generation(self, answer: Answer) -> Generation:
        """A whole answer as a generation."""
        end, text, ids = self._server.read_end(answer), answer.text, list(answer.token_ids)
        if ids:
            text = self._vocabulary.decode_continuation(
                ids[:-1] if ids[-1] in self._format.stop_ids else ids
            )
        else:
            ids = self._vocabulary.encode_continuation(text) + self._format.stop_ids[:1] * (
                end == "stop"
            )
        return Generation(ids, text, end, answer.cached_tokens)

    def _repeats(self, last: str, text: str) -> bool:
        """Whether `text`, of which `last` has just come, asks a question again."""
        if not self._config.stop_at_repetition or self._format.pair_end[-1] not in last:
            return False
        return self._format.parse(text).rejected["repeated_question"] > 0


def _list_models(config: "SynthesisConfig") -> dict[str, str] | None:
    """The server's models and their owners; None if it does not list them."""
    import openai

    client = openai.OpenAI(
        base_url=config.base_url,
        api_key=api_key(config, SECTION),
        max_retries=min(START_RETRIES, config.max_retries),
        timeout=min(START_TIMEOUT, config.timeout),
    )
    try:
        with client, faults(config, SECTION):
            listed = decoded(client.get("/models", cast_to=object))
            if fault := fault_in(listed):
                raise fault
            return _owners(listed)
    except Fault as fault:
        server = f"synthesis: the server at synthesis.base_url={config.base_url}"
        if fault.status == 401:
            raise UserError(
                f"{server} does not accept the key in the environment variable "
                f"{config.api_key_env} (synthesis.api_key_env): {fault.words}"
            ) from fault
        if fault.kind is Kind.PASSING and fault.status != NO_ERROR:
            raise EngineDied(f"{server} {fault.said}: {KEPT}") from fault
        console.print(
            f"{server} does not list its models: it {fault.said}", style="yellow", markup=False
        )
        return None


def _owners(listed: Any) -> dict[str, str]:
    """Names and owners in a list of models, with OpenAI's envelope, another one or none."""
    if isinstance(listed, Mapping):
        listed = listed.get("data") or listed.get("models")
    owners = {}
    for card in listed if isinstance(listed, list) else []:
        if isinstance(card, str):
            owners[card] = ""
        elif isinstance(card, Mapping):
            names = [card.get(key) for key in ("id", "name", "model")]
            owners |= {str(name): str(card.get("owned_by")) for name in names if name}
    return owners


def _unlisted(config: "SynthesisConfig", models: dict[str, str]) -> str:
    """What is wrong with a model that the server does not list; "" if it does."""
    if {config.model, f"{config.model}:latest"} & models.keys():
        return ""
    more = f" and {len(models) - LISTED_MODELS} more" if len(models) > LISTED_MODELS else ""
    return f"it has no such model, it has {', '.join([*models][:LISTED_MODELS]) or 'none'}{more}"
