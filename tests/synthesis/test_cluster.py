"""Two local Ray workers, of which one is killed while it works."""

import threading
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from synthesis_cases import write_documents

from ipt.config import SynthesisConfig
from ipt.stage import read_parts
from ipt.synthesis.run import synthesize

pytest.importorskip("ray")
CONFIG = SynthesisConfig(
    model="embedded:tiny-synthesizer", engine="transformers", shots=2, max_model_len=512, max_new_tokens=64, shard_size=8, max_live_chains=4
)
TEXTS = [
    f"Page {number} tells about thing {number * 7}. It has a second sentence." for number in range(480)
]  # so many that work is left when a worker is killed


def test_a_worker_is_killed_and_others_do_its_shards(tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    alone = synthesize(CONFIG, documents, tmp_path / "alone", 0)
    killed = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray" / "pairs",))
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
    """Kill the process of one actor once a shard is finished."""
    actors: list[psutil.Process] = []
    while not actors:  # found before, as it takes its time on a busy machine
        actors = [process for process in psutil.Process().children(recursive=True) if is_actor(process)]
        time.sleep(0.01)
    while not list(pairs.glob("part-*")):
        time.sleep(0.01)
    actors[0].kill()


def is_actor(process):
    with suppress(psutil.Error):  # it has ended since
        return "ray::Worker" in " ".join(process.cmdline())
    return False
