"""Optimizers against torch's and bitsandbytes' own, and roundings against what they must be on
average.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ipt.config import Config, LrSchedulerConfig, OptimizerConfig, TrainerConfig
from ipt.training.optim.arithmetic import orthogonalised, round_stochastically
from ipt.training.optim.build import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    warmup_steps,
)
from ipt.training.optim.optimizers import AdamW, _piece
from ipt.training.validation import check_training
from tests.examples import examples


def _trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5
) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        batch = torch.randn(8, 128, generator=torch.Generator().manual_seed(step)).to(
            next(model.parameters()).dtype
        )
        (model(batch).float() - 1).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 128))


@torch.no_grad()
def _difference(
    left: list[torch.Tensor], right: list[torch.Tensor], start: list[torch.Tensor]
) -> float:
    """Of two trained models, as a share of the way that the second has gone."""
    apart = sum(
        float((one - other).float().square().sum()) for one, other in zip(left, right, strict=True)
    )
    way = sum(
        float((one - other).float().square().sum()) for one, other in zip(right, start, strict=True)
    )
    return (apart / way) ** 0.5


@pytest.mark.parametrize(
    ("name", "peer", "bound"),
    [
        ("adamw", lambda groups, options: torch.optim.AdamW(groups, **options), 1e-5),
        # another eps for small tensors
        ("adamw_8bit", lambda groups, options: _bitsandbytes("AdamW8bit", groups, options), 1e-4),
        (
            "lion",
            lambda groups, options: _bitsandbytes("Lion32bit", groups, {**options, "eps": None}),
            1e-5,
        ),
        (
            "lion_8bit",
            lambda groups, options: _bitsandbytes("Lion8bit", groups, {**options, "eps": None}),
            1e-5,
        ),
        ("adamw_8bit", lambda groups, options: torch.optim.AdamW(groups, **options), 0.1),
        (
            "lion_8bit",
            lambda groups, options: _bitsandbytes("Lion32bit", groups, {**options, "eps": None}),
            0.3,
        ),
    ],
)
def test_they_do_what_their_peers_do(name, peer, bound):
    """The last two: moments in 8 bits against those in 32, within a stated bound."""
    start, config = _model(), OptimizerConfig(name=name, lr=3e-3)
    model, other = copy.deepcopy(start), copy.deepcopy(start)
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    left = _trained(model, build_optimizer(model, config))
    right = _trained(other, peer(parameter_groups(other, config), options))
    assert _difference(left, right, list(start.parameters())) < bound


def _bitsandbytes(name: str, groups, options):
    import bitsandbytes.optim

    return getattr(bitsandbytes.optim, name)(
        groups, **{key: value for key, value in options.items() if value is not None}
    )


def test_adamw_on_weights_in_fp32_is_torchs_fused_one():
    model, other = _model(), _model()
    config = OptimizerConfig(lr=3e-3)
    fused = build_optimizer(model, config)
    assert isinstance(fused, torch.optim.AdamW)
    ours = AdamW(
        parameter_groups(other, config), {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}, seed=0
    )
    torch.testing.assert_close(_trained(model, fused), _trained(other, ours), rtol=0, atol=0)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 50, bias=False))
    groups = parameter_groups(model, OptimizerConfig(name="muon"))
    assert [
        parameter.shape for group in groups if group["orthogonal"] for parameter in group["params"]
    ] == [(24, 16)]
    for shape in ((40, 64), (64, 40)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalised(matrix))
        assert values.min() > 0.6
        assert values.max() < 1.3
    one, other = nn.Linear(64, 40, bias=False), nn.Linear(64, 40, bias=False)
    other.load_state_dict(one.state_dict())
    ours = build_optimizer(one, OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1))
    peer = torch.optim.Muon(
        other.parameters(), lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    start = one.weight.detach().clone()
    for model, optimizer in ((one, ours), (other, peer)):
        for step in range(3):
            model.weight.grad = torch.randn(40, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    # products in bf16, in another order
    assert _difference([one.weight], [other.weight], [start]) < 0.02


@examples(50)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20)
)
def test_rounding_goes_to_a_neighbour_and_keeps_what_bf16_has(numbers):
    values = torch.tensor(numbers)
    rounded = round_stochastically(values).float()
    nearest = values.bfloat16().float()
    finite = nearest.isfinite() & rounded.isfinite()
    unit = torch.maximum(values.abs() / 128, torch.tensor(2.0**-133))
    assert ((rounded - values).abs() <= unit)[finite].all()
    assert torch.equal(round_stochastically(nearest).float()[finite], nearest[finite])


def test_rounding_is_right_on_average():
    value = 1 + 0.3 / 128  # between 1 and the next number that bf16 has
    rounded = round_stochastically(
        torch.full((100_000,), value), torch.Generator().manual_seed(0)
    ).float()
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert rounded.mean().item() == pytest.approx(value, abs=5 * 0.5 / 128 / 100_000**0.5)


def test_small_changes_of_weights_in_bf16_are_not_lost():
    """A hundred changes of a hundredth of a unit: to the nearest they come to nothing,
    stochastically to what they are.
    """
    moved = {}
    for kind in ("stochastic", "nearest"):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        options = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
        optimizer = AdamW([{"params": [weight], "weight_decay": 0.0}], options, seed=0)
        if kind == "nearest":
            optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[kind] = 1 - weight.detach().float().mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "lion_8bit", "muon"])
def test_a_weight_in_pieces_is_updated_as_the_whole_one(name, monkeypatch):
    """To the bit, state included, taken steps and left ones. On a CPU the noise of pieces in order
    is that of the whole.
    """
    ended = []
    for piece in (1 << 24, 5 * 256):  # of 12,288 numbers
        monkeypatch.setattr("ipt.training.optim.optimizers.PIECE", piece)
        model = _model().to(torch.bfloat16)
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=3e-3))
        optimizer.found_inf = torch.tensor(0.0)
        weights = _trained(model, optimizer)
        tensors = [
            *weights,
            *(value for state in optimizer.state.values() for value in state.values()),
        ]
        ended.append([tensor.clone() for tensor in tensors])
        optimizer.found_inf = torch.tensor(1.0)
        _trained(model, optimizer, 1)
        assert all(map(torch.equal, tensors, ended[-1]))
    assert all(map(torch.equal, *ended))


def test_a_piece_of_paged_memory_is_known_as_such():
    codes = torch.zeros(8, 256, dtype=torch.uint8)
    codes.is_paged, codes.page_deviceid = True, 0
    piece = _piece("state1", codes, 512, 1024)
    assert (piece.is_paged, piece.page_deviceid, piece.shape, piece.data_ptr()) == (
        True,
        0,
        (512,),
        codes.data_ptr() + 512,
    )


def test_embeddings_are_decayed_by_choice_and_norms_never():
    model = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50))
    for choice in (True, False):
        groups = parameter_groups(model, OptimizerConfig(decay_embeddings=choice, weight_decay=0.1))
        decayed = [
            tuple(parameter.shape)
            for group in groups
            if group["weight_decay"]
            for parameter in group["params"]
        ]
        linear = model[2].weight
        assert any(
            parameter is linear
            for group in groups
            if group["weight_decay"]
            for parameter in group["params"]
        )
        assert decayed == ([(50, 16), (50, 16)] if choice else [(50, 16)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules(name):
    config = LrSchedulerConfig(name=name, warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.2)
    factors = np.array([learning_rate_factor(step, config, 100) for step in range(101)])
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert (np.diff(factors[10:]) <= 1e-12).all()
    expected = {"cosine": 0.55, "linear": 0.55, "constant": 1.0, "wsd": 1.0}
    assert factors[55] == pytest.approx(expected[name])
    assert factors[100] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert (factors[10:81] == 1).all() == (name in ("constant", "wsd"))
    assert factors[90] == pytest.approx({"constant": 1.0, "wsd": 0.55}.get(name, factors[90]))


def test_a_warm_up_in_tokens_is_rounded_up_to_steps():
    config = Config()
    config.trainer = TrainerConfig(micro_batch_size=2, accumulate_grad_batches=3, devices=4)
    config.mixture.seq_len = 100
    config.lr_scheduler.warmup_tokens = 2401
    assert warmup_steps(config) == 2
    config.lr_scheduler.warmup_tokens = None
    config.lr_scheduler.warmup_steps = 7
    assert warmup_steps(config) == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "trainer.attn_implementation",
            "fastest",
            "trainer.attn_implementation=fastest: must be one of auto, packed",
        ),
        ("trainer.activation_checkpointing", "budget", "set trainer.compile=true"),
        (
            "trainer.activation_checkpointing",
            "True",
            "=True: must be one of none, full, selective, budget; True is now called full$",
        ),
        (
            "trainer.activation_checkpointing",
            "False",
            "=False: must be one of none, full, selective, budget; False is now called none$",
        ),
        ("trainer.activation_budget", 2.0, "must be between 0 and 1"),
        ("trainer.profiler", "none", "null, simple, advanced, pytorch; none is now called null$"),
        ("trainer.profiler", "torch", "torch is now called pytorch$"),
        ("trainer.replicas", 3, "must divide the number of devices, 4"),
        ("trainer.skip_spikes", 0.0, "must be above 0"),
        ("optimizer.name", "adafactor", "must be one of adamw, adamw_8bit"),
        ("lora.quantize", "4bit", "set lora.rank"),
        ("lr_scheduler.warmup_tokens", 5, "in steps or in tokens"),
    ],
)
def test_mistakes_are_one_line(key, value, message):
    config = Config()
    config.trainer.devices, config.lr_scheduler.warmup_steps = 4, 3
    check_training(config)
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(ValueError, match=message):
        check_training(config)
