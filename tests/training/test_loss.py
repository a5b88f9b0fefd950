import pytest
import torch
from torch.nn.functional import cross_entropy

from ipt.training.loss import chunked_cross_entropy


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
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(1000, 32, generator=generator)
    labels = torch.randint(0, 1000, (64,), generator=generator)
    rounded = hidden.bfloat16(), weight.bfloat16()
    exact = cross_entropy(rounded[0].double() @ rounded[1].double().T, labels)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = chunked_cross_entropy(*rounded, labels, scale=1 / 64, chunk=16)
        assert abs(loss.item() - exact.item()) < 1e-4  # torch's own bf16 product is off by 4e-3 here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_large_logits_against_fp64(dtype):
    """Logits of up to a few hundred: nothing overflows, and rounding to the operands' type is all that is lost."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = 10 * torch.randn(40, 32, generator=generator), torch.randn(500, 32, generator=generator)
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
