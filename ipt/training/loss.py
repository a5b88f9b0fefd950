"""The training objective of a causal language model.

`CausalLMLoss` runs the model on a packed batch and computes the cross-entropy of its target tokens.
The projection to the vocabulary and the cross-entropy are one chunked operation
(`chunked_cross_entropy`), so the full logits never exist. What a model does to its logits (scale,
soft-cap, bias) and the load-balancing loss of a mixture of experts are included.

Suffixes of tensor names are their dimensions: T tokens, C tokens of a chunk, D hidden size,
V vocabulary.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipt.mixture.batches import IGNORE, PADDING
from ipt.training.attention import cu_seqlens_kwargs, takes_cu_seqlens
from ipt.training.model import base_model, decoder_of

# Attributes of transformers configs. If a model uses one of them in another way, the check before
# training (ipt.training.probe) finds that our loss differs from the model's own.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # its logits_scaling is a factor, Granite's a divisor


class CausalLMLoss(nn.Module):
    """Model and loss in one module, so that one forward pass under FSDP2 also gathers the weight of
    the projection.
    """

    aux_loss: Tensor | None  # load-balancing loss of the last batch, without its coefficient

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        base = base_model(model)
        self.model = model
        self.chunk = chunk
        self.transform = logit_transform(base.config)
        self.load_balancing = load_balancing(base)
        self.aux_loss = None

    def forward(
        self, batch: dict[str, Any], scale: float, document_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns `scale` times the summed cross-entropy, and the loss of each target token [T] in
        the order of the batch, without gradient.

        The batch is one of ipt.mixture.batches with tensors [rows, seq_len]. Sets `aux_loss` to a
        scalar with gradient if the model has a load-balancing loss.
        """
        base = base_model(self.model)
        projection = base.get_output_embeddings()
        batch = with_targets(batch if document_mask else _without_documents(batch))
        outputs = decoder_of(base)(**self._inputs(batch))
        if self.load_balancing is not None:
            is_token = (batch["source_ids"] != PADDING).flatten()
            self.aux_loss = self.load_balancing(outputs.router_logits, is_token)
        hidden_TD = outputs.last_hidden_state.flatten(0, 1)
        return chunked_cross_entropy(
            hidden_TD.index_select(0, batch["target_positions"]),
            projection.weight,
            batch["target_labels"],
            scale,
            self.chunk,
            bias_V=getattr(projection, "bias", None),
            transform=self.transform,
        )

    def own_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss that the model itself computes for a batch of one document, and its
        load-balancing loss (0 if it has none).
        """
        outputs = base_model(self.model)(**self._inputs(batch), labels=batch["input_ids"])
        aux_loss = getattr(outputs, "aux_loss", None)
        return outputs.loss, torch.zeros(()) if aux_loss is None else aux_loss

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the Hugging Face model."""
        implementation = base_model(self.model).config._attn_implementation
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        options: dict[str, Any] = {"use_cache": False}
        if takes_cu_seqlens(implementation):  # all rows as one: each begins with a new document
            inputs = {name: value.flatten()[None] for name, value in inputs.items()}
            options |= cu_seqlens_kwargs(batch, implementation)
        if self.load_balancing is not None:
            options["output_router_logits"] = True
        return inputs | options


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `target_positions` in the flattened batch, `target_labels` and
    `target_sources` [T].
    """
    if "target_positions" in batch:
        return batch
    labels = batch["labels"].flatten()
    positions = (labels != IGNORE).nonzero().flatten()
    return {
        **batch,
        "target_positions": positions,
        "target_labels": labels[positions],
        "target_sources": batch["source_ids"].flatten()[positions],
    }


def _without_documents(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with each sequence as one document."""
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    starts = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    return {
        **batch,
        "position_ids": torch.arange(length, device=device).expand(rows, length),
        "cu_seq_lens": starts,
        "document_sizes": [length] * rows,
        "max_length": length,
    }


# What models do to their logits
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitTransform:
    """y = scale * z, then softcap * tanh(y / softcap), for the logits z of the projection.

    Granite divides its logits and Cohere multiplies them; Gemma 2 and later models cap them.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits as a new, differentiable tensor."""
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


def logit_transform(architecture: Any) -> LogitTransform:
    """The logit transform of a model with the transformers config `architecture`."""
    config = architecture.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        factor = _number(config, name) or 1.0
        scale = scale * factor if config.model_type in MULTIPLIES_BY_DIVISOR else scale / factor
    softcap = None
    for name in SOFTCAPS:
        softcap = softcap or _number(config, name) or None
    return LogitTransform(scale, softcap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# Mixtures of experts
# ----------------------------------------------------------------------------------------------


class LoadBalancing(NamedTuple):
    """The load-balancing loss of a mixture of experts, computed by the function of the model's own
    module in transformers.
    """

    function: Any
    experts: int
    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """The loss without its coefficient, from router logits [tokens, experts] of each layer;
        `mask` [tokens] is 0 for padding.
        """
        loss: Tensor = self.function(router_logits, self.experts, self.top_k, mask)
        return loss


def load_balancing(model: Any) -> LoadBalancing | None:
    """The load-balancing loss of a model whose config has `output_router_logits: true`, as in
    transformers; else None.
    """
    function = _load_balancing_function(model)
    if function is None or not getattr(model.config, "output_router_logits", False):
        return None
    name = "router_aux_loss_coef" if hasattr(model, "router_aux_loss_coef") else "aux_loss_coef"
    coefficient = float(getattr(model, name, 0.0))
    return LoadBalancing(function, model.num_experts, model.num_experts_per_tok, coefficient)


def lacks_load_balancing(model: Any) -> bool:
    """Whether a mixture of experts has a load-balancing loss that its config does not enable."""
    is_on = getattr(model.config, "output_router_logits", False)
    return _load_balancing_function(model) is not None and not is_on


def _load_balancing_function(model: Any) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


# Projection and cross-entropy in chunks
# ----------------------------------------------------------------------------------------------


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
    """Cross-entropy of `transform(hidden @ weight.T + bias)` and `labels`, `chunk` rows at a time,
    in fp32 (fp64 for fp64 weights).

    Returns the differentiable scalar `scale * sum(losses)` and the losses [T] in nats, without
    gradient. Every row is a target: select rows before the call.
    """
    device = hidden_TD.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # not on the meta device of a dry run
    # Autocast would compute the products below in bf16.
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        return _ChunkedCrossEntropy.apply(
            hidden_TD, weight_VD, bias_V, labels_T, transform, scale, chunk
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist."""

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
        # On CPUs the products are computed in fp32: convert the weight once.
        operand_VD = weight_VD.to(dtype) if weight_VD.device.type == "cpu" else weight_VD
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_bias_V = None
        if bias_V is not None and needs_bias:
            grad_bias_V = torch.zeros_like(bias_V, dtype=dtype)
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
            minus_one_C1 = torch.full_like(labels_C1, -1, dtype=dtype)
            grad_CV = probabilities_CV.scatter_add_(1, labels_C1, minus_one_C1)
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
        # In place, since the gradient of the weight is large.
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def _losses_and_probabilities(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [C] and probabilities [C, V]; the probabilities overwrite the logits."""
    largest_C1 = logits_CV.amax(1, keepdim=True)
    of_label_C1 = logits_CV.gather(1, labels_C1) - largest_C1
    exponentials_CV = logits_CV.sub_(largest_C1).exp_()
    total_C1 = exponentials_CV.sum(1, keepdim=True)
    return (total_C1.log() - of_label_C1).squeeze(1), exponentials_CV.div_(total_C1)


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product that is accumulated and returned in `dtype`, for operands of any dtype."""
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _matmul(left, right, total.dtype)
