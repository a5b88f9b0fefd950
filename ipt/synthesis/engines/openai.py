"""Generation by a server with OpenAI's protocol, such as `vllm serve`.

Prompts are sent as token ids, so the server adds nothing to them and does not read special tokens
from a document. Only chat prompts are sent as messages, because servers other than vLLM accept a
JSON schema only with those. See `Server` for retries and errors.
"""

import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied, Generation, Repetitions, Watch, prompt_seed
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

START_RETRIES = 2  # few, so that a missing server is reported quickly
START_TIMEOUT = 30.0  # seconds to list the models
LISTED_MODELS = 8  # in an error message
# Only vLLM receives parameters that the protocol does not have, because other servers (such as
# OpenAI's) may reject unknown ones. These override sampling defaults of the model's folder.
VLLM_OPTIONS = {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SECTION = "synthesis"

log = logging.getLogger(__name__)


class OpenAIEngine:
    """The model `config.model` of the server at `config.base_url`.

    Raises UserError if the server rejects the key, and EngineDied if there is no server.
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
        self._config = config
        self._vocabulary = vocabulary
        self._format = prompt_format
        self._seed = seed
        self._repetitions = Repetitions(vocabulary, prompt_format)
        # whether the server streams, and reports usage in streams, as far as is known
        self._streams = self._streams_usage = True
        if prompt_format.grammar and not self._is_vllm:
            log.warning(
                "synthesis: only vLLM servers support synthesis.max_pairs: no grammar constrains "
                "the output"
            )
        unlisted = "" if models is None else _unlisted(config, models)
        self._server = Server(config, SECTION, self._request(prompt_format.begin(PROBE)), unlisted)
        if unlisted:
            self._server.warn_once("models", f"model={config.model}: {unlisted}; trying it anyway")

    async def generate(
        self, prompt: Prompt, *, priority: int, slot: int, watch: Watch | None = None
    ) -> Generation:
        """See `Engine`. Servers have no priorities. With `stop_at_repetition` outputs are streamed,
        and closing a stream stops the generation.
        """

        async def send(request: Request) -> Generation:
            wanted = bool(watch) or self._config.stop_at_repetition
            while wanted and self._streams:
                try:
                    events = self._server.stream(request, self._streams_usage)
                    return await self._read(events, True, watch)
                except Fault as fault:
                    if fault.in_stream and fault.kind is Kind.TRANSIENT:
                        generation = await self._read(self._whole(request), False)
                        if isinstance(fault, StreamEnded) and fault.empty:
                            self._streams = False
                        return generation
                    if not self._adapt_streams(fault):
                        raise
            return await self._read(self._whole(request), False)

        return await self._server.ask(self._request(prompt), send)

    def close(self) -> None:
        """Nothing to do: the connections end with the event loop."""

    def _request(self, prompt: Prompt) -> Request:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }
        if config.temperature > 0:
            body |= {"top_p": 1, "seed": prompt_seed(prompt, self._seed)}
        if self._is_vllm:
            body |= {**VLLM_OPTIONS, "stop_token_ids": self._format.stop_ids}
        if config.min_p:  # vLLM, llama.cpp and others support it, OpenAI does not
            body["min_p"] = config.min_p
        if self._format.schema is not None and (self._is_vllm or prompt.messages):
            shape = {"name": "output", "strict": True, "schema": self._format.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        if self._format.grammar is not None and self._is_vllm:  # not part of the protocol
            body["structured_outputs"] = {"grammar": self._format.grammar}
        if prompt.messages and not self._is_vllm:
            body["messages"] = [message._asdict() for message in prompt.messages]
            return Request(CHAT, body)
        return Request(COMPLETIONS, {**body, "prompt": prompt.ids})

    def _adapt_streams(self, fault: Fault) -> bool:
        """Change later requests if the server rejects the parameters of a stream; returns whether
        it does.
        """
        if fault.kind is Kind.TRANSIENT or not re.search(r"\bstream", fault.reason, re.IGNORECASE):
            return False
        if self._streams_usage and "stream_options" in fault.reason:
            self._streams_usage = False
        else:
            self._streams = False
        return True

    async def _whole(self, request: Request) -> AsyncGenerator[Any, None]:
        yield await self._server.whole(request)

    async def _read(
        self, events: AsyncGenerator[Any, None], streamed: bool, watch: Watch | None = None
    ) -> Generation:
        """Join the events of an output, up to its first repetition. Without token ids from the
        server, the text is encoded.
        """
        ids: list[int] = []
        text, reasoning, finish_reason = "", "", ""
        cached_tokens, empty = 0, True
        async with aclosing(events):
            async for event in events:
                piece = read_answer(event, streamed)
                empty = False
                cached_tokens = cached_tokens or piece.cached_tokens
                finish_reason = piece.finish_reason or finish_reason
                reasoning += piece.reasoning
                for token in piece.token_ids:
                    ids.append(token)
                    if self._config.stop_at_repetition and self._repetitions.ended_by_last(ids):
                        text = self._vocabulary.decode_continuation(ids)
                        return Generation(ids, text, "repetition", cached_tokens)
                text += piece.text
                if not ids and self._repeats(piece.text, text):
                    ids = self._vocabulary.encode_continuation(text)
                    return Generation(ids, text, "repetition", cached_tokens)
                if watch:
                    watch(text)
        if not finish_reason and streamed:
            raise StreamEnded(empty)
        if not finish_reason:  # so its streams do not show whether they are complete
            self._streams = False
        answer = Answer(text, reasoning, tuple(ids), finish_reason, cached_tokens)
        end = self._server.read_end(answer)
        if ids:
            text_ids = ids[:-1] if ids[-1] in self._format.stop_ids else ids
            text = self._vocabulary.decode_continuation(text_ids)
        else:
            ids = self._vocabulary.encode_continuation(text)
            if end == "stop":
                ids += self._format.stop_ids[:1]
        return Generation(ids, text, end, cached_tokens)

    def _repeats(self, last: str, text: str) -> bool:
        """Whether `text`, which ends with the new part `last`, repeats a question."""
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
                f"{server} rejects the key in the environment variable {config.api_key_env} "
                f"(synthesis.api_key_env): {fault.reason}"
            ) from fault
        if fault.kind is Kind.TRANSIENT and fault.status != NO_ERROR:
            raise EngineDied(f"{server} {fault.message}: {KEPT}") from fault
        log.warning(f"{server} does not list its models: it {fault.message}")
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
            for name in (card.get("id"), card.get("name"), card.get("model")):
                if name:
                    owners[str(name)] = str(card.get("owned_by"))
    return owners


def _unlisted(config: "SynthesisConfig", models: dict[str, str]) -> str:
    """An error message if the server does not list the model; otherwise ""."""
    if {config.model, f"{config.model}:latest"} & models.keys():
        return ""
    names = ", ".join([*models][:LISTED_MODELS]) or "none"
    more = f" and {len(models) - LISTED_MODELS} more" if len(models) > LISTED_MODELS else ""
    return f"the server has no such model, it has {names}{more}"
