"""Projection to the vocabulary and cross-entropy as one chunked operation, so that full logits
never exist.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits z of its projection: y = scale * z, then softcap * tanh(y /
    softcap).

    Granite divides its logits and Cohere multiplies them; Gemma-2 and later models cap them.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits as a new tensor, differentiable: the plain computation."""
        logits = logits * self.scale
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def apply_(self, logits: Tensor) -> Tensor | float:
        """Transform `logits` in place and return the derivative at each of them."""
        if self.softcap is None:
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return self.scale
        tanh = logits.mul_(self.scale / self.softcap).tanh_()
        slope = tanh.square().neg_().add_(1).mul_(self.scale)
        tanh.mul_(self.softcap)
        return slope


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist, so nothing is
    computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        transform: LogitTransform,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        # A CPU multiplies in fp32: convert once.
        operand_VD = weight_VD.to(dtype) if weight_VD.device.type == "cpu" else weight_VD
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_bias_V = (
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needs_bias else None
        )
        losses_T = torch.empty(len(labels_T), dtype=dtype, device=hidden_TD.device)
        for start in range(0, len(labels_T), chunk):
            rows = slice(start, start + chunk)
            hidden_CD = hidden_TD[rows].to(operand_VD.dtype)
            labels_C1 = labels_T[rows, None]
            logits_CV = _matmul(hidden_CD, operand_VD.t(), dtype)
            if bias_V is not None:
                logits_CV += bias_V.to(dtype)
            slope = transform.apply_(logits_CV)
            losses_T[rows], probabilities_CV = _losses_and_probabilities(logits_CV, labels_C1)
            if not any((needs_hidden, needs_weight, needs_bias)):
                continue
            grad_CV = probabilities_CV.scatter_add_(
                1, labels_C1, torch.full_like(labels_C1, -1, dtype=dtype)
            )
            grad_CV = grad_CV.mul_(slope).mul_(scale)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(operand_VD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad_CV @ operand_VD
            if grad_weight_VD is not None:
                _add_matmul(grad_weight_VD, grad_CV.t(), hidden_CD)
        ctx.save_for_backward(
            grad_hidden_TD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * scale, losses_T

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradient of a weight is large.
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def chunked_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    scale: float = 1.0,
    chunk: int = 1024,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `transform(hidden @ weight.T + bias)` against `labels`, `chunk` rows at a
    time, in fp32.

    Returns the differentiable scalar `scale * sum(losses)` and the losses [T] in nats, without
    gradient. Every row is a target: select rows before the call. Weights in fp64 are computed in
    fp64.
    """
    device = hidden_TD.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device of a dry run has none
    # Autocast would compute the products below in bf16.
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        return _ChunkedCrossEntropy.apply(
            hidden_TD, weight_VD, bias_V, labels_T, transform, scale, chunk
        )


def _losses_and_probabilities(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the logits' memory for the probabilities."""
    largest_C1 = logits_CV.amax(1, keepdim=True)
    of_label_C1 = logits_CV.gather(1, labels_C1) - largest_C1
    exponentials_CV = logits_CV.sub_(largest_C1).exp_()
    total_C1 = exponentials_CV.sum(1, keepdim=True)
    return (total_C1.log() - of_label_C1).squeeze(1), exponentials_CV.div_(total_C1)


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product accumulated and returned in `dtype`, whatever the type of the operands."""
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _matmul(left, right, total.dtype)
