"""The drills of scripts/drill see what survives and what does not: on stages that are small, one sound and others with a fault."""

import random

import pytest

from scripts.drill.content import lost
from scripts.drill.faults import NotSurvived, Trial, kills
from scripts.drill.stages import Stage, copy, undisturbed

# Writes three parts, slowly; the fault is what the first argument says.
WORK = """
import sys, time
from pathlib import Path
import pyarrow as pa
from ipt.stage import run_stage, write_parquet
def work(folder):
    for number in range(3):
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


def trial(tmp_path, fault: str) -> Trial:
    stage = Stage("corpus", ("-c", WORK, fault), "outputs/stages/corpus-*")
    reference = undisturbed(stage, tmp_path, None)
    return Trial(reference, copy(reference.before, tmp_path / "trial"), random.Random(0))


def test_a_stage_that_goes_on_survives_kills_and_loses_nothing(tmp_path):
    tried = trial(tmp_path, "sound")
    kills(tried)
    assert tried.hits and not any(lost(tried.reference.whole, tried.folder).values())


def test_a_stage_that_forgets_what_it_had_does_not_survive(tmp_path):
    tried = trial(tmp_path, "forgets")
    with pytest.raises(NotSurvived, match="differs from the undisturbed run in corpus documents"):
        kills(tried)
    assert lost(tried.reference.whole, tried.folder)["documents"] > 0
