"""Several processes for real, over gloo, against one; and blocks that are recomputed or compiled
against plain ones.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ipt.config import TrainerConfig
from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model, transformer_blocks
from ipt.training.parallelize import checkpoint_activations, parallelize, uses_fsdp
from tests.processes import run_ranks
from tests.training import ranks
from tests.training.jobs import assert_same_steps, read_metrics, run_jobs, train, write_job
from tests.training.model_cases import write_case

SHAPE = {
    "vocab_size": 401,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LARGE = {**SHAPE, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}


def _save(folder: Path, shape: dict, tied: bool) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied)).to(
        torch.bfloat16
    ).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, shape, tied in (
        ("tied", SHAPE, True),
        ("untied", SHAPE, False),
        ("large", LARGE, True),
    ):
        _save(folder / name, shape, tied)
    return folder


@pytest.fixture(scope="module")
def found(models):
    """What two processes found."""
    ended = run_ranks(ranks.main, models)
    assert ended.codes == [0, 0], ended.output
    return [json.loads((models / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "qlora"])
def test_a_model_loaded_in_slices_is_the_whole_one(found, kind):
    for rank in found:
        assert rank[kind]["names"]
        assert rank[kind]["losses"][0] == pytest.approx(rank[kind]["losses"][1], rel=1e-6)
        assert rank[kind]["difference"] < 1e-5 * rank[kind]["largest"]
        assert rank[kind]["gradients"] == {"tied": 29, "untied": 30, "lora": 42, "qlora": 42}[kind]


def test_no_process_ever_holds_the_whole_model(found):
    for rank in found:
        assert rank["memory"]["whole"] > 300e6
        assert rank["memory"]["taken"] < 0.62 * rank["memory"]["whole"]


def test_gradients_are_reduced_once_a_step_when_asked_for(found):
    groups = SHAPE["num_hidden_layers"] + 1
    for rank in found:
        assert rank["each"]["counts"] == [groups, groups, groups]
        assert rank["once"]["counts"] == [0, 0, groups]
        assert rank["once"]["norm"] == pytest.approx(rank["each"]["norm"], rel=1e-5)


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_optimizers_do_the_same_on_slices_and_skip_alike(found, name):
    # other blocks of 8 bits; products in bf16
    bound = {"adamw_8bit": 0.1, "lion_8bit": 0.3, "muon": 0.01}.get(name, 1e-6)
    for rank in found:
        result = rank["optimizers"][name]
        assert result["moved"] > 5e-3
        assert result["apart"] < bound
        assert result["untouched"]
        assert result["cut"]


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_slices_in_pieces_are_updated_as_whole_ones(found, name):
    assert [rank["pieces"][name] for rank in found] == [True, True]


def test_weights_in_bf16_are_rounded_alike_on_copies_of_a_slice(found):
    for rank in found:
        assert rank["bf16"]["untouched"]
        assert rank["bf16"]["cut"]
        assert rank["copies"]["equal"]
        assert rank["copies"]["moved"] > 0


def test_copies_of_a_sharded_model_equal_one_process(stores, make_config, tmp_path):
    settings = ["trainer.max_steps=3", "checkpoint.every_n_train_steps=100"]
    train(make_config(*settings, "trainer.micro_batch_size=8"), stores, tmp_path / "one")
    four = make_config(
        *settings,
        "trainer.micro_batch_size=1",
        "trainer.accumulate_grad_batches=2",
        "trainer.devices=4",
        "trainer.replicas=2",
    )
    ended = run_ranks(run_jobs, write_job(four, stores, tmp_path / "four"), processes=4)
    assert ended.codes == [0, 0, 0, 0], ended.output
    assert_same_steps(tmp_path / "four", tmp_path / "one", tolerance=1e-3)


def test_load_balancing_under_fsdp2_is_the_mean_over_micro_batches(
    stores, make_config, small_model, tmp_path
):
    """Two ranks with a sequence each train as one process that accumulates over the two
    sequences.
    """
    folder = write_case("Mixtral", tmp_path / "model", small_model)
    settings = (
        "trainer.max_steps=2",
        "trainer.micro_batch_size=1",
        "checkpoint.every_n_train_steps=9",
        "optimizer.lr=1e-2",
    )
    one, two = (
        make_config(*settings, "trainer.accumulate_grad_batches=2"),
        make_config(*settings, "trainer.devices=2"),
    )
    one.model = two.model = folder
    train(one, stores, tmp_path / "one")
    ended = run_ranks(run_jobs, write_job(two, stores, tmp_path / "two"))
    assert ended.codes == [0, 0], ended.output[-2000:]
    assert_same_steps(tmp_path / "two", tmp_path / "one", tolerance=1e-3)
    for ours, other in zip(
        read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True
    ):
        assert ours["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-3)


def _value_and_gradients(model: CausalLMLoss) -> tuple[float, int, list[torch.Tensor]]:
    """Loss, bytes that are saved for the backward pass, and gradients."""
    saved: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(ranks.batch_of(0), 1 / ranks.LENGTH, True)
    loss.backward()
    return loss.item(), sum(saved.values()), [parameter.grad for parameter in model.parameters()]


def test_recomputing_changes_memory_and_nothing_else(models):
    plain = CausalLMLoss(build_model(ranks.config_of(models / "tied")), 16)
    modes = {}
    for mode in ("none", "full", "selective"):
        model = copy.deepcopy(plain)
        checkpoint_activations(transformer_blocks(model.model), mode)
        modes[mode] = _value_and_gradients(model)
    for mode in ("full", "selective"):
        assert modes[mode][0] == modes["none"][0]
        torch.testing.assert_close(modes[mode][2], modes["none"][2], rtol=0, atol=0)
    assert modes["full"][1] < 0.3 * modes["none"][1]


def test_selective_recomputing_runs_fewer_matrix_products_again(models):
    from torch.utils.flop_counter import FlopCounterMode

    plain = CausalLMLoss(build_model(ranks.config_of(models / "tied")), 16)
    flops = {}
    for mode in ("none", "full", "selective"):
        model = copy.deepcopy(plain)
        checkpoint_activations(transformer_blocks(model.model), mode)
        with FlopCounterMode(display=False) as counter:
            _value_and_gradients(model)
        flops[mode] = counter.get_total_flops()
    assert flops["none"] < flops["selective"] < flops["full"]


@pytest.mark.parametrize("mode", ["none", "budget"])
def test_compiled_blocks_do_the_same(models, mode):
    torch.compiler.reset()  # else the programs of the other mode would be used again
    config = ranks.config_of(models / "tied", attn_implementation="sdpa")
    plain = CausalLMLoss(build_model(config), 16)
    compiled = copy.deepcopy(plain)
    names = list(compiled.state_dict())
    options = TrainerConfig(compile=True, activation_checkpointing=mode, activation_budget=0.1)
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        parallelize(compiled, transformer_blocks(compiled.model), None, options)
        value, saved, gradients = _value_and_gradients(compiled)
    assert list(compiled.state_dict()) == names
    expected, plain_saved, expected_gradients = _value_and_gradients(plain)
    assert value == pytest.approx(expected, rel=1e-6)
    assert saved < (0.5 if mode == "budget" else 1) * plain_saved
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "has_gpu", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"accelerator": "cpu"}, True, False),
        ({"accelerator": "cpu", "num_nodes": 2}, False, True),
        ({"strategy": "single"}, True, False),
        ({"strategy": "fsdp2"}, False, True),
    ],
)
def test_auto_shards_on_gpus_and_with_several_processes(settings, has_gpu, expected):
    assert uses_fsdp(TrainerConfig(**settings), has_gpu) is expected
