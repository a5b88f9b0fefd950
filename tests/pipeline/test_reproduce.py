"""Reproducing a recipe: a stage at a time, over seeds, with an arm that fails; its records,
manifest, plan and checks.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

from ipt.config import Config, compose_config
from ipt.errors import UserError
from ipt.pipeline.dry_run.arms import FINISHED, MISSING, TO_DO, plan_arms
from ipt.pipeline.provenance import read_record
from ipt.pipeline.reproduce import reproduce
from ipt.pipeline.runs import list_runs
from ipt.pipeline.validation import check_reproduce
from ipt.pipeline.verify import main as verify_main
from ipt.pipeline.verify import verify
from ipt.stage import load_stage, run_stage
from ipt.tokens.store import TokenStore

TEXT = (
    "The {organ} is an organ of the body. It is found in animals and it does what a {organ} does. "
    "A {organ} can be examined by a doctor."
)
ORGANS = ("heart", "liver", "lung", "brain", "kidney", "stomach", "spleen", "skin")


def recipe(folder: Path, *overrides: str) -> Config:
    """Two arms on a handful of documents, pairs by rules, a random model."""
    documents = folder / "documents.jsonl"
    if not documents.exists():
        rows = [
            {"chapter": organ[0], "text": " ".join([TEXT.format(organ=organ)] * 4)}
            for organ in ORGANS
        ]
        documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        "experiment=tiny",
        f"corpus.path={documents}",
        "corpus.held_out_fraction=0.3",
        "synthesis.format=rule_based",
        "tasks=[held_out_perplexity]",
        "mixture.seq_len=64",
        "trainer.max_steps=2",
        f"stages_dir={folder / 'stages'}",
        f"output_dir={folder / 'run'}",
    ]
    return compose_config("reproduce", [*settings, *overrides])


def stages(folder: Path, name: str) -> list[Path]:
    return sorted(
        path for path in (folder / "stages").glob(f"{name}-*") if (path / "manifest.json").exists()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run over two seeds, of which one arm fails. The text is too short for what
    its cap on repeats allows.
    """
    folder = tmp_path_factory.mktemp("reproduced")
    broken = "+arms.broken={mixture: {ratios: {raw: 1, instruction: 0}, max_repeats: {raw: 0.01}}}"
    with pytest.raises(
        UserError, match=r"^2 not done: broken seed 0, broken seed 5: .*max_repeats"
    ):
        reproduce(recipe(folder, "seeds=[0,5]", broken))
    return folder


@pytest.fixture(scope="module")
def by_stages(tmp_path_factory) -> Path:
    """The folder of a run that was asked for one stage after the other, and before that for stages
    that it was too early for.
    """
    folder = tmp_path_factory.mktemp("stages")
    with pytest.raises(
        UserError,
        match=(
            r"^2 not done: vanilla, instruct: corpus is not finished: run stages=\[synthesis\] "
            r"first"
        ),
    ):
        reproduce(recipe(folder, "stages=[training]"))
    assert not (folder / "stages").exists()
    reproduce(recipe(folder, "stages=[synthesis]"))
    assert len(stages(folder, "synthesis")) == 1 and not stages(folder, "tokens")
    with pytest.raises(
        UserError, match=r"instruct: rendering is not finished: run stages=\[tokens\] first"
    ):
        reproduce(recipe(folder, "stages=[training]"))
    reproduce(recipe(folder, "stages=[tokens]"))
    assert len(stages(folder, "tokens")) == 2 and not stages(folder, "training")
    reproduce(recipe(folder, "stages=[training]", "only=[instruct]"))
    assert len(stages(folder, "training")) == 1
    reproduce(recipe(folder, "stages=[training]"))
    with pytest.raises(
        UserError, match=r"start: evaluation is not finished: run stages=\[evaluation\] first"
    ):
        reproduce(recipe(folder, "stages=[report]"))
    reproduce(recipe(folder, "stages=[evaluation]"))
    assert not (folder / "run" / "report.html").exists()
    return folder


def test_a_stage_at_a_time_is_the_same_as_all_at_once(by_stages):
    before = sorted((by_stages / "stages").iterdir())
    reproduce(recipe(by_stages))
    assert sorted((by_stages / "stages").iterdir()) == before
    assert (by_stages / "run" / "report.html").exists()


def test_seeds_vary_the_training_alone(finished):
    assert len(stages(finished, "tokens")) == 2
    assert len(stages(finished, "training")) == 4
    arm = finished / "run" / "arms" / "vanilla"
    losses = [
        json.loads((arm / seed / "training" / "summary.json").read_text())["final_loss"]
        for seed in ("seed-0", "seed-5")
    ]
    assert losses[0] != losses[1]
    assert [
        json.loads((arm / f"seed-{seed}" / "training" / "manifest.json").read_text())["seed"]
        for seed in (0, 5)
    ] == [0, 5]


def test_the_seed_of_the_config_is_that_of_a_training_without_its_own(finished):
    """Whoever asks for seeds later keeps the run that was there before."""
    reproduce(recipe(finished, "stages=[training]", "seed=0"))
    assert len(stages(finished, "training")) == 4


def test_an_arm_that_fails_is_named_and_the_others_are_done(finished):
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["not_done"]) == {"broken seed 0", "broken seed 5"}
    assert "broken seed 0" in (run / "report.html").read_text()
    assert {row["arm"] for row in csv.DictReader((run / "results.csv").open())} == {
        "start",
        "vanilla",
        "instruct",
    }


def test_the_record_of_an_arm_agrees_with_its_stores(finished):
    run = finished / "run"
    record = read_record(run / "arms" / "instruct" / "seed-5")
    stores = {
        store.n_tokens for store in map(TokenStore.open, map(str, stages(finished, "tokens")))
    }
    source = record.sources["instruction"]
    assert source.unique_tokens in stores
    assert source.trained_tokens == record.trained_tokens == 2 * 2 * 64
    assert source.repeats == pytest.approx(source.trained_tokens / source.unique_tokens)
    assert (record.arm, record.seed, record.generator_flops, record.gpu_seconds) == (
        "instruct",
        5,
        0,
        0,
    )
    assert record.training_flops > 6 * 64 * 4
    rows = list(csv.DictReader((run / "record.csv").open()))
    assert [(row["arm"], row["seed"], row["source"]) for row in rows] == [
        (arm, seed, name)
        for arm, source in (("vanilla", "raw"), ("instruct", "instruction"))
        for seed in "05"
        for name in (source, "")
    ]
    assert json.loads((run / "summary.json").read_text())["records"][-1] == record.as_dict()


def test_the_manifest_says_how_to_run_it_again(finished):
    manifest = json.loads((finished / "run" / "manifest.json").read_text())
    assert manifest["command"].startswith("python -m ipt reproduce")
    assert set(manifest["lock_files"]) == {"cpu.txt", "gpu.txt"}
    assert manifest["data"]["corpus: documents.jsonl"]
    assert manifest["data"]["training: model"].startswith("embedded:tiny")
    made = {
        json.loads((path / "manifest.json").read_text())["digest"] for path in stages(finished, "*")
    }
    assert made.isdisjoint(manifest["data"].values())
    assert {stage["digest"] for stage in manifest["stages"]} <= made


def test_the_plan_has_shared_stages_once_and_knows_what_is_finished(finished, tmp_path):
    steps = plan_arms(recipe(finished, "seeds=[0,5]"))
    assert {step.state for step in steps} == {FINISHED}
    planned = plan_arms(recipe(tmp_path, "seeds=[0,5]"))
    assert [(step.name, step.arms) for step in planned] == [
        (step.name, step.arms) for step in steps
    ]
    assert {step.state for step in planned} == {TO_DO}
    corpus = next(step for step in planned if step.name == "corpus")
    assert corpus.arms == [
        "vanilla seed 0",
        "vanilla seed 5",
        "instruct seed 0",
        "instruct seed 5",
        "start",
    ]
    assert [step.tokens for step in planned if step.name == "training"] == [2 * 2 * 64] * 4
    assert not (tmp_path / "stages").exists()


def test_the_plan_names_an_input_that_is_not_here(tmp_path):
    steps = {step.name: step for step in plan_arms(recipe(tmp_path, "corpus.path=nowhere.jsonl"))}
    assert steps["corpus"].state == MISSING and "nowhere.jsonl" in steps["corpus"].problem
    assert steps["training"].state == TO_DO


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages=[train]"],
            r"stages=\[train\]: must be among synthesis, tokens",
        ),
        (["only=[other]"], r"only=\[other\]: must be among vanilla, instruct"),
        (["seeds=[1,1]"], "a seed occurs twice"),
        (["tasks=[]"], r"tasks=\[\]: name tasks to evaluate"),
        (
            ["trainer.devices=2"],
            r"torchrun --nproc-per-node=2 -m ipt reproduce … stages=\[training\]",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_reproduce(recipe(tmp_path, *overrides))
    if overrides[0].startswith("trainer"):  # what is for one process needs no others
        check_reproduce(recipe(tmp_path, *overrides, "stages=[synthesis,tokens]"))


def test_several_processes_only_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes were started"):
        check_reproduce(recipe(tmp_path, "trainer.devices=2"))
    check_reproduce(recipe(tmp_path, "trainer.devices=2", "stages=[training]"))


def test_verify_finds_a_changed_byte_and_a_missing_file(by_stages, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        verify(tmp_path)
    reproduce(recipe(by_stages))  # which only writes the report if the stages are there
    run = by_stages / "run"
    checked = verify(run)
    assert {found.folder for found in checked} == {
        path.resolve() for path in [run, *stages(by_stages, "*")]
    }
    assert all(found.whole and found.files for found in checked)
    tokens = next(stages(by_stages, "tokens")[0].rglob("tokens.bin"))
    _flip(tokens)
    export = next((stages(by_stages, "training")[0] / "export").glob("*.safetensors"))
    shutil.move(export, tmp_path / export.name)
    broken = {found.name: found for found in verify(run) if not found.whole}
    assert set(broken) == {"tokens", "training"}
    assert broken["tokens"].changed == [str(tokens.relative_to(stages(by_stages, "tokens")[0]))]
    assert broken["training"].missing == [f"export/{export.name}"]
    with pytest.raises(SystemExit) as ended:
        verify_main([str(run)])
    assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended:
        # from a stage back to what it was made of
        verify_main([str(stages(by_stages, "synthesis")[0])])
    assert ended.value.code == 0
    assert "2 of 2 folders are whole" in capsys.readouterr().out
    _flip(tokens)  # as it was: other tests use these stages
    shutil.move(tmp_path / export.name, export)
    assert all(found.whole for found in verify(run))


def test_verify_notices_a_manifest_that_was_made_to_fit(tmp_path):
    reproduce(recipe(tmp_path, "stages=[synthesis]", "only=[instruct]"))
    path = stages(tmp_path, "corpus")[0] / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "seed": 7}))
    assert [found.changed for found in verify(path.parent)] == [["manifest.json or stats.json"]]


def test_a_flipped_bit_anywhere_in_a_manifest_is_found_and_the_others_are_checked_all_the_same(
    tmp_path,
):
    stages = tmp_path / "stages"
    corpus = run_stage("corpus", None, _write_a_file, config={}, inputs={}, stages_dir=stages)
    tokens = run_stage(
        "tokens",
        None,
        _write_a_file,
        config={},
        inputs={"corpus": corpus.digest},
        stages_dir=stages,
    )
    path = corpus.folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :]
        )
        found = {found.folder: found for found in verify(stages)}
        assert not found[corpus.folder].whole, (
            f"byte {place}: {path.read_bytes()[max(place - 20, 0) : place + 20]!r}"
        )
        assert found[tokens.folder].whole


def _write_a_file(folder: Path) -> dict[str, int]:
    (folder / "file").write_text("content")
    return {"files": 1}


def test_a_stage_refuses_what_was_damaged_since_it_was_made(tmp_path):
    reproduce(recipe(tmp_path, "stages=[synthesis]"))
    (pairs,) = (stages(tmp_path, "synthesis")[0] / "pairs").iterdir()
    _flip(pairs)
    with pytest.raises(UserError, match=f"not what the stage wrote: .*{pairs.name}; remove"):
        reproduce(recipe(tmp_path, "stages=[tokens]", "only=[instruct]"))
    assert not stages(tmp_path, "rendering")


@pytest.mark.parametrize("name", ["stats.json", "manifest.json"])
def test_what_a_stage_has_noted_of_itself_cannot_change_unseen(tmp_path, name):
    stage = run_stage(
        "some", tmp_path / "some", lambda folder: {"documents": 123}, config={"a": 1}, inputs={}
    )
    path = stage.folder / name
    path.write_text(path.read_text().replace("123", "124").replace('"cpus": ', '"cpus": 9'))
    key = json.loads((stage.folder / "manifest.json").read_text())["key"]
    with pytest.raises(ValueError, match="not what the stage wrote"):
        load_stage(stage.folder, key)
    assert [found.whole for found in verify(stage.folder)] == [False]
    path.write_text(path.read_text()[:30])
    with pytest.raises(ValueError, match=name):
        load_stage(stage.folder, key)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_runs_are_listed_with_their_state(finished, tmp_path):
    entries = {entry.folder: entry for entry in list_runs(finished)}
    training = entries[stages(finished, "training")[0]]
    assert (training.kind, training.state, training.step) == ("training", "finished", "2 of 2")
    assert entries[finished / "run"].state == "finished in part"
    assert "held_out_perplexity" in entries[stages(finished, "evaluation")[0]].score
    assert training.size == sum(
        path.stat().st_size for path in training.folder.rglob("*") if path.is_file()
    )

    from filelock import FileLock

    begun = tmp_path / "training-1"
    begun.mkdir()
    (begun / ".started.json").write_text(
        json.dumps({"stage": "training", "config": {"trainer": {"max_steps": 9}}})
    )
    (begun / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    assert [(entry.state, entry.step) for entry in list_runs(tmp_path)] == [
        ("interrupted", "4 of 9")
    ]
    with FileLock(tmp_path / ".training-1.lock"):
        assert [entry.state for entry in list_runs(tmp_path)] == ["running"]
