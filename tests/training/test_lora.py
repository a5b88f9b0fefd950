"""LoRA layers over plain and quantised weights: what trains and what stays; test_parallelize.py has
them on several processes.
"""

import pytest
import torch

from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model, is_lora
from ipt.training.optim.build import build_optimizer
from tests.training.ranks import batch_of


def _codes(model) -> dict[str, torch.Tensor]:
    """All frozen weights, quantised ones as they are stored."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


@pytest.mark.parametrize(
    ("quantize", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt"), (None, "Linear")]
)
def test_a_step_trains_lora_layers_and_moves_nothing_else(quantize, kind, make_config):
    # the loss falls at each step, without swinging
    config = make_config("lora.rank=2", "optimizer.lr=3e-3")
    config.lora.quantize = quantize
    model = build_model(config)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == kind
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if is_lora(name)}
    loss, frozen = CausalLMLoss(model, 64), _codes(model)
    optimizer, values = build_optimizer(loss, config.optimizer), []
    for _ in range(8):
        value, _ = loss(batch_of(0), 1 / 48, True)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.05
    for name, parameter in model.named_parameters():
        if is_lora(name):
            assert ".lora_A." in name or parameter.abs().max() > 0  # B begins at zero
        else:
            assert torch.equal(parameter, frozen[name])


def test_four_bits_are_close_to_the_weights_they_stand_for(make_config):
    config = make_config("lora.rank=2")
    batch = batch_of(0)
    plain, _ = CausalLMLoss(build_model(config), 64)(batch, 1 / 48, True)
    config.lora.quantize = "4bit"
    loss, _ = CausalLMLoss(build_model(config), 64)(batch, 1 / 48, True)
    assert loss.item() != plain.item()
    assert loss.item() == pytest.approx(plain.item(), rel=0.01)


def test_first_values_follow_the_seed_and_the_name(make_config):
    models = [build_model(make_config("lora.rank=2", f"seed={seed}")) for seed in (0, 0, 1)]
    values = [
        {name: parameter for name, parameter in model.named_parameters() if ".lora_A." in name}
        for model in models
    ]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not any(torch.equal(values[0][name], values[2][name]) for name in values[0])
    assert len({value.flatten()[0].item() for value in values[0].values()}) == len(values[0])
