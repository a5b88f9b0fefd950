"""Projection to the vocabulary and cross-entropy as one chunked operation, so that full logits never exist."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there, so nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        operand_VD = weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD  # a CPU multiplies in fp32: convert once
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        losses_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, len(labels_T), chunk):
            rows = slice(start, start + chunk)
            hidden_CD, labels_C1 = hidden_TD[rows].to(operand_VD.dtype), labels_T[rows, None]
            logits_CV = _matmul_fp32(hidden_CD, operand_VD.t())
            losses_T[rows], probabilities_CV = _losses_and_probabilities(logits_CV, labels_C1)
            if not (needs_hidden or needs_weight):
                continue
            grad_CV = probabilities_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=torch.float32))
            grad_CV = grad_CV.mul_(scale).to(operand_VD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad_CV @ operand_VD
            if grad_weight_VD is not None:
                _add_matmul(grad_weight_VD, grad_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * scale, losses_T

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]  # in place: a weight's is large
        return grads[0], grads[1], None, None, None


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `labels`, `chunk` rows at a time, in fp32.

    Returns the differentiable scalar `scale * sum(losses)` and the losses [T] in nats, without gradient. Every row is a
    target: select rows before the call.
    """
    device = hidden_TD.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device of a dry run has none
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():  # it would take the products below to bf16
        return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, scale, chunk)


def _losses_and_probabilities(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the logits' memory for the probabilities."""
    largest_C1 = logits_CV.amax(1, keepdim=True)
    of_label_C1 = logits_CV.gather(1, labels_C1) - largest_C1
    exponentials_CV = logits_CV.sub_(largest_C1).exp_()
    total_C1 = exponentials_CV.sum(1, keepdim=True)
    return (total_C1.log() - of_label_C1).squeeze(1), exponentials_CV.div_(total_C1)


def _matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product accumulated and returned in fp32, whatever the operands' type."""
    return left @ right if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += _matmul_fp32(left, right)
