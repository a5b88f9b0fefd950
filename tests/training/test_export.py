"""Exports, of a run at its end and of its checkpoints, against the model that was trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ipt.export import huggingface as module
from ipt.export.huggingface import export_checkpoint, main
from ipt.mixture.batches import IGNORE, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.models import load_model, load_tokenizer
from ipt.tokens.store import TokenStore
from ipt.training.checkpoint.storage import read_whole_tensors, whole_checkpoints
from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model
from tests.training.jobs import train

IDS = torch.arange(100, 140)[None]


def test_the_export_is_the_trained_model(uninterrupted, small_model):
    output, _ = uninterrupted
    start, weights = (
        load_model(small_model, torch.float32),
        load_file(output / "export" / "model.safetensors"),
    )
    assert any(
        (weights[name] != value).any()
        for name, value in start.state_dict().items()
        if name in weights
    )
    (checkpoint,) = whole_checkpoints(output / "checkpoints")
    start.load_state_dict(read_whole_tensors(checkpoint, "model.", torch.float32), strict=False)
    start.tie_weights()
    exported = load_model(str(output / "export"), torch.float32)
    assert exported.state_dict().keys() == start.state_dict().keys()
    assert all(
        torch.equal(value, start.state_dict()[name])
        for name, value in exported.state_dict().items()
    )
    # not to the bit: how weights lie in memory may change a sum
    torch.testing.assert_close(exported(IDS).logits, start(IDS).logits)
    assert (
        load_tokenizer(str(output / "export"))("a heart")["input_ids"]
        == load_tokenizer(small_model)("a heart")["input_ids"]
    )


def test_the_loss_of_the_export_is_that_of_the_next_step(stores, make_config, tmp_path):
    """Trained weights as the run itself saw them: the loss on the batch of step 4, by the export
    after step 3.
    """
    config = make_config(
        "optimizer.lr=1e-2", "checkpoint.keep_last=9", "checkpoint.every_n_train_steps=3"
    )
    train(config, stores, tmp_path / "run")
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "third")
    opened = {name: TokenStore(folder) for name, folder in stores.items()}
    plan = make_plan(opened, config.mixture, 12, config.seed)
    batch = PackedSequences(plan, [opened[name] for name in plan.sources]).batch([6, 7])
    config.model = str(tmp_path / "third")
    _, losses = CausalLMLoss(build_model(config), chunk=64)(batch, 1.0, True)
    fourth = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[3])
    assert losses.mean().item() == pytest.approx(fourth["loss"], rel=1e-6)
    assert (batch["labels"] != IGNORE).sum() == len(losses)


def test_a_checkpoint_exports_as_the_run_does(uninterrupted, tmp_path):
    output, _ = uninterrupted
    main([str(output), str(tmp_path / "export")])
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    ):
        assert (tmp_path / "export" / name).read_bytes() == (
            output / "export" / name
        ).read_bytes(), name


def test_a_sharded_checkpoint_exports_in_one_process(uninterrupted_two, tmp_path):
    (checkpoint,) = whole_checkpoints(uninterrupted_two / "checkpoints")
    assert len({path.name.split("-")[1] for path in checkpoint.glob("shard-*")}) == 2
    export_checkpoint(checkpoint, tmp_path / "export")
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "export", uninterrupted_two / "export")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bf16_by_choice_and_several_files(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", "8KB")
    export_checkpoint(uninterrupted[0], tmp_path / "export", dtype="bfloat16")
    files = list((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 1
    halves = {name: tensor for file in files for name, tensor in load_file(file).items()}
    exact = load_file(uninterrupted[0] / "export" / "model.safetensors")
    assert halves.keys() == exact.keys()
    assert all(torch.equal(halves[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("quantize", ["null", "4bit", "8bit"])
def test_lora_is_merged_and_written_apart(quantize, stores, make_config, tmp_path, small_model):
    from peft import PeftModel
    from peft.utils.integrations import dequantize_module_weight

    config = make_config("lora.rank=2", f"lora.quantize={quantize}", "optimizer.lr=1e-2")
    train(config, stores, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    merged = load_file(tmp_path / "export" / "model.safetensors")
    ours = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert merged.keys() == ours.keys()
    assert all(torch.equal(ours[name], merged[name]) for name in ours)

    base = build_model(config, "sdpa").get_base_model()  # as training sees it
    start = load_model(small_model, torch.float32)
    for name, part in base.named_modules():
        if hasattr(part, "base_layer"):
            start.get_submodule(name).weight.data = (
                dequantize_module_weight(part.base_layer).detach().float()
            )
    # In float64 the kernels of the CPU play no part: what differs is that each merged weight was
    # rounded to float32, a few times.
    rounding = 100 * torch.finfo(torch.float32).eps
    apart = PeftModel.from_pretrained(start, tmp_path / "export" / "adapter").double()(IDS).logits
    together = load_model(str(tmp_path / "export"), torch.float32).double()(IDS).logits
    torch.testing.assert_close(together, apart, rtol=0, atol=rounding * apart.abs().max().item())
    plain = load_model(small_model, torch.float32).double()(IDS).logits
    assert (plain - apart).abs().max() > 1e-2
    assert "quantization_config" not in json.loads(
        (tmp_path / "export" / "config.json").read_text()
    )


def test_the_card_says_what_it_was_trained_on(uninterrupted):
    card = (uninterrupted[0] / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    for part in (
        "| raw |",
        "| instruction |",
        "6 of 6 steps, 768 tokens",
        "## Licence",
        "peak learning rate 0.05, cosine",
    ):
        assert part in card
    targets = [
        row.split("|")[6].strip()
        for row in card.splitlines()
        if row.startswith(("| raw", "| instruction"))
    ]
    assert (
        sum(int(count.replace(",", "")) for count in targets) == uninterrupted[1]["target_tokens"]
    )


def test_mistakes_are_told(uninterrupted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ([str(tmp_path / "nothing"), str(tmp_path / "new")], "is no checkpoint"),
        ([str(uninterrupted[0]), str(tmp_path / "full")], "is not empty"),
        ([str(uninterrupted[0]), str(tmp_path / "new"), "--push", "name"], "must be OWNER/NAME"),
        ([str(uninterrupted[0]), str(tmp_path / "new"), "--push", "owner/name"], "needs a token"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "new").exists()
