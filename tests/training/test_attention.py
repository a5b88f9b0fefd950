"""Every way to compute attention against transformers' sdpa with a block mask; and that a wish is
met or refused.
"""

import copy

import pytest
import torch

from ipt.config import TrainerConfig
from ipt.errors import UserError
from ipt.models import load_model, resolve_model
from ipt.training import attention
from ipt.training.attention import implementation, resolve_attention
from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model
from tests.training.ranks import batch_of, config_of

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch's and flash-attn's kernels need a GPU"
)


def _batch() -> dict:
    """One row of two documents, as ipt.mixture.batches describes it."""
    batch = batch_of(0)
    sizes = batch["document_sizes"]
    assert len(sizes) == 2
    return {
        **batch,
        "cu_seq_lens": torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32),
        "max_length": max(sizes),
    }


def _losses_and_gradients(model, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss, losses = CausalLMLoss(model, 1000)(batch, 1.0, True)
    loss.backward()
    return losses, [parameter.grad for parameter in model.parameters()]


def _with(model, name: str):
    model = copy.deepcopy(model)
    model.config._attn_implementation = implementation(name)
    return model.train()


def _varlen_by_hand(
    query_THD,
    key_THD,
    value_THD,
    starts,
    starts_k,
    longest,
    longest_k,
    *,
    scale,
    window_size,
    enable_gqa,
):
    """What torch's kernel computes, by its documentation: each document alone, from the left edge
    of the window to the token itself.
    """
    assert starts is starts_k
    assert longest == longest_k == int(starts.diff().max())
    assert window_size[1] == 0
    groups = query_THD.shape[1] // key_THD.shape[1]
    assert enable_gqa == (groups > 1)
    outputs = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        query, key, value = (
            tensor[start:end].transpose(0, 1) for tensor in (query_THD, key_THD, value_THD)
        )
        scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((weights @ value.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["packed", "varlen"])
@pytest.mark.parametrize("model", ["embedded:tiny", "embedded:tiny-synthesizer"])
def test_values_and_gradients_are_those_of_the_masked_sdpa(name, model, monkeypatch):
    """The second model has a window of 16 tokens, and the documents are longer."""
    # the kernel itself needs a GPU: below
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_by_hand)
    plain = load_model(resolve_model(model), torch.float32, attn_implementation="sdpa")
    assert (getattr(plain.config, "sliding_window", None) == 16) == ("synthesizer" in model)
    expected = _losses_and_gradients(_with(plain, "sdpa"), _batch())
    losses, gradients = _losses_and_gradients(_with(plain, name), _batch())
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize(
    "name", ["varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
)
def test_kernels_on_a_gpu_are_the_masked_sdpa(name, tiny_model):
    config = config_of(
        tiny_model, accelerator="gpu", precision="bf16-true", attn_implementation=name
    )
    try:
        resolve_attention(config.trainer)
    except ValueError as error:
        pytest.skip(str(error))
    plain = build_model(config, "sdpa").cuda()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in _batch().items()
    }
    expected, losses = (
        _losses_and_gradients(_with(plain, chosen), batch)[0] for chosen in ("sdpa", name)
    )
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)


def test_a_cpu_takes_packed_and_refuses_kernels_by_name(monkeypatch):
    assert resolve_attention(TrainerConfig(accelerator="cpu")) == "packed"
    assert resolve_attention(TrainerConfig(accelerator="cpu", attn_implementation="sdpa")) == "sdpa"
    assert resolve_attention(TrainerConfig(accelerator="cpu", compile=True)) == "sdpa"
    with pytest.raises(
        ValueError,
        match=r"attn_implementation=packed: compiled blocks would be recompiled for each batch",
    ):
        resolve_attention(
            TrainerConfig(accelerator="cpu", compile=True, attn_implementation="packed")
        )
    for name in ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
        with pytest.raises(
            ValueError,
            match=f"trainer.attn_implementation={name}: it needs an NVIDIA GPU.*use packed",
        ):
            resolve_attention(TrainerConfig(accelerator="cpu", attn_implementation=name))


def _pretend_a_gpu(monkeypatch, capability: tuple[int, int], packages: set[str]) -> None:
    """A machine that this one is not: what the CUDA runtime and the installed packages say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        attention,
        "_missing_package",
        lambda name, package: None if package.distribution in packages else "not installed",
    )


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        ((9, 0), {"flash-attn-3", "flash-attn-4"}, "flash_attention_3"),
        ((9, 0), {"flash-attn-4", "flash-attn"}, "flash_attention_4"),
        ((10, 0), {"flash-attn-3", "flash-attn-4"}, "flash_attention_4"),
        ((9, 0), set(), "varlen"),
        ((8, 0), {"flash-attn-4"}, "varlen"),
        ((7, 5), {"flash-attn"}, "packed"),
    ],
)
def test_auto_takes_the_best_that_is_there(monkeypatch, capability, packages, expected):
    _pretend_a_gpu(monkeypatch, capability, packages)
    assert resolve_attention(TrainerConfig(precision="bf16-mixed")) == expected
    assert resolve_attention(TrainerConfig(precision="32-true")) == "packed"


def test_a_wish_that_cannot_be_met_says_what_is_missing(monkeypatch):
    with monkeypatch.context() as patched:
        _pretend_a_gpu(patched, (10, 0), {"flash-attn-3"})
        with pytest.raises(
            ValueError,
            match=r"flash_attention_3: it needs compute capability 8.0 to 9.x, and a GPU has 10.0",
        ):
            resolve_attention(
                TrainerConfig(precision="bf16-mixed", attn_implementation="flash_attention_3")
            )
        with pytest.raises(
            ValueError,
            match=r"varlen: its kernel computes in bf16 only; set trainer.precision=bf16-mixed",
        ):
            resolve_attention(TrainerConfig(precision="32-true", attn_implementation="varlen"))
    missing = attention._missing_package("flash_attention_3", attention.FLASH["flash_attention_3"])
    assert missing == (
        "the package flash-attn-3 is not installed: build it from the folder hopper/ of the "
        "flash-attention repository; "
        "or use varlen, which needs no package"
    )


def _attention_by_hand(query, key, value, scaling, softcap, sinks, window):
    """Causal attention [1, heads, T, head_dim] with all features, in the order of Gemma-2 and
    gpt-oss.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distances = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((distances < 0) | (distances >= (window or length)), -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return (weights / total) @ value


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_computes_soft_caps_sinks_and_windows(softcap, has_sinks, window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 11, 8, generator=generator, requires_grad=True)
    key, value = (
        torch.randn(1, 2, 11, 8, generator=generator, requires_grad=True) for _ in range(2)
    )
    sinks = torch.randn(4, generator=generator, requires_grad=True) if has_sinks else None
    inputs = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
    sizes = [7, 4]
    options = {
        "scaling": 0.9,
        "softcap": softcap,
        "s_aux": sinks,
        "sliding_window": window,
        "document_sizes": sizes,
    }
    output, _ = attention.packed_attention(torch.nn.Module(), query, key, value, None, **options)
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    expected = torch.cat(
        [_attention_by_hand(*part, 0.9, softcap, sinks, window) for part in parts], 2
    ).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(output.shape, generator=generator)
    found = torch.autograd.grad((output * weights).sum(), inputs)
    torch.testing.assert_close(
        found, torch.autograd.grad((expected * weights).sum(), inputs), rtol=1e-4, atol=1e-5
    )


def test_a_feature_that_a_kernel_ignores_is_an_error(monkeypatch):
    query = torch.randn(1, 2, 8, 4)
    for options, feature in (
        ({"softcap": 30.0}, "soft-capped"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
    ):
        with pytest.raises(
            UserError,
            match=(
                f"trainer.attn_implementation=varlen: varlen ignores the .*{feature}.*; use packed"
            ),
        ):
            attention.varlen_attention(torch.nn.Module(), query, query, query, None, **options)
    _pretend_a_gpu(monkeypatch, (9, 0), {"flash-attn-3", "flash-attn-4"})
    names = {
        feature: attention.candidates(TrainerConfig(precision="bf16-mixed"), [feature])
        for feature in attention.FEATURES
    }
    assert names["softcap"][0] == "flash_attention_3"
    assert names["s_aux"][0] == "flash_attention_4"
    assert names["dropout"][0] == "packed"
    with pytest.raises(
        UserError, match="flash_attention_3 ignores the attention dropout of this model"
    ):
        attention.candidates(
            TrainerConfig(precision="bf16-mixed", attn_implementation="flash_attention_3"),
            ["dropout"],
        )
