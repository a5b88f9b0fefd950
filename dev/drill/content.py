"""Contents of a run's folder without times, to compare a run with and without a fault."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipt.files import hash_file, hash_json, read_parts

TIMED = ("README.md", "summary.json", "metrics.jsonl", "results.md")  # contain durations or dates
TIMES = ("tokens_per_second", "mfu", "data_wait", "memory")  # fields of metrics.jsonl
TOKEN_BYTES = 4


def content_of(folder: Path) -> Counter[tuple[str, ...]]:
    """Counts of (stage, file, hash) over all files of all finished stages. For reports the entries
    are their CSV files, for sweeps the figures of each job.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for place, manifest in finished_stages(folder):
        for name in manifest["outputs"]:
            path = place / name
            if path.name == "metrics.jsonl":
                found[manifest["stage"], name, _metrics(path)] += 1
            elif path.name not in TIMED:
                found[manifest["stage"], name, hash_file(path) if path.exists() else "missing"] += 1
    for path in folder.glob("outputs/tiny/*.csv"):
        found["report", path.name, hash_file(path)] += 1
    for path in folder.glob("outputs/sweeps/*/sweep.json"):
        for job in json.loads(path.read_text(encoding="utf-8"))["jobs"]:
            found["sweep", job["name"], hash_json(job["figures"])] += 1
    return found


def finished_stages(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("outputs/stages/*/manifest.json")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))


def lost(whole: Path, folder: Path) -> dict[str, int]:
    """Number of documents, pairs and tokens of the reference run `whole` that `folder` lacks."""
    expected, found = _items(whole), _items(folder)
    return {kind: (expected[kind] - found[kind]).total() for kind in expected}


def _metrics(path: Path) -> str:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return hash_json(
        [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    )


def _rows(folder: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of all parts; none if there are no parts."""
    return read_parts(folder, columns) if any(folder.glob("part-*.parquet")) else iter(())


def _items(folder: Path) -> dict[str, Counter[Any]]:
    documents, pairs, tokens = Counter[Any](), Counter[Any](), Counter[Any]()
    for place, manifest in finished_stages(folder):
        kind = manifest["stage"]
        if kind == "corpus":
            documents.update(row["doc_id"] for row in _rows(place / "documents", ["doc_id"]))
        elif kind in ("synthesis", "filters"):
            for row in _rows(place / "pairs", ["doc_id", "pairs"]):
                pairs.update(
                    (kind, row["doc_id"], pair["question"], pair["answer"]) for pair in row["pairs"]
                )
        elif kind == "tokens":
            tokens[manifest["key"]] += (
                sum(path.stat().st_size for path in place.glob("shard-*/tokens.bin")) // TOKEN_BYTES
            )
    return {"documents": documents, "pairs": pairs, "tokens": tokens}
