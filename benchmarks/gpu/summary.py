"""The pieces' results as one table and one page: `python -m benchmarks.gpu.summary FOLDER PIECE
...`. Exits with 1 if one failed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.piece import FAILED, PASSED, RUNNING, SKIPPED, markdown, table


def main(folder: Path, pieces: list[str]) -> int:
    records = [read(folder, name) for name in pieces]
    rows = [row_of(record) for record in records]
    page = ["# On a GPU", "", *table(rows), ""]
    tables = "\n".join(markdown(record) for record in records if record["tables"])
    (folder / "summary.md").write_text("\n".join(page) + "\n" + tables, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    return int(any(record["status"] in (FAILED, RUNNING) for record in records))


def read(folder: Path, name: str) -> dict[str, Any]:
    """The record of a piece; of one that left none, that it failed."""
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {
        "name": name,
        "status": FAILED,
        "reason": f"it did not start: see {name}.log",
        "seconds": 0.0,
        "tables": {},
        "not_reached": [],
    }


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    assert record["status"] in (PASSED, FAILED, SKIPPED, RUNNING)
    reason = (
        "its time was up, or it was killed" if record["status"] == RUNNING else record["reason"]
    )
    return {
        "piece": record["name"],
        "status": record["status"],
        "what": reason,
        "not reached": len(record["not_reached"]) or None,
        "seconds": round(record["seconds"]),
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
