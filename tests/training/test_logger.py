import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import Config, LoggerConfig
from ipt.files import write_json
from ipt.synthesis.shards import SCHEMA
from ipt.training.logger import build_loggers
from tests import warm
from tests.processes import run_together

STATS = {
    "pairs": 2,
    "grounded_rate": 0.5,
    "judge": {"accuracy": 0.75, "failed": {}},
    "frames": {"what is _": 2},
    "histograms": {"a": [1]},
}


@pytest.fixture
def pairs(tmp_path):
    row = {
        "chain_id": 0,
        "round": 0,
        "inherits_previous": False,
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "output_tokens": 1,
    }
    pair = {"question": "What pumps blood?", "answer": "The heart"}
    rows = [
        {
            **row,
            "doc_id": "a",
            "text": "The heart pumps blood.",
            "pairs": [pair],
            "raw_output": "",
            "rewrite": "",
        }
    ]
    rows += [
        {
            **row,
            "doc_id": "b",
            "text": "Kidneys.",
            "pairs": [],
            "raw_output": "",
            "rewrite": "Kidneys filter.",
        }
    ]
    folder = tmp_path / "synthesis" / "pairs"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "part-00000.parquet")
    write_json(folder.parent / "stats.json", STATS)
    return folder


def test_pairs_and_their_figures_are_in_wandb(pairs, tmp_path):
    config = Config(name="test", logger=LoggerConfig(name="wandb", offline=True))
    (logger,) = build_loggers(config, "training", tmp_path, pairs)
    logger.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    inspected = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    for entry in ("synthesis/grounded_rate", "synthesis/judge/accuracy", "synthesis/pairs"):
        assert entry in inspected
    assert "synthesis/frames" not in inspected and "synthesis/histograms" not in inspected
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [
        ["a", "The heart pumps blood.", "What pumps blood?", "The heart", ""],
        ["b", "Kidneys.", "", "", "Kidneys filter."],
    ]


def test_without_it_nothing_is_imported():
    """In a process that has imported all modules that use W&B (tests/warm.py) and none that only
    tests need.
    """
    ended = run_together(print_imported, environments=[{}])
    assert (ended.codes, ended.output) == ([0], "[]\n")


def print_imported() -> None:
    assert set(warm.MODULES) <= sys.modules.keys()
    build_loggers(Config(), "training", Path(), None)
    print([name for name in sys.modules if name.partition(".")[0] in ("wandb", "wandb_workspaces")])
