"""Shards: a fixed number of documents each, in order. A shard's output appears whole, by an atomic
rename, or not at all.
"""

import hashlib
import json
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import SynthesisConfig
from ipt.console import console
from ipt.errors import MissingFileError, UserError
from ipt.files import note_hash, reading_parquet, write_parquet
from ipt.synthesis.chains import Piece, Round, fit, plan_chains
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import Prompt, PromptFormat

SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chain_id", pa.int64()),
        ("round", pa.int8()),
        ("text", pa.string()),
        ("pairs", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
        ("inherits_previous", pa.bool_()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("raw_output", pa.string()),
        ("rewrite", pa.string()),
    ]
)
ACCOUNT = b"ipt.synthesis"  # Parquet metadata: what the rows of a shard do not tell
SHOWN_REFUSALS, OTHER_REFUSALS = 20, "other reasons"
CHAINS_PER_SHARD = 10**9  # chain_id = shard * CHAINS_PER_SHARD + chain in the shard


@dataclass(frozen=True)
class ShardPlan:
    """The chains of one shard, and what happened to documents that are in no chain or in pieces."""

    documents: int
    chains: list[list[Piece]]
    dropped: Counter[str]  # documents by reason
    long_documents: Counter[str]  # split and truncated documents, and the pieces of the split ones


class Documents:
    """The rows of `folder/part-*.parquet` in order, cut into shards of `shard_size`, each read on
    its own.

    Raises MissingFileError where there is none.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self._shard_size = folder, shard_size
        self._groups: list[tuple[Path, int]] = []  # row groups of the files: file, number in it
        self._ends = [0]  # rows before each group, and in all
        for path in sorted(folder.glob("part-*.parquet")):
            with reading_parquet(path):
                metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._ends.append(self._ends[-1] + metadata.row_group(group).num_rows)
        self.rows = self._ends[-1]
        if not self.rows:
            raise MissingFileError(
                f"{folder}: no documents in part-*.parquet, nothing to synthesise from: check the "
                "corpus stage"
            )
        self.shards = -(-self.rows // shard_size)

    def size(self, index: int) -> int:
        return min(self._shard_size, self.rows - index * self._shard_size)

    def shard(self, index: int) -> list[dict[str, Any]]:
        """The rows (doc_id, text) of one shard."""
        first, last = index * self._shard_size, index * self._shard_size + self.size(index)
        rows: list[dict[str, Any]] = []
        for number in range(bisect_right(self._ends, first) - 1, bisect_left(self._ends, last)):
            path, group = self._groups[number]
            with reading_parquet(path), pq.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=["doc_id", "text"])
            start = max(first - self._ends[number], 0)
            rows += table.slice(start, last - self._ends[number] - start).to_pylist()
        return rows


def part_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def plan_shard(
    documents: list[dict[str, Any]], config: SynthesisConfig, prompt_format: PromptFormat
) -> ShardPlan:
    """Fit each document to its limit and deal the pieces to chains; every document is in a chain or
    in `dropped`.
    """
    pieces: list[Piece] = []
    dropped: Counter[str] = Counter()
    long_documents: Counter[str] = Counter()
    limit = config.max_model_len - config.max_new_tokens
    if config.max_document_tokens is not None:
        limit = min(limit, config.max_document_tokens + len(prompt_format.begin("").ids))
    for index, document in enumerate(documents):
        if not document["text"].strip():
            dropped["empty"] += 1
            continue
        prompt = prompt_format.begin(document["text"])
        if len(prompt.ids) <= limit:
            pieces.append(Piece(document["doc_id"], document["text"], prompt, index))
            continue
        texts, action = fit(
            document["text"],
            config.long_documents,
            limit,
            lambda text: len(prompt_format.begin(text).ids),
        )
        if not texts:
            dropped[action] += 1
            continue
        long_documents[action] += 1
        names = [document["doc_id"]]
        if action == "split":
            long_documents["pieces"] += len(texts)
            names = [f"{document['doc_id']}#{number}" for number in range(len(texts))]
        new_piece = partial(Piece, document=index, share=1 / len(texts))
        pieces += [
            new_piece(name, text, prompt_format.begin(text))
            for name, text in zip(names, texts, strict=True)
        ]
    return ShardPlan(len(documents), plan_chains(pieces, config.shots), dropped, long_documents)


class Shard:
    """A shard that is being worked on: its plan, its journal, and the rounds that are finished."""

    def __init__(self, folder: Path, index: int, plan: ShardPlan) -> None:
        self.index, self.plan = index, plan
        self.journal = Journal(folder / f".part-{index:05d}.journal.jsonl")
        self._path = part_path(folder, index)
        self._rounds: list[tuple[int, Round]] = []

    def add(self, chain: int, finished: Round) -> bool:
        """Take a finished round; when it was the shard's last one the shard is written, and this
        returns True.
        """
        self._rounds.append((chain, finished))
        if len(self._rounds) < sum(len(pieces) for pieces in self.plan.chains):
            return False
        self.write()
        return True

    def write(self) -> None:
        """Write the rows, sorted by chain and round, then drop the journal."""
        self._rounds.sort(key=lambda item: (item[0], item[1].number))
        rows = [
            _row(self.index * CHAINS_PER_SHARD + chain, finished)
            for chain, finished in self._rounds
        ]
        write_parquet(
            self._path,
            rows,
            SCHEMA.with_metadata({ACCOUNT: json.dumps(self._account(), sort_keys=True).encode()}),
        )
        note_hash(self._path)
        self.journal.remove()

    def _account(self) -> dict[str, Any]:
        with_pairs = {
            finished.piece.document for _, finished in self._rounds if finished.parsed.pairs
        }
        rejected: Counter[str] = Counter()
        for _, finished in self._rounds:
            if finished.generation.finish_reason != "error":  # there is no output to reject
                rejected.update(finished.parsed.rejected)
        return {
            "documents": self.plan.documents,
            "documents_with_pairs": len(with_pairs),
            "dropped": dict(self.plan.dropped),
            "long_documents": dict(self.plan.long_documents),
            "rejected": dict(rejected),
            "refused": most_frequent(self._refusals()),
            "well_formed": sum(_well_formed(finished) for _, finished in self._rounds),
            "cached_tokens": sum(finished.generation.cached_tokens for _, finished in self._rounds),
        }

    def _refusals(self) -> Counter[str]:
        refusals = (finished.generation.refusal for _, finished in self._rounds)
        return Counter(refusal for refusal in refusals if refusal)


def most_frequent(refusals: Counter[str]) -> dict[str, int]:
    """Counts of the most frequent refusals; the others, which may be as many as documents, as one."""
    shown = dict(refusals.most_common(SHOWN_REFUSALS))
    if len(refusals) > SHOWN_REFUSALS:
        shown[OTHER_REFUSALS] = (
            shown.get(OTHER_REFUSALS, 0) + refusals.total() - sum(shown.values())
        )
    return shown


def read_account(path: Path) -> dict[str, Any]:
    """What `Shard` recorded about the shard at `path`. Raises UserError for a file that it did not
    write.
    """
    with reading_parquet(path):
        metadata = pq.read_schema(path).metadata or {}
    if ACCOUNT not in metadata:
        raise UserError(
            f"{path}: no output of the synthesis stage (its metadata has no {ACCOUNT.decode()}): "
            "run synthesis again"
        )
    account = json.loads(metadata[ACCOUNT])
    assert isinstance(account, dict)
    return account


def _well_formed(finished: Round) -> bool:
    """Not cut, something found, and nothing rejected but questions that were asked before."""
    whole = finished.generation.finish_reason in ("stop", "repetition")
    return (
        whole and finished.parsed.found and set(finished.parsed.rejected) <= {"repeated_question"}
    )


def _row(chain_id: int, finished: Round) -> dict[str, Any]:
    return {
        "doc_id": finished.piece.doc_id,
        "chain_id": chain_id,
        "round": finished.number,
        "text": finished.piece.text,
        "pairs": [pair._asdict() for pair in finished.parsed.pairs],
        "inherits_previous": finished.inherits_previous,
        "finish_reason": finished.generation.finish_reason,
        "prompt_tokens": finished.prompt_tokens,
        "output_tokens": len(finished.generation.token_ids),
        "raw_output": finished.generation.text,
        "rewrite": finished.parsed.rewrite,
    }


# Journal
# ----------------------------------------------------------------------------------------------


class Journal:
    """Generations by chain and round. What an earlier run wrote is read first; a torn last line is
    cut off, a damaged one passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {(entry["chain"], entry["round"]): entry for entry in _read(path)}
        self._file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._known)

    def find(self, chain: int, number: int, prompt: Prompt) -> Generation | None:
        """The generation that an earlier run got for this very prompt at this place; None if there
        is none.
        """
        entry = self._known.get((chain, number))
        if entry is None or entry["prompt"] != _digest(prompt):
            return None
        return Generation(
            entry["token_ids"],
            entry["text"],
            entry["finish_reason"],
            entry["cached_tokens"],
            entry.get("refusal", ""),
        )

    def add(self, chain: int, number: int, prompt: Prompt, generation: Generation) -> None:
        entry = {"chain": chain, "round": number, "prompt": _digest(prompt), **generation._asdict()}
        line = json.dumps(entry)
        self._file.write(f"{_checksum(line.encode())} {line}\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the file, once the shard is written."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal; the file is cut back to them, so that what is appended begins
    a line.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    lines = [line.partition(b" ") for line in whole.splitlines()]
    entries = [
        json.loads(line) for checksum, _, line in lines if checksum == _checksum(line).encode()
    ]
    if damaged := len(lines) - len(entries):
        console.print(
            f"{path}: {damaged} of {len(lines)} generations are damaged and made again",
            style="yellow",
            markup=False,
        )
    return entries


def _checksum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _digest(prompt: Prompt) -> str:
    content = array("q", prompt.ids).tobytes() + json.dumps(prompt.messages).encode() * bool(
        prompt.messages
    )
    return hashlib.blake2b(content, digest_size=16).hexdigest()
