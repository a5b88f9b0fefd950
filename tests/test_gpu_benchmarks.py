"""benchmarks/gpu on a CPU: pieces run, notice what is wrong, and end as the summary says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import attention, loss, summary, training
from benchmarks.gpu.jobs import config_of, lengths
from benchmarks.gpu.piece import Piece, run
from ipt.training import attention as kernels
from ipt.training.metrics import flops_per_token
from ipt.training.model import meta_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def piece(tmp_path):
    return Piece("attention", tmp_path, smoke=True, seconds=100)


def test_attention_and_loss_pass(piece):
    attention.measure(piece)
    kinds = {
        (row["attention"], row["documents"] > 1, bool(row["window"]))
        for row in piece.tables["Kernels in bf16"]
    }
    assert kinds == {
        (name, many, window)
        for name in ("sdpa", "packed")
        for many, window in ((True, True), (True, False), (False, False))
    }
    loss.measure(piece)
    assert piece.checks and all(check["passed"] for check in piece.checks)


def test_a_kernel_that_lets_documents_see_each_other_is_noticed(piece, monkeypatch):
    right = kernels.packed_attention

    def leaking(*arguments, document_sizes, **options):
        return right(*arguments, document_sizes=[sum(document_sizes)], **options)

    monkeypatch.setattr(kernels, "packed_attention", leaking)
    attention.compare(piece, attention.Case([40, 56], 4, 2, 32, None))
    failed = {check["check"] for check in piece.checks if not check["passed"]}
    assert failed == {
        "packed, 96 tokens, 2 documents",
        "packed: numbers that change when another document does",
    }


def test_run_sh_writes_a_folder_and_a_table(tmp_path):
    command = [ROOT / "benchmarks" / "gpu" / "run.sh", "--smoke", tmp_path / "out", "environment"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| environment | passed |" in done.stdout
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["tables"]["Rates"]
    assert "**Packages**" in (tmp_path / "out" / "summary.md").read_text()
    assert (
        subprocess.run([command[0], "no", "folder"], capture_output=True, check=False).returncode
        == 2
    )


def ended(monkeypatch, folder, name, work, packages=()):
    monkeypatch.setattr(sys, "argv", ["piece", "--folder", str(folder), "--smoke"])
    with pytest.raises(SystemExit) as exit_:
        run(name, work, packages)
    return bool(exit_.value.code), json.loads((folder / f"{name}.json").read_text())


def test_how_pieces_end(monkeypatch, tmp_path, capsys):
    def fail(piece):
        piece.check("a number", float("nan"), 1.0)

    def break_(piece):
        piece.row("done before", {"a": 1})
        raise ValueError("what is wrong")

    code, record = ended(monkeypatch, tmp_path, "failing", fail)
    assert (code, record["status"], record["reason"]) == (True, "failed", "1 of 1 checks")
    code, record = ended(monkeypatch, tmp_path, "broken", break_)
    assert (code, record["reason"], record["tables"]) == (
        True,
        "ValueError: what is wrong",
        {"done before": [{"a": 1}]},
    )
    code, record = ended(monkeypatch, tmp_path, "poor", fail, ("no_such_package",))
    assert (code, record["status"], record["reason"]) == (
        False,
        "skipped",
        "not installed: no_such_package",
    )
    Piece("killed", tmp_path, smoke=True, seconds=1).save()
    capsys.readouterr()
    assert summary.main(tmp_path, ["poor"]) == 0
    for name in ("failing", "broken", "killed", "never_begun"):
        assert summary.main(tmp_path, ["poor", name]) == 1
    assert "| killed | cut off |" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_listed(piece):
    assert piece.reach("quick", 1)
    assert not piece.reach("slow", 1000)
    assert piece.not_reached == ["slow"]


def test_flops_by_hand_are_those_of_the_model():
    config = config_of({"architecture": training.LLAMA_3_8B})
    by_hand = training.flops_by_hand(training.LLAMA_3_8B, 4096)
    assert by_hand == pytest.approx(flops_per_token(meta_model(config), 4096), rel=1e-9)
    assert by_hand == pytest.approx(51.5e9, rel=1e-3)
    with pytest.raises(AttributeError):
        config_of({"trainer.compiled": True})


def test_documents_fill_a_row():
    sizes = lengths(8192, 1000, seed=0)
    assert sum(sizes) == 8192
    assert len(sizes) > 3
    assert torch.tensor(sizes[:-1]).min() >= 2
