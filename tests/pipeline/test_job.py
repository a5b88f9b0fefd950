"""The whole job on tiny random models: everything real but the size."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ipt.stage import hash_folder
from tests.commands import run_here


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model):
    """A folder in which `experiment=tiny` has run once."""
    from ipt.models import resolve_model

    resolve_model("embedded:tiny-synthesizer")  # made once per machine
    folder = tmp_path_factory.mktemp("job")
    started = time.process_time()
    result = run_here("reproduce", "experiment=tiny", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert time.process_time() - started < 120
    return folder


def _rows(folder: Path) -> list[dict]:
    return [
        row
        for path in sorted(folder.glob("part-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def _stages(folder: Path) -> dict[str, dict]:
    return {
        row["name"]: row
        for row in json.loads((folder / "outputs" / "tiny" / "stages.json").read_text())
    }


def test_documents_flow_through_all_rooms_to_the_report(job):
    stages = _stages(job)
    documents = _rows(job / stages["corpus"]["folder"] / "documents")
    pairs = _rows(job / stages["synthesis"]["folder"] / "pairs")
    texts = _rows(job / stages["rendering attached"]["folder"] / "texts")
    assert len(documents) == len(pairs) == 12
    assert {row["doc_id"] for row in documents} == {row["doc_id"] for row in pairs}
    # the tiny synthesizer writes two pairs for a page, and now and then none
    assert 20 <= sum(len(row["pairs"]) for row in pairs) <= 24
    assert any(row["inherits_previous"] for row in pairs)
    for row in pairs:
        assert any(row["text"].strip() in text["text"] for text in texts)
    assert stages["tokens raw"]["stats"]["documents"] == 12
    arms = {
        name: job / "outputs" / "tiny" / "arms" / name for name in ("start", "vanilla", "instruct")
    }
    summaries = {
        name: json.loads((arms[name] / "training" / "summary.json").read_text())
        for name in ("vanilla", "instruct")
    }
    # equal token budgets
    assert summaries["vanilla"]["tokens"] == summaries["instruct"]["tokens"] == 6 * 2 * 256
    assert list(summaries["vanilla"]["sources"]) == ["raw"]
    assert list(summaries["instruct"]["sources"]) == ["instruction"]
    results = {
        name: json.loads((folder / "evaluation" / "results.json").read_text())
        for name, folder in arms.items()
    }
    nll = {name: result["held_out_perplexity"]["nll"]["value"] for name, result in results.items()}
    assert nll["vanilla"] < nll["start"]  # six steps of training are seen
    page = (job / "outputs" / "tiny" / "report.html").read_text()
    assert "Nobody knows." in page
    assert (
        f"{abs(results['instruct']['definition_to_term_recall']['logprob']['value']):.3g}" in page
    )
    with (job / "outputs" / "tiny" / "results.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == set(arms)


def test_run_again_nothing_is_done_twice(job):
    before = {name: row["key"] for name, row in _stages(job).items()}
    result = run_here("reproduce", "experiment=tiny", cwd=job)
    assert result.returncode == 0, result.stderr
    assert {name: row["key"] for name, row in _stages(job).items()} == before
    assert all(row["reused"] for row in _stages(job).values())


def test_killed_at_several_moments_it_goes_on_to_the_same_models(job, tmp_path):
    command = [sys.executable, "-m", "ipt", "reproduce", "experiment=tiny"]
    for begun in ("corpus-*", "synthesis-*", "training-*/metrics.jsonl"):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not list(tmp_path.glob(f"outputs/stages/{begun}")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "outputs" / "tiny" / "report.html").exists()
    result = run_here("reproduce", "experiment=tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    whole, killed = _stages(job), _stages(tmp_path)
    for name in (
        "corpus",
        "synthesis",
        "rendering attached",
        "tokens raw",
        "tokens instruction attached",
    ):
        assert killed[name]["digest"] == whole[name]["digest"], name
    for name in ("training vanilla", "training instruct"):
        left, right = (
            hash_folder(job / whole[name]["folder"] / "export"),
            hash_folder(tmp_path / killed[name]["folder"] / "export"),
        )
        assert left["model.safetensors"] == right["model.safetensors"]


def test_stages_by_hand_give_the_same_results_and_skip_what_is_finished(job, tmp_path):
    recipe = ["experiment=tiny", f"stages_dir={tmp_path / 'stages'}"]
    for _ in range(2):
        pairs = run_here("synthesize", *recipe, f"output_dir={tmp_path / 'pairs'}", cwd=tmp_path)
        assert pairs.returncode == 0, pairs.stderr
    assert "plan: all 2 stages are cached" in pairs.stderr
    assert _rows(tmp_path / "pairs" / "pairs") == _rows(
        job / _stages(job)["synthesis"]["folder"] / "pairs"
    )
    training = ["mixture.ratios.instruction=1", f"output_dir={tmp_path / 'model'}"]
    result = run_here("train", *recipe, *training, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arm = job / "outputs" / "tiny" / "arms" / "instruct"
    exports = [
        hash_folder(folder / "export")["model.safetensors"]
        for folder in (arm / "training", tmp_path / "model")
    ]
    assert exports[0] == exports[1]
    model = [f"model={tmp_path / 'model' / 'export'}", f"output_dir={tmp_path / 'scores'}"]
    result = run_here("evaluate", *recipe, *model, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = (
        json.loads((folder / "results.json").read_text())
        for folder in (tmp_path / "scores", arm / "evaluation")
    )
    assert all(theirs[task].items() >= metrics.items() for task, metrics in ours.items())
    # the job knows the training data
    more = {metric for task in theirs for metric in theirs[task].keys() - ours[task].keys()}
    assert all(metric == "contaminated" or metric.endswith("_clean") for metric in more)
    other = run_here("train", *recipe, *training, "seed=1", cwd=tmp_path)
    assert other.returncode == 1
    assert "holds a run of another config (different: " in other.stderr


def test_an_arm_that_changes_an_earlier_stage_gets_its_own(job, tmp_path):
    arm = "+arms.one_shot={synthesis: {shots: 1}, mixture: {ratios: {raw: 0, instruction: 1}}}"
    result = run_here(
        "reproduce",
        "experiment=tiny",
        f"stages_dir={job / 'outputs' / 'stages'}",
        arm,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "outputs" / "tiny" / "stages.json").read_text())
    folders = [row["folder"] for row in rows if row["name"] == "synthesis"]
    assert len(set(folders)) == 2
    assert sum(row["name"] == "corpus" for row in rows) == 1
    chained = [
        any(row["inherits_previous"] for row in _rows(Path(folder) / "pairs")) for folder in folders
    ]
    assert sorted(chained) == [False, True]
