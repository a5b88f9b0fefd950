import pytest
import torch
from torch.nn.functional import cross_entropy

from ipt.training.loss import LogitTransform, chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_value_and_gradients_equal_the_plain_loss(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (23,), generator=generator)
    loss, losses = chunked_cross_entropy(hidden, weight, labels, scale=0.3, chunk=chunk)
    (2 * loss).backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain = cross_entropy(hidden @ weight.T, labels, reduction="none")
    (2 * 0.3 * plain.sum()).backward()
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(loss, 0.3 * plain.sum())
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad))


def test_bf16_inputs_give_the_fp32_loss():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(64, 32, generator=generator),
        torch.randn(1000, 32, generator=generator),
    )
    labels = torch.randint(0, 1000, (64,), generator=generator)
    rounded = hidden.bfloat16(), weight.bfloat16()
    exact = cross_entropy(rounded[0].double() @ rounded[1].double().T, labels)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = chunked_cross_entropy(*rounded, labels, scale=1 / 64, chunk=16)
        # torch's own bf16 product is off by 4e-3 here
        assert abs(loss.item() - exact.item()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_large_logits_against_fp64(dtype):
    """Logits of up to a few hundred: nothing overflows, and rounding to the operands' type is all
    that is lost.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        10 * torch.randn(40, 32, generator=generator),
        torch.randn(500, 32, generator=generator),
    )
    labels = torch.randint(0, 500, (40,), generator=generator)
    operands = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    expected = cross_entropy(exact[0] @ exact[1].T, labels)
    expected.backward()
    assert expected > 20
    loss, _ = chunked_cross_entropy(*operands, labels, scale=1 / 40, chunk=7)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for operand, other in zip(operands, exact, strict=True):
        assert operand.grad.dtype == dtype
        error = (operand.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


def test_no_targets_and_frozen_weights():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    loss, losses = chunked_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert loss == 0
    assert len(losses) == 0
    loss, _ = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    loss.backward()
    assert hidden.grad is not None


TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=3.0, softcap=5.0),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_what_a_model_does_to_its_logits_against_the_plain_computation_in_fp64(transform, has_bias):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = [random(23, 8), random(50, 8), random(50) if has_bias else None]
    labels = torch.randint(0, 50, (23,), generator=generator)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        operands = [None if value is None else value.to(dtype).requires_grad_() for value in exact]
        inputs = [value for value in operands if value is not None]
        hidden, weight, bias = operands
        loss, losses = chunked_cross_entropy(
            hidden, weight, labels, 0.7, 7, bias_V=bias, transform=transform
        )
        found = torch.autograd.grad(2 * loss, inputs)
        plain = [None if value is None else value.requires_grad_() for value in exact]
        logits = plain[0] @ plain[1].T + (0 if bias is None else plain[2])
        expected = cross_entropy(transform(logits), labels, reduction="none")
        gradients = torch.autograd.grad(
            2 * 0.7 * expected.sum(), [value for value in plain if value is not None]
        )
        torch.testing.assert_close(
            losses.double(), expected.detach(), rtol=tolerance, atol=tolerance
        )
        for ours, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(
                ours.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item()
            )
