"""What a user sees when something outside the house fails, and that nothing half-written is taken
for whole.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipt.files import read_parts

ROOT = Path(__file__).resolve().parents[2]
FIRST_ROUND = ("doc_id", "chain_id", "round", "text")


def command(corpus: Path, output: Path, *overrides: str) -> list[str]:
    options = [
        "corpus.held_out_fraction=0",
        f"corpus.path={corpus}",
        f"output_dir={output}",
        f"stages_dir={output.parent / 'stages'}",
    ]
    return [sys.executable, str(ROOT / "synthesize.py"), *options, *overrides]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(tmp_path):
    text = (
        "The harbour was built of stone in that year, and ships came from far away. As a result, "
        "the town grew rich and famous. "
    )
    corpus = write_corpus(
        tmp_path / "corpus.jsonl", [f"Town {number}. " + text * 40 for number in range(90)]
    )
    options = ("synthesis=rule_based", "synthesis.shard_size=30")
    whole = subprocess.run(
        command(corpus, tmp_path / "whole", *options), capture_output=True, text=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    smallest = min(path.stat().st_size for path in (tmp_path / "whole" / "pairs").iterdir())

    def no_room() -> None:  # files cannot reach this size: writes fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 1, smallest - 1))

    full = subprocess.run(
        command(corpus, tmp_path / "full", *options),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=no_room,
    )
    assert full.returncode == 1
    [error] = [line for line in full.stderr.splitlines() if "error" in line]
    assert error.startswith("error: no room to write") and "run again" in error
    assert (
        not list((tmp_path / "full" / "pairs").glob("part-*"))
        and not (tmp_path / "full" / "manifest.json").exists()
    )
    again = subprocess.run(
        command(corpus, tmp_path / "full", *options), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert pairs_of(tmp_path / "full") == pairs_of(tmp_path / "whole")


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_kills_of_a_run_on_the_real_engine_lose_and_double_nothing(tmp_path):
    """vLLM's greedy text may differ with the batch: documents, chains and the prompts of round one
    are equal.
    """
    corpus = write_corpus(
        tmp_path / "corpus.jsonl",
        [
            f"Gland {number} lies near organ {number * 3}. It makes a hormone."
            for number in range(24)
        ],
    )
    options = (
        "synthesis.shots=2",
        "synthesis.max_new_tokens=40",
        "synthesis.max_num_seqs=3",
        "synthesis.shard_size=10",
        "synthesis.kv_cache_memory_bytes=0.25",
    )
    whole = subprocess.run(
        command(corpus, tmp_path / "whole", *options), capture_output=True, text=True, timeout=600
    )
    assert whole.returncode == 0, whole.stderr
    output, moments = tmp_path / "killed", random.Random(time.time_ns())
    for _ in range(3):
        finished = generations(output)
        process = subprocess.Popen(
            command(corpus, output, *options), stderr=subprocess.DEVNULL, start_new_session=True
        )
        wanted = finished + moments.randrange(1, 7)
        while generations(output) < wanted:
            assert process.poll() is None, "the fixture must be killed in the middle"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = subprocess.run(
        command(corpus, output, *options), capture_output=True, text=True, timeout=600
    )
    assert last.returncode == 0, last.stderr
    session = json.loads((output / "stats.json").read_text())["session"]
    assert session["generations_replayed"] > 0
    rows = [list(read_parts(folder / "pairs")) for folder in (tmp_path / "whole", output)]
    assert [[row[name] for name in FIRST_ROUND] for row in rows[0]] == [
        [row[name] for name in FIRST_ROUND] for row in rows[1]
    ]
    prompts = [[row["prompt_tokens"] for row in side if row["round"] == 0] for side in rows]
    assert prompts[0] == prompts[1]
    assert sorted(row["doc_id"] for row in rows[1]) == sorted({row["doc_id"] for row in rows[1]})
    different = sum(
        first["raw_output"] != second["raw_output"] for first, second in zip(*rows, strict=True)
    )
    print(f"texts that differ from those of the uninterrupted run: {different} of {len(rows[0])}")


def generations(output: Path) -> int:
    """Finished generations on disk: rows of whole shards and lines of journals."""
    journals = output.glob("pairs/.part-*.journal.jsonl")
    return len(pairs_of(output)) + sum(path.read_bytes().count(b"\n") for path in journals)


def pairs_of(output: Path) -> list[dict]:
    return (
        list(read_parts(output / "pairs"))
        if list((output / "pairs").glob("part-*.parquet"))
        else []
    )
