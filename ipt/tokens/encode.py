"""Encodes rows of text as token ids, one document of a token store per row."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ipt.config import TokensConfig
from ipt.errors import UserError
from ipt.files import hash_json
from ipt.tokens.shards import EncodedDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some tokenizers put a space before the first word of what they encode. A response continues its
# prompt, which ends with a line break, so it is encoded behind one (as
# Vocabulary.encode_continuation does for synthesis).
ANCHOR = "\n"
BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 21  # encoded at a time, at most (a longer row is alone)


@dataclass(frozen=True)
class Encoding:
    """The settings that decide how a row becomes ids, as plain values that can be pickled."""

    backend: str  # the fast tokenizer as JSON
    fingerprint: str
    begin: int | None  # the token before each text
    end: int | None  # the token behind each text
    bos: int | None  # the tokens around each example
    eos: int | None


def encoding_of(tokenizer: "PreTrainedTokenizerBase", config: TokensConfig) -> Encoding:
    """Raises UserError if the tokenizer has no fast implementation, or lacks the BOS or EOS token
    that documents need.
    """
    if config.eos and tokenizer.eos_token_id is None:
        raise UserError("tokens.eos=true, but the tokenizer has no EOS token: set tokens.eos=false")
    return Encoding(
        backend=_backend(tokenizer),
        fingerprint=tokenizer_fingerprint(tokenizer),
        begin=tokenizer.bos_token_id if begins_with_bos(tokenizer, config.bos) else None,
        end=tokenizer.eos_token_id if config.eos else None,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
    )


def begins_with_bos(tokenizer: "PreTrainedTokenizerBase", wish: bool | None) -> bool:
    """Whether documents begin with BOS: as configured, else as the tokenizer does by default."""
    if wish is None:
        return (
            tokenizer.bos_token_id is not None
            and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        )
    if wish and tokenizer.bos_token_id is None:
        raise UserError("tokens.bos=true, but the tokenizer has no BOS token: set tokens.bos=false")
    return wish


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything that affects encoding. Stores with different fingerprints do not mix."""
    return _fingerprint(_backend(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


# parsing and sorting a large vocabulary takes most of a second, and several stages ask for the same
# one
@lru_cache(maxsize=2)
def _fingerprint(backend: str, bos: int | None, eos: int | None) -> str:
    content = json.loads(backend)
    # runtime settings, not part of the vocabulary
    (content.pop("truncation"), content.pop("padding"))
    return hash_json([content, bos, eos])[:16]


class Encoder:
    """The bare tokenizer, without the wrapper of transformers, which takes a large part of the time
    of a call.
    """

    def __init__(self, encoding: Encoding) -> None:
        from tokenizers import Tokenizer

        self._encoding = encoding
        self._backend = Tokenizer.from_str(encoding.backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        # a special token that is spelled out in a document is plain text, not its end
        self._backend.encode_special_tokens = True
        self._anchor: list[int] = self._ids([ANCHOR])[0]

    def encode(self, rows: Iterable[dict[str, Any]]) -> Iterator[EncodedDocument]:
        """Token ids of each row, in order.

        A row has `text`, or `examples` of (prompt, response), of which only the responses are
        trained on: each example is BOS, prompt, response, EOS, and the examples of a row form one
        document. If `fill_to` of such a row is not null, the document is padded to that length with
        EOS tokens that are not trained on.
        """
        for batch in _batches(rows):
            ids = iter(self._ids([part for row in batch for part in _parts(row)]))
            for row in batch:
                if row.get("examples") is None:
                    yield EncodedDocument(self._text(next(ids)))
                else:
                    yield self._examples(len(row["examples"]), ids, row.get("fill_to") or 0)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [
            found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _text(self, ids: list[int]) -> np.ndarray:
        begin, end = self._encoding.begin, self._encoding.end
        if begin is not None:
            ids.insert(0, begin)
        if end is not None:
            ids.append(end)
        return np.array(ids, np.uint32)

    def _examples(self, number: int, ids: Iterator[list[int]], fill_to: int) -> EncodedDocument:
        bos, eos = self._encoding.bos, self._encoding.eos
        if bos is None or eos is None:
            raise UserError(
                "examples of prompt and response need a tokenizer with BOS and EOS tokens: choose "
                "another model"
            )
        tokens: list[int] = []
        target: list[int] = []
        for _ in range(number):
            prompt, response = [bos, *next(ids)], next(ids)
            assert response[: len(self._anchor)] == self._anchor, (
                "a line break and the tag behind it became one token"
            )
            learnt = [*response[len(self._anchor) :], eos]
            tokens += prompt + learnt
            target += [0] * len(prompt) + [1] * len(learnt)
        target += [0] * (fill_to - len(tokens))
        tokens += [eos] * (fill_to - len(tokens))
        return EncodedDocument(np.array(tokens, np.uint32), np.array(target, np.uint8))


def _backend(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{tokenizer.name_or_path}: token stores need a fast tokenizer, one that saves itself "
            "as tokenizer.json"
        )
    return backend.to_str()


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        size = sum(map(len, _parts(row)))
        if batch and (len(batch) == BATCH_ROWS or characters + size > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += size
    if batch:
        yield batch


def _parts(row: dict[str, Any]) -> list[str]:
    """The texts of a row that are encoded on their own."""
    if row.get("examples") is None:
        return [row["text"]]
    return [
        part
        for example in row["examples"]
        for part in (example["prompt"], ANCHOR + example["response"])
    ]
