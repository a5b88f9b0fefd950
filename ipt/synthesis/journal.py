"""The journal of an unfinished shard: its finished generations, one JSON line each, so that a kill
costs only those in flight.
"""

import hashlib
import json
import zlib
from array import array
from pathlib import Path
from typing import Any

from ipt.console import console
from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import Prompt


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
