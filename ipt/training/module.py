"""The LightningModule around any Hugging Face causal language model."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim.lr_scheduler import LambdaLR

from ipt.config import Config
from ipt.console import console
from ipt.errors import UserError
from ipt.training.loading import can_be_filled, fill, stored_weights
from ipt.training.model import base_model, build_model, empty_model, transformer_blocks
from ipt.training.objective import CausalLMLoss, lacks_load_balancing, with_targets
from ipt.training.optim.build import build_optimizer, learning_rate_factor, warmup_steps
from ipt.training.optim.skip_step import SkipStep
from ipt.training.parallelize import parallelize, set_gradient_sync
from ipt.training.probe import check_model, check_weights

__all__ = ["CausalLMLoss", "PretrainingModule", "build_model", "transformer_blocks"]

MOST_SKIPPED = 50  # steps in a row that are skipped before a run is given up


class PretrainingModule(L.LightningModule):
    """Next-token training on packed batches (ipt.mixture.batches).

    The loss of an optimizer step is the sum over its target tokens divided by their global number,
    whatever the accumulation and the number of ranks. From the batch to the update nothing waits
    for the device; `finish_step` does, once a step.
    """

    _sums: Tensor
    _totals: Tensor
    _aux_sum: Tensor
    _aux_mean: Tensor
    _grad_norm: Tensor

    def __init__(self, config: Config, sources: list[str]) -> None:
        super().__init__()
        self.config, self.sources = config, sources
        self.attention = ""  # what runs, once the model is built
        self.loss: CausalLMLoss | None = None
        self.guard = SkipStep(config.trainer.skip_spikes)
        # Loss and target tokens of each source: of this process until now, and of all in the last
        # step.
        for name in ("_sums", "_totals"):
            self.register_buffer(
                name, torch.zeros(2, len(sources), dtype=torch.float64), persistent=False
            )
        self.register_buffer("_grad_norm", torch.zeros(()), persistent=False)
        # Load-balancing loss: sum over micro-batches of this process, and the mean of the last step
        # over all.
        for name in ("_aux_sum", "_aux_mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64), persistent=False)

    def configure_model(self) -> None:
        if self.loss is not None:
            return
        trainer, mesh = self.config.trainer, self.device_mesh
        self.attention = check_model(self.config)
        rank_zero_only(console.print)(f"attention: {self.attention}")
        stored = (
            stored_weights(self.config.model)
            if mesh is not None and _can_be_cut(self.config)
            else {}
        )
        model = empty_model(self.config, self.attention) if stored else None
        if model is None or not can_be_filled(model, stored):
            model, stored = build_model(self.config, self.attention), {}
        self.loss = CausalLMLoss(model, trainer.loss_chunk)
        if lacks_load_balancing(base_model(model)):
            rank_zero_only(console.print)(
                "load-balancing loss of the experts: not part of the objective, since the model's "
                "config does not have "
                "output_router_logits: true",
                style="dim",
            )
        parallelize(
            self.loss,
            transformer_blocks(model),
            mesh["data_parallel"] if mesh is not None else None,
            trainer,
        )
        register_fsdp_forward_method(self.loss, "own_loss")
        if stored:
            fill(model, stored, self.device, self.config.seed)

    @property
    def model(self) -> Any:
        assert self.loss is not None
        return self.loss.model

    def on_train_start(self) -> None:
        assert self.loss is not None
        with self.trainer.precision_plugin.forward_context():
            check_weights(self.loss, self.config)

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Which positions are targets is found out on the host, so that no device is asked how many
        there are.
        """
        batch = with_targets(batch)
        if torch.cuda.is_available():
            return {
                name: value.pin_memory() if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        return batch

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        assert self.loss is not None
        accumulate = self.trainer.accumulate_grad_batches
        set_gradient_sync(self.loss, (batch_index + 1) % accumulate == 0, self.config.trainer)
        # Lightning divides by the accumulation and FSDP2 averages over ranks: both are undone, the
        # divisor is global.
        scale = accumulate * self.trainer.world_size / max(1, batch["step_targets"])
        loss, losses = self.loss(batch, scale, self.config.mixture.intra_document_mask)
        is_of_source = (
            batch["target_sources"]
            == torch.arange(len(self.sources), device=losses.device)[:, None]
        )
        self._sums += torch.stack([(is_of_source * losses.double()).sum(1), is_of_source.sum(1)])
        if self.loss.load_balancing is None or self.loss.aux_loss is None:
            return loss
        self._aux_sum += self.loss.aux_loss.detach()
        return loss + self.loss.load_balancing.coefficient * self.loss.aux_loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip, and tell the optimizer whether to take the step."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.trainer.gradient_clip_val)
        self._grad_norm.copy_(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self._totals.copy_(self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum"))
        self._sums.zero_()
        if self.loss is not None and self.loss.load_balancing is not None:
            micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
            self._aux_mean.copy_(
                self.trainer.strategy.reduce(self._aux_sum.clone(), reduce_op="sum") / micro_batches
            )
            self._aux_sum.zero_()
        optimizer.found_inf = self.guard(
            self._totals[0].sum() / self._totals[1].sum().clamp_min(1), self._grad_norm
        )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.config.optimizer, self.config.seed)
        steps, schedule, warmup = (
            self.config.trainer.max_steps,
            self.config.lr_scheduler,
            warmup_steps(self.config),
        )
        scheduler = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, schedule, steps, warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def finish_step(self) -> dict[str, float]:
        """Figures of the optimizer step that just ended, over all ranks: loss and target tokens, in
        all and by source; skipped steps.

        For a mixture of experts that balances its load, `aux_loss` is that loss before its
        coefficient, and `loss` is the whole objective; `loss/<source>` is always the cross-entropy.

        Raises UserError if so many steps in a row were skipped that the run has come to nothing.
        """
        counts = torch.stack(
            [self._grad_norm, self.guard.skipped, self.guard.in_a_row, self._aux_mean]
        ).double()
        values = torch.cat(
            [self._totals.flatten(), counts]
        ).tolist()  # the one time that the host waits for the device
        losses, tokens = values[: len(self.sources)], values[len(self.sources) : -4]
        grad_norm, skipped, in_a_row, aux_loss = values[-4:]
        if in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"{int(in_a_row)} steps in a row were skipped: loss or gradients are not finite; "
                "lower optimizer.lr, or look at the data"
            )
        figures = {
            "loss": sum(losses) / max(1.0, sum(tokens)),
            "grad_norm": grad_norm,
            "skipped": int(skipped),
        }
        if self.loss is not None and self.loss.load_balancing is not None:
            figures["aux_loss"] = aux_loss
            figures["loss"] += self.loss.load_balancing.coefficient * aux_loss
        for name, loss, count in zip(self.sources, losses, tokens, strict=True):
            figures[f"tokens/{name}"] = int(count)
            if count:
                figures[f"loss/{name}"] = loss / count
        return figures


def _can_be_cut(config: Config) -> bool:
    """Whether processes may read slices: not of random weights, and quantised ones stay whole."""
    return not config.architecture and not config.lora.quantize
