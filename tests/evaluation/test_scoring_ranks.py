import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scoring_ranks
from evaluation_cases import TASK, make_scorer

from ipt import distributed
from ipt.config import EvaluationConfig
from ipt.evaluation.results import load_results, read_predictions
from ipt.evaluation.run import evaluate
from ipt.evaluation.task_types import multiple_choice
from ipt.evaluation.task_types.multiple_choice import Question
from tests.processes import run_ranks

CHECKOUT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    ended = subprocess.run(
        [*TORCHRUN, *map(str, arguments)],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def several(questions):
    """Questions of which some share a long beginning."""
    shots = (
        "A bone is hard. A nerve is soft. Blood is red. Bile is green. Skin is thin. Hair is "
        "thinner. "
    )
    more = [
        Question(str(number), f"{shots}What is number {number}?", [" bone", " a nerve"], 0)
        for number in range(5)
    ]
    return [*questions, *more]


def test_two_processes_score_as_one(model, tokenizer, questions, tmp_path):
    model.save_pretrained(tmp_path / "model")
    work = several(questions)
    (tmp_path / "questions.json").write_text(json.dumps([question[:4] for question in work]))
    ended = run_ranks(scoring_ranks.main, tmp_path)
    assert ended.codes == [0, 0], ended.output
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "each process has what all have found"
    alone = [
        row["sums"]
        for row in multiple_choice.score(TASK, work, make_scorer(model, tokenizer, batch_tokens=60))
    ]
    for name in ("together", "sharded"):
        assert np.concatenate(first[name]) == pytest.approx(np.concatenate(alone), abs=1e-4)


def test_the_command_in_two_processes(tiny_model, questions, tmp_path):
    rows = [
        {"prompt": question.prompt, "options": question.options, "gold": 0}
        for question in several(questions)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("kind: choice\ndata: own.jsonl\n")
    ended = torchrun(
        "evaluate.py",
        f"model={tiny_model}",
        f"tasks=[{tmp_path}/own.yaml]",
        f"output_dir={tmp_path}/two",
    )
    assert (ended.stdout + ended.stderr).count("results.json") == 1, "one process speaks"
    evaluate(EvaluationConfig(), tiny_model, [f"{tmp_path}/own.yaml"], None, tmp_path / "one")
    assert load_results(tmp_path / "one")["own"]["logprob"]["value"] == pytest.approx(
        load_results(tmp_path / "two")["own"]["logprob"]["value"], abs=1e-6
    )
    sums = [
        np.concatenate([row["sums"] for row in read_predictions(tmp_path / name, "own")])
        for name in ("one", "two")
    ]
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)


def test_a_process_alone():
    assert distributed.place() == (0, 1) and distributed.gathered({3: "a"}) == {3: "a"}
