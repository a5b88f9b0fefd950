"""What tests of token stores share."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ipt.tokens.shards import EncodedDocument
from ipt.tokens.store import write_store

WORDS = [
    "the",
    "cell",
    "blood",
    "of",
    "a",
    "disease",
    "is",
    "kind",
    "tissue",
    "organ",
    "and",
    "heart",
    "muscle",
    "“quoted”",
    "naïve",
    "肝臓",
    "β-cell",
    "42",
    "\n\t",
]


def write(
    folder: Path, documents: list[list[int]], shard_tokens: int, fingerprint: str = "f"
) -> Path:
    write_store(
        folder,
        (EncodedDocument(np.array(tokens, np.uint32)) for tokens in documents),
        fingerprint,
        shard_tokens,
    )
    return folder


def texts_of(folder: Path) -> list[str]:
    return [
        text
        for path in sorted(folder.glob("*.parquet"))
        for text in pq.read_table(path)["text"].to_pylist()
    ]


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store by its name, those that are not part of it too."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }
