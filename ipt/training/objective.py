"""The training objective of a causal language model: what it does to its logits, its load
balancing, its loss.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipt.mixture.batches import IGNORE, PADDING
from ipt.training.attention import bounds, takes_bounds
from ipt.training.loss import LogitTransform, chunked_cross_entropy
from ipt.training.model import base_model, decoder_of

# Names that the configs of transformers use. Where a model uses one of them in another way, the
# check before a training (ipt.training.probe) finds that our loss is not the model's own.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # its logits_scaling is a factor, Granite's a divisor


def logit_transform(architecture: Any) -> LogitTransform:
    """What a model with the transformers config `architecture` does to the logits of its
    projection.
    """
    config = architecture.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        factor = _number(config, name) or 1.0
        scale = scale * factor if config.model_type in MULTIPLIES_BY_DIVISOR else scale / factor
    caps = [cap for cap in (_number(config, name) for name in SOFTCAPS) if cap]
    return LogitTransform(scale, caps[0] if caps else None)


class LoadBalancing(NamedTuple):
    """The load-balancing loss of a mixture of experts, as the model's own class computes it."""

    # of router logits [tokens, experts] of each layer, number of experts, top k, mask [tokens]
    function: Any
    experts: int
    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """The loss before its coefficient; `mask` is 0 for padding."""
        loss: Tensor = self.function(router_logits, self.experts, self.top_k, mask)
        return loss


def load_balancing(model: Any) -> LoadBalancing | None:
    """The load-balancing loss that `model` adds to its own loss; None if it adds none.

    As in transformers, a model adds it only where its config has `output_router_logits: true`.
    """
    if not getattr(model.config, "output_router_logits", False):
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if function is None:
        return None
    name = "router_aux_loss_coef" if hasattr(model, "router_aux_loss_coef") else "aux_loss_coef"
    coefficient = float(getattr(model, name, 0.0))
    return LoadBalancing(function, model.num_experts, model.num_experts_per_tok, coefficient)


def lacks_load_balancing(model: Any) -> bool:
    """Whether a mixture of experts has a load-balancing loss that its config leaves switched off."""
    has_loss = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    return has_loss and not getattr(model.config, "output_router_logits", False)


class CausalLMLoss(nn.Module):
    """Model and loss in one module, so that under FSDP2 one forward pass gathers the projection's
    weight too.
    """

    aux_loss: Tensor | None  # load-balancing loss of the last batch before its coefficient

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        base = base_model(model)
        self.model, self.chunk = model, chunk
        self.transform = logit_transform(base.config)
        self.load_balancing = load_balancing(base)
        self.aux_loss = None

    def forward(
        self, batch: dict[str, Any], scale: float, document_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy `scale * sum` and the loss of each target token, in the order of the batch.

        The batch is one of ipt.mixture.batches; tensors [B, T]. For a mixture of experts that
        balances its load, `aux_loss` then holds that loss of this batch, a scalar with gradient.
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
        """The model's own mean loss of a batch of one document, and its load-balancing loss, 0
        without one.
        """
        outputs = base_model(self.model)(**self._inputs(batch), labels=batch["input_ids"])
        aux_loss = getattr(outputs, "aux_loss", None)
        return outputs.loss, torch.zeros(()) if aux_loss is None else aux_loss

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the Hugging Face model."""
        implementation = base_model(self.model).config._attn_implementation
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        options: dict[str, Any] = {"use_cache": False}
        if takes_bounds(implementation):  # one row: where rows meet, documents do too
            inputs = {name: value.flatten()[None] for name, value in inputs.items()}
            options |= bounds(batch, implementation)
        if self.load_balancing is not None:
            options["output_router_logits"] = True
        return inputs | options


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `target_positions` in the flattened batch, `target_labels` and
    `target_sources` [targets].
    """
    if "target_positions" in batch:
        return batch
    labels = batch["labels"].flatten()
    positions = (labels != IGNORE).nonzero().flatten()
    sources = batch["source_ids"].flatten()[positions]
    return {
        **batch,
        "target_positions": positions,
        "target_labels": labels[positions],
        "target_sources": sources,
    }


def _without_documents(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with each sequence as one document."""
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    return {
        **batch,
        "position_ids": torch.arange(length, device=device).expand(rows, length),
        "cu_seq_lens": torch.arange(
            0, (rows + 1) * length, length, dtype=torch.int32, device=device
        ),
        "document_sizes": [length] * rows,
        "max_length": length,
    }


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
