"""Documents on disk, and an engine whose output is a pure function of the prompt."""

import asyncio
import json
import random
from pathlib import Path

import pyarrow as pa

from ipt.files import write_parts
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.tags import Pair, pairs_text

DOCUMENTS_SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("meta", pa.string())]
)


def write_documents(folder: Path, texts: list[str]) -> Path:
    rows = [
        {"doc_id": f"d{number}", "text": text, "source": "test", "meta": json.dumps({})}
        for number, text in enumerate(texts)
    ]
    write_parts(folder, rows, DOCUMENTS_SCHEMA, rows_per_part=50)
    return folder


class OracleEngine:
    """The output depends only on the prompt: valid pairs, no pairs, repeated, invalid or truncated
    ones.

    It takes a random time of up to `delay`, so that chains overtake each other. `record` gets a
    line for each prompt. After `limit` prompts the engine waits until its process is killed.
    """

    def __init__(
        self, vocabulary, record: Path | None = None, delay: float = 0.0, limit: int | None = None
    ) -> None:
        self.prompts: list[list[int]] = []
        self.closed = False
        self._vocabulary, self._record, self._delay, self._limit = vocabulary, record, delay, limit

    async def generate(self, prompt, *, priority, slot):
        prompt_ids, eos = prompt.ids, self._vocabulary.eos
        self.prompts.append(prompt_ids)
        if self._limit is not None and len(self.prompts) > self._limit:
            await asyncio.Event().wait()
        if self._record:
            with self._record.open("a") as file:
                file.write(f"{len(prompt_ids)}\n")
        await asyncio.sleep(random.random() * self._delay)
        text, finish_reason = oracle_output(prompt_ids)
        ids = self._vocabulary.encode_continuation(text)
        return Generation(
            ids + [eos] * (finish_reason == "stop"), text, finish_reason, len(prompt_ids) // 2
        )

    def close(self) -> None:
        self.closed = True


def oracle_output(prompt_ids: list[int]) -> tuple[str, str]:
    choice = random.Random(str(prompt_ids))
    pairs = [
        Pair(f"Question {choice.randrange(10**6)} of {number}?", f"Answer — {choice.random()}")
        for number in range(choice.randrange(4))
    ]
    text = pairs_text(pairs)
    kind = choice.random()
    if kind < 0.15:
        return text + "\n\n<QUE> How long is a", "length"
    if kind < 0.3 and pairs:
        return pairs_text([*pairs, pairs[0]]), "stop"
    if kind < 0.4:
        return f"<QUE> no answer </END>\n\n{text}", "stop"
    return text, "stop"
