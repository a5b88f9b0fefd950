"""Projection to the vocabulary and cross-entropy as one chunked operation, so that full logits never exist."""

from typing import Any

import torch
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there, so nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        losses_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, len(labels_T), chunk):
            rows = slice(start, start + chunk)
            hidden_CD, labels_C = hidden_TD[rows], labels_T[rows]
            logits_CV = _matmul_fp32(hidden_CD, weight_VD.t())
            log_normaliser_C = logits_CV.logsumexp(-1)
            losses_T[rows] = log_normaliser_C - logits_CV.gather(1, labels_C[:, None]).squeeze(1)
            if not (needs_hidden or needs_weight):
                continue
            grad_logits_CV = logits_CV.sub_(log_normaliser_C[:, None]).exp_()
            grad_logits_CV.scatter_add_(1, labels_C[:, None], torch.full_like(labels_C, -1, dtype=torch.float32)[:, None])
            grad_logits_CV = grad_logits_CV.mul_(scale).to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad_logits_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += _matmul_fp32(grad_logits_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * scale, losses_T

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_TD is None else grad_hidden_TD * grad_loss,
            None if grad_weight_VD is None else grad_weight_VD * grad_loss,
            None,
            None,
            None,
        )


def _matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product accumulated and returned in fp32, whatever the operands' type."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `labels`, `chunk` rows at a time, in fp32.

    Returns the differentiable scalar `scale * sum(losses)` and the losses [T] in nats, without gradient. Every row is a
    target: select rows before the call.
    """
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, scale, chunk)
