"""The training stage on a tiny model, for real."""

import pytest

from ipt.config import SchedulePoint
from ipt.training.train import train as train_stage
from tests.training.jobs import SOURCES, assert_same_steps, read_metrics, train
from tests.training.small_model import VOCABULARY


def test_the_loss_falls_and_the_figures_add_up(uninterrupted):
    output, summary = uninterrupted
    steps = read_metrics(output)
    assert [step["step"] for step in steps] == list(range(1, 7))
    # of at most 0.47, from 320 tokens alike to 200
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert summary["tokens"] == 6 * 2 * 64
    assert summary["sources"]["raw"]["realised"] == pytest.approx(0.5)
    for step in steps:
        parts = [(step[f"loss/{name}"], step[f"tokens/{name}"]) for name in SOURCES]
        total = sum(tokens for _, tokens in parts)
        assert step["loss"] == pytest.approx(sum(loss * tokens for loss, tokens in parts) / total)
    assert summary["target_tokens"] == sum(
        step["tokens/raw"] + step["tokens/instruction"] for step in steps
    )


def test_accumulating_equals_a_larger_batch(uninterrupted, stores, make_config, tmp_path):
    train(
        make_config("trainer.micro_batch_size=1", "trainer.accumulate_grad_batches=2"),
        stores,
        tmp_path / "run",
    )
    assert_same_steps(tmp_path / "run", uninterrupted[0], tolerance=1e-4)


def test_eight_bit_adamw_stays_close_to_adamw(uninterrupted, stores, make_config, tmp_path):
    summary = train(make_config("optimizer.name=adamw_8bit"), stores, tmp_path / "run")
    assert summary["final_loss"] == pytest.approx(uninterrupted[1]["final_loss"], abs=0.02)


def test_from_scratch_and_with_activation_checkpointing(
    uninterrupted, stores, make_config, tmp_path
):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = make_config()
    config.architecture = {"model_type": "llama", **shape}
    scratch = train(config, stores, tmp_path / "scratch")
    assert scratch["final_loss"] < read_metrics(tmp_path / "scratch")[0]["loss"]
    train(make_config("trainer.activation_checkpointing=full"), stores, tmp_path / "checkpointed")
    assert_same_steps(tmp_path / "checkpointed", uninterrupted[0], tolerance=1e-4)


def test_weights_in_bf16_learn_as_their_masters_do(stores, make_config, tmp_path):
    """Under FSDP2 in one process, as on a GPU: the same arithmetic, and weights in bf16, or in fp32
    and rounded for it.
    """
    arithmetic = ("trainer.precision=bf16-mixed", "trainer.strategy=fsdp2")
    masters = train(make_config(*arithmetic), stores, tmp_path / "masters")
    summary = train(
        make_config(*arithmetic, "trainer.precision=bf16-true"), stores, tmp_path / "run"
    )
    assert read_metrics(tmp_path / "run")[0]["loss"] - summary["final_loss"] > 0.1
    assert summary["final_loss"] == pytest.approx(masters["final_loss"], abs=0.008)
    assert summary["attention"] == "packed"


def test_best_fit_a_schedule_and_loader_workers(stores, make_config, tmp_path):
    config = make_config(
        "mixture.packing=best_fit", "trainer.num_workers=1", "trainer.accumulate_grad_batches=2"
    )
    config.mixture.schedule = [
        SchedulePoint(0.0, {"raw": 1.0}),
        SchedulePoint(0.5, {"instruction": 1.0}),
    ]
    summary = train(config, stores, tmp_path / "run")
    packed = summary["mixture"]
    assert packed["packing"] == "best_fit"
    assert summary["tokens"] + packed["padding"] == 6 * 2 * 2 * 64
    assert summary["tokens"] == sum(row["tokens"] for row in summary["sources"].values())
    assert summary["target_tokens"] < summary["tokens"]
    assert packed["course"][49]["tokens"]["instruction"] == 0
    assert read_metrics(tmp_path / "run")[-1]["loss"] < read_metrics(tmp_path / "run")[0]["loss"]


def test_without_an_exporter_only_the_model_folder_is_missing(stores, make_config, tmp_path):
    train_stage(make_config("trainer.max_steps=1"), stores, tmp_path / "run")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "summary.json", "checkpoints"} <= written
    assert "export" not in written


def test_too_many_repeats_and_other_mistakes_are_told(stores, make_config, tmp_path):
    with pytest.raises(ValueError, match="would read source raw"):
        train(make_config("mixture.max_repeats.raw=0.1"), stores, tmp_path / "run")
