"""Kill -9 at random moments, run again, and compare with a run that nobody interrupted."""

import asyncio
import multiprocessing
import random
import time
from pathlib import Path

from synthesis_cases import OracleEngine, write_documents

from ipt.config import SynthesisConfig
from ipt.synthesis import worker
from ipt.synthesis.run import synthesize

CONFIG = SynthesisConfig(
    model="embedded:tiny",
    engine="transformers",
    shots=3,
    max_model_len=400,
    max_new_tokens=80,
    shard_size=25,
    max_num_seqs=5,
)
KILLS = 20


def work(
    vocabulary, documents: Path, output: Path, record: Path, delay: float, limit: int | None = None
) -> None:
    worker.start_engine = lambda *_: OracleEngine(vocabulary, record, delay, limit)
    synthesize(CONFIG, documents, output, 0)


def test_killed_at_random_moments_the_result_is_that_of_an_uninterrupted_run(
    tmp_path, vocabulary, tokenizer, monkeypatch
):
    monkeypatch.setattr("ipt.models.load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(worker, "start_engine", worker.start_engine)  # put back what `work` sets
    asyncio.run(asyncio.sleep(0))  # what a fork must not be the first to import
    documents = write_documents(
        tmp_path / "documents", [f"Page {number}. It says {number**3}." for number in range(220)]
    )
    work(vocabulary, documents, tmp_path / "whole", tmp_path / "whole.txt", 0)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "pairs").iterdir()}
    assert len(expected) == 9

    output, record = tmp_path / "killed", tmp_path / "killed.txt"
    moments, with_journal = random.Random(0), 0
    fork = multiprocessing.get_context("fork")
    for _ in range(KILLS):
        answers, seen = moments.randrange(2, 11), _lines(record)
        process = fork.Process(
            target=work, args=(vocabulary, documents, output, record, 0.01, answers)
        )
        process.start()
        while _lines(record) - seen < answers:
            assert process.is_alive(), "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.join()
        with_journal += any(output.rglob(".*.journal.jsonl"))
    assert with_journal >= 8, "the fixture must interrupt shards in the middle"
    work(vocabulary, documents, output, record, 0)
    assert {path.name: path.read_bytes() for path in (output / "pairs").iterdir()} == expected
    # A kill costs at most the generations in flight, one for each live chain.
    assert (
        _lines(tmp_path / "whole.txt") == 220 <= _lines(record) <= 220 + KILLS * CONFIG.max_num_seqs
    )


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
