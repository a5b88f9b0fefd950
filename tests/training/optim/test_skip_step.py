"""The guard against a plain computation, and what a skipped step leaves as it was."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ipt.config import OptimizerConfig
from ipt.training.optim.build import build_optimizer
from ipt.training.optim.skip_step import MIN_STEPS, NORMAL, PATIENCE, WINDOW, SkipStep
from tests.examples import examples
from tests.training.jobs import read_metrics, train


def _run(guard: SkipStep, losses, norms) -> list[bool]:
    return [
        bool(guard(torch.tensor(loss), torch.tensor(norm)))
        for loss, norm in zip(losses, norms, strict=True)
    ]


def _expected(losses, norms, limit: float) -> list[bool]:
    """The same in numpy, with lists: the last WINDOW accepted steps, medians, and deviations from
    them.
    """
    accepted: list[tuple[float, float]] = []
    in_a_row, skips = 0, []
    for values in zip(losses, norms, strict=True):
        finite = bool(np.isfinite(values).all())
        spike = False
        if len(accepted) >= MIN_STEPS:
            window = np.array(accepted[-WINDOW:], np.float32)
            # torch's median of an even number is the lower one
            low = np.sort(window, 0)[(len(window) - 1) // 2]
            spread = np.sort(abs(window - low), 0)[(len(window) - 1) // 2]
            limits = low + limit * np.maximum(NORMAL * spread, 0.02 * abs(low))
            spike = bool((np.array(values, np.float32) > limits).any())
        if finite and spike and in_a_row >= PATIENCE:
            accepted, spike = [], False
        skip = not finite or spike
        in_a_row = in_a_row + 1 if skip else 0
        accepted += [] if skip else [values]
        skips.append(skip)
    return skips


@examples(30)
@given(st.integers(0, 2**31), st.floats(3, 10), st.floats(0, 0.1))
def test_as_a_plain_computation_says(seed, limit, share):
    random = np.random.default_rng(seed)
    losses, norms = 3 + 0.1 * random.standard_normal(300), np.exp(0.2 * random.standard_normal(300))
    for values in (losses, norms):
        values[random.random(300) < share] *= 10
    norms[random.random(300) < 0.01] = np.nan
    losses[150:] += 5  # another level
    losses, norms = losses.astype(np.float32).tolist(), norms.astype(np.float32).tolist()
    assert _run(SkipStep(limit), losses, norms) == _expected(losses, norms, limit)


def test_a_spike_is_skipped_and_does_not_count():
    guard = SkipStep(6.0)
    calm = [3 + 0.01 * (step % 7) for step in range(MIN_STEPS)]
    assert not any(_run(guard, calm, calm))
    window = guard.window.clone()
    assert _run(guard, [30.0], [3.0]) == [True]
    assert _run(guard, [3.0], [30.0]) == [True]
    assert _run(guard, [torch.nan], [3.0]) == [True]
    assert _run(guard, [3.0], [torch.inf]) == [True]
    assert torch.equal(guard.window, window)
    assert (int(guard.skipped), int(guard.in_a_row)) == (4, 4)
    assert _run(guard, [3.01], [3.01]) == [False]
    assert int(guard.in_a_row) == 0


def test_a_new_level_is_accepted_in_the_end_but_never_what_is_not_finite():
    guard = SkipStep(6.0)
    _run(guard, [3.0] * MIN_STEPS, [1.0] * MIN_STEPS)
    assert _run(guard, [9.0] * (PATIENCE + 2), [1.0] * (PATIENCE + 2)) == [True] * PATIENCE + [
        False,
        False,
    ]
    assert all(_run(guard, [torch.nan] * 30, [1.0] * 30))


def test_without_a_limit_only_what_is_not_finite_is_skipped():
    guard = SkipStep(None)
    assert not any(_run(guard, [3.0] * MIN_STEPS + [1e6], [1.0] * MIN_STEPS + [1e6]))
    assert _run(guard, [torch.inf], [1.0]) == [True]


def test_its_memory_is_in_the_checkpoint():
    guard = SkipStep(6.0)
    _run(guard, [3.0] * MIN_STEPS, [1.0] * MIN_STEPS)
    restored = SkipStep(6.0)
    assert _run(restored, [9.0], [1.0]) == [False]
    restored.load_state_dict(guard.state_dict())
    assert _run(restored, [9.0], [1.0]) == [True]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "lion_8bit", "muon"])
def test_a_skipped_step_leaves_weights_and_state_bit_for_bit(name, weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(weights)
    other = copy.deepcopy(model)
    optimizers = [
        build_optimizer(one, OptimizerConfig(name=name, lr=1e-2)) for one in (model, other)
    ]
    steps = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(1)).to(weights)
    for number, batch in enumerate(steps):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            if number == 2:  # the first model skips a step, the other never sees it
                if one is other:
                    continue
                before = _tensors(one, optimizer)
            one(batch).square().sum().backward()
            if number == 2:
                for parameter in one.parameters():
                    parameter.grad.fill_(torch.nan)
            optimizer.found_inf = torch.tensor(float(number == 2))
            optimizer.step()
            optimizer.zero_grad()
            if number == 2:
                after = _tensors(one, optimizer)
                assert all(
                    torch.equal(left, right) for left, right in zip(before, after, strict=True)
                )
    assert len(before) > 4
    for left, right in zip(
        _tensors(model, optimizers[0]), _tensors(other, optimizers[1]), strict=True
    ):
        assert torch.equal(left, right)  # also the noise of rounding, which counts the steps taken


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [value for values in optimizer.state.values() for value in values.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *state]]


def test_a_run_skips_what_is_not_finite_and_gives_up_in_the_end(
    stores, make_config, tmp_path, monkeypatch
):
    from ipt.training import module

    broken: list[int] = []
    original = module.CausalLMLoss.forward

    def forward(self, batch, scale, mask):
        if not self.model.training:  # the checks before the first step
            return original(self, batch, scale, mask)
        broken.append(len(broken) + 1)
        loss, losses = original(self, batch, scale, mask)
        return (loss * torch.nan if len(broken) in (3, 4) else loss), losses

    monkeypatch.setattr(module.CausalLMLoss, "forward", forward)
    train(make_config(), stores, tmp_path / "run")
    steps = read_metrics(tmp_path / "run")
    assert [step["skipped"] for step in steps] == [0, 0, 1, 2, 2, 2]
    assert steps[-1]["loss"] < steps[0]["loss"]
    monkeypatch.setattr(module, "MAX_SKIPPED", 2)
    broken.clear()
    with pytest.raises(ValueError, match="2 steps in a row were skipped"):
        train(make_config(), stores, tmp_path / "given-up")
