"""Token stores: documents as token ids in memory-mapped shards that are written once and read at random."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ipt.stage import atomic, hash_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN, OFFSET, LOSS = np.dtype("<u4"), np.dtype("<i8"), np.dtype("u1")


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of one document and, where only a part of it is trained on, a 1 for each token that is a target."""

    tokens: np.ndarray
    is_target: np.ndarray | None = None


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that decides how text becomes ids; stores of different fingerprints never mix."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation"), backend.pop("padding")  # runtime settings, not part of the vocabulary
    return hash_json([backend, tokenizer.bos_token_id, tokenizer.eos_token_id])[:16]


def write_store(folder: Path, documents: Iterable[EncodedDocument], fingerprint: str, shard_tokens: int) -> None:
    """Write `documents` in order as `shard-00000`, `shard-00001`, … of about `shard_tokens` tokens each.

    A shard exists once its `index.json` does, which is written last.
    """
    shard: list[EncodedDocument] = []
    shards = held = 0
    for document in documents:
        shard.append(document)
        held += len(document.tokens)
        if held >= shard_tokens:
            _write_shard(folder / f"shard-{shards:05d}", shard, fingerprint)
            shard, held, shards = [], 0, shards + 1
    if shard or not shards:
        _write_shard(folder / f"shard-{shards:05d}", shard, fingerprint)


def _write_shard(folder: Path, documents: Sequence[EncodedDocument], fingerprint: str) -> None:
    offsets = np.zeros(len(documents) + 1, OFFSET)
    np.cumsum([len(document.tokens) for document in documents], out=offsets[1:])
    masked = any(document.is_target is not None for document in documents)
    with atomic(folder / "tokens.bin") as temporary, temporary.open("wb") as file:
        for document in documents:
            file.write(document.tokens.astype(TOKEN).tobytes())
    if masked:
        with atomic(folder / "loss.bin") as temporary, temporary.open("wb") as file:
            for document in documents:
                target = np.ones(len(document.tokens)) if document.is_target is None else document.is_target
                file.write(target.astype(LOSS).tobytes())
    with atomic(folder / "offsets.npy") as temporary, temporary.open("wb") as file:
        np.save(file, offsets)
    index = {"tokenizer": fingerprint, "n_docs": len(documents), "n_tokens": int(offsets[-1]), "has_loss_mask": masked}
    write_json(folder / "index.json", index)


class TokenStore:
    """Random access to the documents of a store.

    `lengths[i]` is the number of tokens of document i. Raises ValueError naming the shard when a shard is cut short or
    was made with another tokenizer than the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = sorted(path.parent for path in folder.glob("shard-*/index.json"))
        if not shards:
            raise FileNotFoundError(f"{folder} is not a token store: it holds no shard-*/index.json")
        indices = [json.loads((shard / "index.json").read_text()) for shard in shards]
        self.fingerprint: str = indices[0]["tokenizer"]
        self._offsets: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._loss: list[np.ndarray | None] = []
        for shard, index in zip(shards, indices, strict=True):
            self._open_shard(shard, index)
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self._first = np.cumsum(np.array([0, *(len(offsets) - 1 for offsets in self._offsets)]))
        self.n_tokens = int(self.lengths.sum())

    def _open_shard(self, shard: Path, index: dict) -> None:
        if index["tokenizer"] != self.fingerprint:
            raise ValueError(
                f"{shard} was made with another tokenizer ({index['tokenizer']}) than the store ({self.fingerprint}): tokenise it again"
            )
        expected: dict[str, np.dtype] = {"tokens.bin": TOKEN} | ({"loss.bin": LOSS} if index["has_loss_mask"] else {})
        for name, dtype in expected.items():
            size = (shard / name).stat().st_size
            expected_size = index["n_tokens"] * dtype.itemsize
            if size != expected_size:
                raise ValueError(f"{shard / name} has {size} bytes, not {expected_size}: the shard is damaged, tokenise it again")
        self._offsets.append(np.load(shard / "offsets.npy"))
        self._tokens.append(_map(shard / "tokens.bin", TOKEN))
        self._loss.append(_map(shard / "loss.bin", LOSS) if index["has_loss_mask"] else None)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `start:end` of a document, as uint32; past its end there are none."""
        shard, first, last = self._span(document, start, end)
        return self._tokens[shard][first:last]

    def is_target(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray | None:
        """For tokens `start:end`, whether each is trained on; None when all are."""
        shard, first, last = self._span(document, start, end)
        loss = self._loss[shard]
        return None if loss is None else loss[first:last].astype(bool)

    def _span(self, document: int, start: int, end: int | None) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        local = document - self._first[shard]
        begin, stop = self._offsets[shard][local], self._offsets[shard][local + 1]
        return shard, int(begin + start), int(stop if end is None else min(begin + end, stop))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a file; an empty one, which cannot be mapped, gives an empty array."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
