"""The LightningModule around any Hugging Face causal language model."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ipt.config import Config
from ipt.console import console
from ipt.mixture.batches import IGNORE
from ipt.training.attention import bounds, resolve_attention, takes_bounds
from ipt.training.build import base_model, build_model, empty_model, transformer_blocks
from ipt.training.guard import StepGuard
from ipt.training.loading import can_be_filled, fill, stored_weights
from ipt.training.loss import chunked_cross_entropy
from ipt.training.optimization import build_optimizer, learning_rate_factor, warmup_steps
from ipt.training.parallelize import parallelize, set_gradient_sync

__all__ = ["CausalLMLoss", "PretrainingModule", "build_model", "transformer_blocks"]

MOST_SKIPPED = 50  # steps in a row that are skipped before a run is given up


class CausalLMLoss(nn.Module):
    """Model and loss in one module, so that under FSDP2 one forward pass gathers the projection's weight too."""

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: dict[str, Any], scale: float, document_mask: bool) -> tuple[Tensor, Tensor]:
        """Loss `scale * sum` and the loss of each target token, in the order of the batch (ipt.mixture.batches; tensors [B, T])."""
        base = base_model(self.model)
        decoder, projection = base.get_decoder(), base.get_output_embeddings()
        batch = with_targets(batch if document_mask else _without_documents(batch))
        input_ids, position_ids = batch["input_ids"], batch["position_ids"]
        options: dict[str, Any] = {}
        if takes_bounds(base.config._attn_implementation):  # one row: where rows meet, documents do too
            input_ids, position_ids = input_ids.flatten()[None], position_ids.flatten()[None]
            options = bounds(batch, base.config._attn_implementation)
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options).last_hidden_state
        targets = hidden.flatten(0, 1).index_select(0, batch["target_positions"])
        return chunked_cross_entropy(targets, projection.weight, batch["target_labels"], scale, self.chunk)


class PretrainingModule(L.LightningModule):
    """Next-token training on packed batches (ipt.mixture.batches).

    The loss of an optimizer step is the sum over its target tokens divided by their global number, whatever the
    accumulation and the number of ranks. From the batch to the update nothing waits for the device; `finish_step` does, once a step.
    """

    _sums: Tensor
    _totals: Tensor
    _grad_norm: Tensor

    def __init__(self, config: Config, sources: list[str]) -> None:
        super().__init__()
        self.config, self.sources = config, sources
        self.attention = ""  # what runs, once the model is built
        self.loss: CausalLMLoss | None = None
        self.guard = StepGuard(config.trainer.skip_spikes)
        # Loss and target tokens of each source: of this process until now, and of all in the last step.
        for name in ("_sums", "_totals"):
            self.register_buffer(name, torch.zeros(2, len(sources), dtype=torch.float64), persistent=False)
        self.register_buffer("_grad_norm", torch.zeros(()), persistent=False)

    def configure_model(self) -> None:
        if self.loss is not None:
            return
        trainer, mesh = self.config.trainer, self.device_mesh
        self.attention = resolve_attention(trainer)
        rank_zero_only(console.print)(f"attention: {self.attention}")
        stored = stored_weights(self.config.model) if mesh is not None and _can_be_cut(self.config) else {}
        model = empty_model(self.config, self.attention) if stored else None
        if model is None or not can_be_filled(model, stored):
            model, stored = build_model(self.config, self.attention), {}
        self.loss = CausalLMLoss(model, trainer.loss_chunk)
        parallelize(self.loss, transformer_blocks(model), mesh["data_parallel"] if mesh is not None else None, trainer)
        if stored:
            fill(model, stored, self.device, self.config.seed)

    @property
    def model(self) -> Any:
        assert self.loss is not None
        return self.loss.model

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Which positions are targets is found out on the host, so that no device is asked how many there are."""
        batch = with_targets(batch)
        if torch.cuda.is_available():
            return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return batch

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        assert self.loss is not None
        accumulate = self.trainer.accumulate_grad_batches
        set_gradient_sync(self.loss, (batch_index + 1) % accumulate == 0, self.config.trainer)
        # Lightning divides by the accumulation and FSDP2 averages over ranks: both are undone, the divisor is global.
        scale = accumulate * self.trainer.world_size / max(1, batch["step_targets"])
        loss, losses = self.loss(batch, scale, self.config.mixture.document_mask)
        is_of_source = batch["target_sources"] == torch.arange(len(self.sources), device=losses.device)[:, None]
        self._sums += torch.stack([(is_of_source * losses.double()).sum(1), is_of_source.sum(1)])
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Clip, and tell the optimizer whether to take the step."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.trainer.gradient_clip)
        self._grad_norm.copy_(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self._totals.copy_(self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum"))
        self._sums.zero_()
        optimizer.found_inf = self.guard(self._totals[0].sum() / self._totals[1].sum().clamp_min(1), self._grad_norm)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.config.optimizer, self.config.seed)
        steps, schedule, warmup = self.config.trainer.max_steps, self.config.schedule, warmup_steps(self.config)
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, schedule, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def finish_step(self) -> dict[str, float]:
        """Figures of the optimizer step that just ended, over all ranks: loss and target tokens, in all and by source; skipped steps.

        Raises ValueError if so many steps in a row were skipped that the run has come to nothing.
        """
        counts = torch.stack([self._grad_norm, self.guard.skipped, self.guard.in_a_row]).double()
        values = torch.cat([self._totals.flatten(), counts]).tolist()  # the one time that the host waits for the device
        losses, tokens = values[: len(self.sources)], values[len(self.sources) : -3]
        grad_norm, skipped, in_a_row = values[-3:]
        if in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"{int(in_a_row)} steps in a row were skipped: loss or gradients are not finite; lower optimizer.lr, or look at the data"
            )
        figures = {"loss": sum(losses) / max(1.0, sum(tokens)), "grad_norm": grad_norm, "skipped": int(skipped)}
        for name, loss, count in zip(self.sources, losses, tokens, strict=True):
            figures[f"tokens/{name}"] = int(count)
            if count:
                figures[f"loss/{name}"] = loss / count
        return figures


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `target_positions` in the flattened batch, `target_labels` and `target_sources` [targets]."""
    if "target_positions" in batch:
        return batch
    labels = batch["labels"].flatten()
    positions = (labels != IGNORE).nonzero().flatten()
    sources = batch["source_ids"].flatten()[positions]
    return {**batch, "target_positions": positions, "target_labels": labels[positions], "target_sources": sources}


def _can_be_cut(config: Config) -> bool:
    """Whether processes may read slices: not of random weights, and quantised ones stay whole."""
    return not config.architecture and not config.lora.quantize


def _without_documents(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with each sequence as one document."""
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    return {
        **batch,
        "position_ids": torch.arange(length, device=device).expand(rows, length),
        "cu_seq_lens": torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device),
        "document_sizes": [length] * rows,
        "max_length": length,
    }
