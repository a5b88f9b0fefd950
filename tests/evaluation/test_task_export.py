"""Tasks of ours under lm-evaluation-harness's own command: figures as under ours."""

import json
import logging
import os
import sys
from unittest.mock import patch

import pytest

from ipt.config import EvaluationConfig
from ipt.evaluation.__main__ import main
from ipt.evaluation.export import export
from ipt.evaluation.results import load_results
from ipt.evaluation.run import evaluate

pytest.importorskip("lm_eval")
ORGANS = ["heart", "lung", "liver", "nerve", "bone"]

# what a training in this process leaves
PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One task of each kind, with macro F1, groups and an unconditional prompt among the
    choices.
    """
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "id": f"r{number}",
            "question": (
                f"Which organ has number {number} of {', '.join(ORGANS[: 1 + number % 5])}?"
            ),
            "gold": ORGANS[number * 2 % 5],
            "part": number % 2,
            "text": (
                f"The {ORGANS[number % 5]} is read about in chapter {number} – and nowhere else."
            ),
        }
        for number in range(14)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = 'data: rows.jsonl\nprompt: "{{ question }}\\nAnswer:"\n'
    options = f"options: [{', '.join(ORGANS)}]\noption: ' {{{{ option }}}}'\ngold: gold\n"
    (folder / "organs.yaml").write_text(
        f"kind: choice\n{common}{options}metric: macro_f1\nunconditional: 'Answer:'\n"
    )
    (folder / "parts.yaml").write_text(
        f"kind: choice\n{common}{options}metric: weighted_f1\ngroup: part\nnum_fewshot: 2\n"
        f"fewshot: {{seed: 3}}\n"
    )
    (folder / "said.yaml").write_text(
        f'kind: generation\n{common}answer: "{{{{ gold }}}}"\nmax_new_tokens: 6\n'
    )
    (folder / "texts.yaml").write_text("kind: perplexity\ndata: rows.jsonl\n")
    (folder / "last.yaml").write_text(
        "kind: perplexity\ndata: rows.jsonl\ncontext: '{{ question }}'\ntext: ' {{ gold }}'\n"
    )
    return [str(path) for path in sorted(folder.glob("*.yaml"))]


def test_figures_under_the_harness_are_ours(tasks, tiny_model, tmp_path, capsys, monkeypatch):
    main(["export", *tasks, str(tmp_path / "exported")])
    assert "--tasks last,organs,parts,said,texts" in capsys.readouterr().out
    command = [
        "run",
        "--include_path",
        str(tmp_path / "exported"),
        "--model",
        "hf",
        "--device",
        "cpu",
    ]
    command += [
        "--tasks",
        "last,organs,parts,said,texts",
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
        "--batch_size",
        "4",
    ]
    command += ["--model_args", f"pretrained={tiny_model},dtype=float32"]
    run_harness(command, monkeypatch)
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]

    evaluate(EvaluationConfig(), tiny_model, tasks, None, tmp_path / "ours")
    evaluate(
        EvaluationConfig(add_bos_token=True),
        tiny_model,
        [task for task in tasks if "texts" in task],
        None,
        tmp_path / "behind_bos",
    )
    ours = {**load_results(tmp_path / "ours"), **load_results(tmp_path / "behind_bos")}
    for task, metrics in ours.items():
        assert {f"{name},none" for name in metrics} <= theirs[task].keys()
        for name, entry in metrics.items():
            assert theirs[task][f"{name},none"] == pytest.approx(
                entry["value"], rel=1e-3, abs=1e-6
            ), (task, name)
    assert {"paper", "correct"} <= ours["organs"].keys() and ours["organs"]["accuracy"]["value"] > 0


def run_harness(command, monkeypatch):
    """The harness's command line in this process, which saves its imports."""
    from lm_eval.__main__ import cli_evaluate

    for name in PROCESS_GROUP:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    before = [
        (logger, logger.handlers[:], logger.level)
        for logger in (logging.getLogger(), logging.getLogger("lm_eval"))
    ]
    try:
        with patch.dict(os.environ):
            cli_evaluate()
    finally:
        for logger, handlers, level in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)


def test_what_the_harness_cannot_run_is_named_and_left_out(tmp_path, caplog):
    (tmp_path / "arc.yaml").write_text("kind: harness\nharness: arc_easy\n")
    with pytest.raises(
        ValueError, match="none of the tasks has the kind choice, generation, perplexity"
    ):
        export([str(tmp_path / "arc.yaml")], tmp_path / "out")
    assert "arc is left out: its kind is harness" in caplog.text
