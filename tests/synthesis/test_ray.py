"""Two local Ray workers, of which one is killed while it works."""

import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from synthesis_cases import write_documents

from ipt.config import SynthesisConfig
from ipt.files import read_parts
from ipt.synthesis.run import synthesize

pytest.importorskip("ray")
CONFIG = SynthesisConfig(
    model="embedded:tiny-synthesizer",
    engine="transformers",
    shots=2,
    max_model_len=512,
    max_new_tokens=64,
    shard_size=8,
    max_num_seqs=4,
)
TEXTS = [
    f"Page {number} tells about thing {number * 7}. It has a second sentence."
    for number in range(64)
]


def test_a_worker_is_killed_and_others_do_its_shards(tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    alone = synthesize(CONFIG, documents, tmp_path / "alone", 0)
    killed = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray" / "pairs",), daemon=True)
    killed.start()
    config = replace(CONFIG, cluster="ray", workers=2)
    stats = synthesize(config, documents, tmp_path / "ray", 0)
    killed.join()
    assert stats["session"]["workers_lost"] == 1
    assert not list((tmp_path / "ray" / "pairs").glob(".*"))  # no journal, nothing torn
    rows = [list(read_parts(tmp_path / folder / "pairs")) for folder in ("alone", "ray")]
    assert rows[0] == rows[1] and len(rows[0]) == len(TEXTS)
    assert {**stats, "session": None} == {**alone, "session": None}


def kill_a_worker(pairs):
    """Kill the process of one actor in the middle of a shard, once another shard is finished."""
    victim = None
    while victim is None:
        time.sleep(0.02)
        victim = stopped_in_a_shard(pairs)
    while not list(pairs.glob("part-*")):  # by the other actor, as this one is stopped
        time.sleep(0.05)
    victim.kill()


def stopped_in_a_shard(pairs):
    """An actor that has a shard's journal open, stopped so that it still has it open when it is
    killed.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            if is_actor(process) and writes(process, pairs):
                process.suspend()
                if writes(process, pairs):
                    return process
                process.resume()
    return None


def writes(process, pairs):
    return any(Path(file.path).parent == pairs for file in process.open_files())


def is_actor(process):
    with suppress(psutil.Error):  # it has ended since
        return "ray::Worker" in " ".join(process.cmdline())
    return False
