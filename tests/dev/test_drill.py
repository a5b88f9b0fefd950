"""dev.drill on small stages: a correct one survives, a faulty one is detected."""

import random

from dev.drill import faults
from dev.drill.content import lost
from dev.drill.faults import NotSurvived, Trial, kills
from dev.drill.stages import Stage, copy, undisturbed

# Writes ten parts slowly. With the argument "forgets" it deletes the parts of an earlier run.
WORK = """
import sys, time
from pathlib import Path
import pyarrow as pa
from ipt.files import write_parquet
from ipt.stage import run_stage
def work(folder):
    for number in range(10):
        path = folder / "documents" / f"part-{number:05d}.parquet"
        if sys.argv[1] == "forgets" and path.exists():
            path.unlink()
            continue
        if not path.exists():
            time.sleep(0.2)
            write_parquet(path, [{"doc_id": f"d{number}"}], pa.schema([("doc_id", pa.string())]))
    return {}
run_stage("corpus", None, work, config={}, inputs={})
"""


def trial(tmp_path, fault: str, seed: int = 0) -> Trial:
    tmp_path.mkdir(exist_ok=True)
    stage = Stage("corpus", ("-c", WORK, fault), "outputs/stages/corpus-*")
    reference = undisturbed(stage, tmp_path, None)
    return Trial(reference, copy(reference.before, tmp_path / "trial"), random.Random(seed))


def test_a_correct_stage_survives_kills_and_loses_nothing(tmp_path):
    for seed in range(8):  # a kill may come after the end
        tried = trial(tmp_path / str(seed), "sound", seed)
        kills(tried)
        if tried.hits:
            break
    assert tried.hits and not any(lost(tried.reference.whole, tried.folder).values())


def test_a_stage_that_deletes_earlier_work_does_not_survive(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "HITS", 1)  # a second run would rewrite the deleted parts
    for seed in range(8):  # the kill may come before the first part is written
        tried = trial(tmp_path / str(seed), "forgets", seed)
        try:
            kills(tried)
        except NotSurvived as error:
            assert "differs from the reference run in corpus documents" in str(error)
            break
    assert lost(tried.reference.whole, tried.folder)["documents"] > 0
