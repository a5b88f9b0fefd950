"""The training stage on a tiny model, for real: processes, checkpoints, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipt.models import load_model
from ipt.training.run import train

RATIOS = {"raw": 0.5, "instruction": 0.5}
SCRIPT = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from ipt.config import Config
from ipt.training.run import train
job = json.loads(Path(sys.argv[1]).read_text())
config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), job["config"]))
train(config, {name: Path(folder) for name, folder in job["stores"].items()}, job["ratios"], Path(job["output"]))
"""


def _metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _same_steps(left: Path, right: Path, tolerance: float = 0.0) -> None:
    for one, other in zip(_metrics(left), _metrics(right), strict=True):
        for name in ("step", "tokens", "loss", "grad_norm", "lr", "loss/raw", "tokens/raw", "tokens/instruction"):
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=0), (one["step"], name)


def _job(config, stores, output: Path) -> list[str]:
    job = {
        "config": asdict(config),
        "stores": {name: str(folder) for name, folder in stores.items()},
        "ratios": RATIOS,
        "output": str(output),
    }
    path = output.with_suffix(".json")
    path.write_text(json.dumps(job))
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    return [str(script), str(path)]


@pytest.fixture(scope="module")
def uninterrupted(stores, make_config, tmp_path_factory):
    """A finished run that others are compared with."""
    output = tmp_path_factory.mktemp("run") / "whole"
    return output, train(make_config(), stores, RATIOS, output)


def test_the_loss_falls_and_the_figures_add_up(uninterrupted):
    output, summary = uninterrupted
    steps = _metrics(output)
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert summary["tokens"] == 6 * 2 * 64
    assert summary["sources"]["raw"]["realised"] == pytest.approx(0.5)
    for step in steps:
        parts = [(step[f"loss/{name}"], step[f"tokens/{name}"]) for name in RATIOS]
        total = sum(tokens for _, tokens in parts)
        assert step["loss"] == pytest.approx(sum(loss * tokens for loss, tokens in parts) / total)
    assert summary["target_tokens"] == sum(step["tokens/raw"] + step["tokens/instruction"] for step in steps)


def test_the_export_is_the_trained_model(uninterrupted, tiny_model):
    output, _ = uninterrupted
    start, trained = load_model(tiny_model, torch.float32), load_model(str(output / "export"), torch.float32)
    weights = load_file(output / "export" / "model.safetensors")
    assert any((weights[name] != value).any() for name, value in start.state_dict().items() if name in weights)
    checkpoint = torch.load(next((output / "checkpoints").glob("*.ckpt")), weights_only=True)
    ids = torch.arange(100, 140)[None]
    model = load_model(tiny_model, torch.float32)
    model.load_state_dict({name.removeprefix("loss.model."): value for name, value in checkpoint["state_dict"].items()})
    torch.testing.assert_close(model(ids).logits, trained(ids).logits, rtol=0, atol=0)


def test_accumulating_equals_a_larger_batch(uninterrupted, stores, make_config, tmp_path):
    train(make_config("trainer.micro_batch_size=1", "trainer.accumulate=2"), stores, RATIOS, tmp_path / "run")
    _same_steps(tmp_path / "run", uninterrupted[0], tolerance=1e-4)


def test_two_ranks_under_fsdp2_equal_one_process(uninterrupted, stores, make_config, tmp_path):
    output = tmp_path / "two"
    config = make_config("trainer.devices=2", "trainer.micro_batch_size=1", "trainer.checkpoint_steps=100")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *_job(config, stores, output)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    _same_steps(output, uninterrupted[0], tolerance=1e-3)
    one, two = (load_file(folder / "export" / "model.safetensors") for folder in (uninterrupted[0], output))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)


def test_killed_and_run_again_equals_uninterrupted(stores, make_config, tmp_path):
    config = make_config("trainer.max_steps=40", "trainer.checkpoint_steps=3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, stores, RATIOS, whole)
    process = subprocess.Popen(
        [sys.executable, *_job(config, stores, killed)], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    while not list((killed / "checkpoints").glob("*.ckpt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    taken = len((killed / "metrics.jsonl").read_text().splitlines())
    assert 0 < taken < 40
    train(config, stores, RATIOS, killed)
    _same_steps(killed, whole)
    assert (killed / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()


def test_eight_bit_adamw_stays_close_to_adamw(uninterrupted, stores, make_config, tmp_path):
    summary = train(make_config("optimizer.name=adamw_8bit"), stores, RATIOS, tmp_path / "run")
    assert summary["final_loss"] == pytest.approx(uninterrupted[1]["final_loss"], rel=0.03)


def test_lora_trains_adapters_only_and_exports_them_merged_and_apart(stores, make_config, tmp_path, tiny_model):
    train(make_config("lora.rank=2"), stores, RATIOS, tmp_path / "run")
    from peft import PeftModel

    merged = load_model(str(tmp_path / "run" / "export"), torch.float32)
    apart = PeftModel.from_pretrained(load_model(tiny_model, torch.float32), tmp_path / "run" / "adapter")
    ids = torch.arange(100, 140)[None]
    torch.testing.assert_close(merged(ids).logits, apart(ids).logits, rtol=0, atol=1e-5)
    start = load_model(tiny_model, torch.float32).state_dict()
    assert (merged.state_dict()["model.embed_tokens.weight"] == start["model.embed_tokens.weight"]).all()
    assert any((merged.state_dict()[name] != value).any() for name, value in start.items())


def test_from_scratch_and_with_activation_checkpointing(uninterrupted, stores, make_config, tmp_path):
    shape = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = make_config()
    config.architecture = {"model_type": "llama", **shape}
    scratch = train(config, stores, RATIOS, tmp_path / "scratch")
    assert scratch["final_loss"] < _metrics(tmp_path / "scratch")[0]["loss"]
    train(make_config("trainer.activation_checkpointing=true"), stores, RATIOS, tmp_path / "checkpointed")
    _same_steps(tmp_path / "checkpointed", uninterrupted[0], tolerance=1e-4)


def test_too_many_repeats_and_other_mistakes_are_told(stores, make_config, tmp_path):
    with pytest.raises(ValueError, match="would read source raw"):
        train(make_config("mixture.max_repeats.raw=0.1"), stores, RATIOS, tmp_path / "run")
