"""Shards: groups of a fixed number of documents, in order. The output of a shard appears by an
atomic rename, complete or not at all; until then a journal keeps its finished generations.
"""

import hashlib
import json
import logging
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import SynthesisConfig
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
ACCOUNT = b"ipt.synthesis"  # key of the Parquet metadata with counts that the rows do not contain
SHOWN_REFUSALS, OTHER_REFUSALS = 20, "other reasons"
CHAINS_PER_SHARD = 10**9  # chain_id = shard * CHAINS_PER_SHARD + chain in the shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """The chains of one shard, and the documents that were dropped, split or truncated."""

    documents: int
    chains: list[list[Piece]]
    dropped: Counter[str]  # documents by reason
    # split and truncated documents, and the number of pieces of the split ones
    long_documents: Counter[str]


class Documents:
    """The rows of `folder/part-*.parquet`, in order, in shards of `shard_size` rows that are read
    one at a time.

    Raises MissingFileError if there are no rows.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder = folder
        self._shard_size = shard_size
        self._groups: list[tuple[Path, int]] = []  # row groups: file, and number in the file
        self._ends = [0]  # number of rows before each row group, and in total
        for path in sorted(folder.glob("part-*.parquet")):
            with reading_parquet(path):
                metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._ends.append(self._ends[-1] + metadata.row_group(group).num_rows)
        self.rows = self._ends[-1]
        if not self.rows:
            raise MissingFileError(
                f"{folder}: no documents in part-*.parquet: check the corpus stage"
            )
        self.shards = -(-self.rows // shard_size)

    def size(self, index: int) -> int:
        return min(self._shard_size, self.rows - index * self._shard_size)

    def shard(self, index: int) -> list[dict[str, Any]]:
        """The rows (doc_id, text) of one shard."""
        first = index * self._shard_size
        last = first + self.size(index)
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
    """Fit each document to the length limit and distribute the pieces over chains. Each document
    is in a chain or counted in `dropped`.
    """
    limit = config.max_model_len - config.max_new_tokens
    if config.max_document_tokens is not None:
        limit = min(limit, config.max_document_tokens + len(prompt_format.begin("").ids))
    pieces: list[Piece] = []
    dropped: Counter[str] = Counter()
    long_documents: Counter[str] = Counter()
    for index, document in enumerate(documents):
        doc_id, text = document["doc_id"], document["text"]
        if not text.strip():
            dropped["empty"] += 1
            continue
        prompt = prompt_format.begin(text)
        if len(prompt.ids) <= limit:
            pieces.append(Piece(doc_id, text, prompt, index))
            continue
        texts, action = fit(
            text, config.long_documents, limit, lambda text: len(prompt_format.begin(text).ids)
        )
        if not texts:
            dropped[action] += 1
            continue
        long_documents[action] += 1
        if action == "split":
            long_documents["pieces"] += len(texts)
        for number, piece in enumerate(texts):
            name = f"{doc_id}#{number}" if action == "split" else doc_id
            prompt = prompt_format.begin(piece)
            pieces.append(Piece(name, piece, prompt, index, share=1 / len(texts)))
    return ShardPlan(len(documents), plan_chains(pieces, config.shots), dropped, long_documents)


class Shard:
    """A shard in progress: its plan, its journal, and the finished rounds."""

    def __init__(self, folder: Path, index: int, plan: ShardPlan) -> None:
        self.index = index
        self.plan = plan
        self.journal = Journal(folder / f".part-{index:05d}.journal.jsonl")
        self._path = part_path(folder, index)
        self._rounds: list[tuple[int, Round]] = []

    def add(self, chain: int, finished: Round) -> None:
        """Add a finished round of a chain. The last round writes the shard."""
        self._rounds.append((chain, finished))
        if len(self._rounds) == sum(len(pieces) for pieces in self.plan.chains):
            self.write()

    def write(self) -> None:
        """Write the rows, sorted by chain and round, and delete the journal."""
        self._rounds.sort(key=lambda item: (item[0], item[1].number))
        first_chain = self.index * CHAINS_PER_SHARD
        rows = [_row(first_chain + chain, finished) for chain, finished in self._rounds]
        metadata = {ACCOUNT: json.dumps(self._account(), sort_keys=True).encode()}
        write_parquet(self._path, rows, SCHEMA.with_metadata(metadata))
        note_hash(self._path)
        self.journal.remove()

    def _account(self) -> dict[str, Any]:
        with_pairs: set[int] = set()
        rejected: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        well_formed = cached_tokens = 0
        for _, finished in self._rounds:
            generation, parsed = finished.generation, finished.parsed
            if parsed.pairs:
                with_pairs.add(finished.piece.document)
            if generation.finish_reason != "error":
                rejected.update(parsed.rejected)
            if generation.refusal:
                refused[generation.refusal] += 1
            well_formed += _is_well_formed(finished)
            cached_tokens += generation.cached_tokens
        return {
            "documents": self.plan.documents,
            "documents_with_pairs": len(with_pairs),
            "dropped": dict(self.plan.dropped),
            "long_documents": dict(self.plan.long_documents),
            "rejected": dict(rejected),
            "refused": most_frequent(refused),
            "well_formed": well_formed,
            "cached_tokens": cached_tokens,
        }


def most_frequent(refusals: Counter[str]) -> dict[str, int]:
    """The most frequent reasons with their counts, and the sum of all others as one entry."""
    shown = dict(refusals.most_common(SHOWN_REFUSALS))
    if len(refusals) > SHOWN_REFUSALS:
        others = refusals.total() - sum(shown.values())
        shown[OTHER_REFUSALS] = shown.get(OTHER_REFUSALS, 0) + others
    return shown


def read_account(path: Path) -> dict[str, Any]:
    """The counts that `Shard` stored in the metadata of `path`. Raises UserError for a file that it
    did not write.
    """
    with reading_parquet(path):
        metadata = pq.read_schema(path).metadata or {}
    if ACCOUNT not in metadata:
        raise UserError(
            f"{path}: not an output of the synthesis stage (no {ACCOUNT.decode()} in its "
            "metadata): run synthesis again"
        )
    account = json.loads(metadata[ACCOUNT])
    assert isinstance(account, dict)
    return account


def _is_well_formed(finished: Round) -> bool:
    """Not cut, not empty, and nothing rejected except repeated questions."""
    ended = finished.generation.finish_reason in ("stop", "repetition")
    rejected = set(finished.parsed.rejected) - {"repeated_question"}
    return ended and finished.parsed.found and not rejected


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
    """The finished generations of an unfinished shard, one JSON line each, by chain and round.

    Opening it reads the lines of an earlier run. An incomplete last line is cut off; a line whose
    checksum is wrong is ignored, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {(entry["chain"], entry["round"]): entry for entry in _read_journal(path)}
        self._file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._known)

    def find(self, chain: int, number: int, prompt: Prompt) -> Generation | None:
        """The generation of an earlier run for the same chain, round and prompt, if any."""
        entry = self._known.get((chain, number))
        if entry is None or entry["prompt"] != _digest(prompt):
            return None
        fields = {name: entry[name] for name in Generation._fields if name in entry}
        return Generation(**fields)

    def add(self, chain: int, number: int, prompt: Prompt, generation: Generation) -> None:
        entry = {"chain": chain, "round": number, "prompt": _digest(prompt)}
        line = json.dumps({**entry, **generation._asdict()})
        self._file.write(f"{_checksum(line.encode())} {line}\n")
        self._file.flush()

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a journal, if it exists. An incomplete last line is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(complete))
    return complete.splitlines()


def _read_journal(path: Path) -> list[dict[str, Any]]:
    lines = complete_lines(path)
    entries = []
    for line in lines:
        checksum, _, entry = line.partition(b" ")
        if checksum == _checksum(entry).encode():
            entries.append(json.loads(entry))
    damaged = len(lines) - len(entries)
    if damaged:
        log.warning("%s: %d of %d generations are damaged and run again", path, damaged, len(lines))
    return entries


def _checksum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _digest(prompt: Prompt) -> str:
    content = array("q", prompt.ids).tobytes()
    if prompt.messages:
        content += json.dumps(prompt.messages).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
