"""The LightningModule: forward pass, loss, backward pass, gradient clipping, optimizer step."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim.lr_scheduler import LambdaLR

from ipt.config import Config
from ipt.errors import UserError
from ipt.training.loss import CausalLMLoss, lacks_load_balancing, with_targets
from ipt.training.model import base_model, fill, transformer_blocks, whole_or_empty_model
from ipt.training.optim.build import build_optimizer, learning_rate_factor, warmup_steps
from ipt.training.optim.skip_step import SkipStep
from ipt.training.parallelize import parallelize, set_gradient_sync
from ipt.training.probe import check_model, check_weights

MAX_SKIPPED = 50  # skipped steps in a row after which a run ends with an error

log = logging.getLogger(__name__)


class PretrainingModule(L.LightningModule):
    """Next-token training of any Hugging Face causal language model on packed batches
    (ipt.mixture.batches).

    The loss of an optimizer step is the sum over its target tokens divided by their global number,
    for any accumulation and any number of ranks. From the batch to the update the host never waits
    for the device; `finish_step` waits once per step.
    """

    # Losses [0] and target tokens [1] of each source: of this rank since the last step, and of all
    # ranks in the last step.
    _own_losses: Tensor
    _step_losses: Tensor
    # Load-balancing loss: its sum over the micro-batches of this rank, and its mean over all ranks.
    _own_aux_loss: Tensor
    _step_aux_loss: Tensor
    _grad_norm: Tensor

    def __init__(self, config: Config, sources: list[str]) -> None:
        super().__init__()
        self.automatic_optimization = False  # `training_step` calls the optimizer
        self.config = config
        self.sources = sources
        self.attention = ""  # the implementation in use; set in `configure_model`
        self.loss: CausalLMLoss | None = None
        self.guard = SkipStep(config.trainer.skip_spikes)
        for name in ("_own_losses", "_step_losses"):
            self._add_statistic(name, torch.zeros(2, len(sources), dtype=torch.float64))
        for name in ("_own_aux_loss", "_step_aux_loss"):
            self._add_statistic(name, torch.zeros((), dtype=torch.float64))
        self._add_statistic("_grad_norm", torch.zeros(()))

    def configure_model(self) -> None:
        """Check, build, parallelize and load the model."""
        if self.loss is not None:
            return
        trainer = self.config.trainer
        self.attention = check_model(self.config)
        log.info("attention: %s", self.attention)
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        model, files = whole_or_empty_model(self.config, self.attention, sharded=mesh is not None)
        self.loss = CausalLMLoss(model, trainer.loss_chunk)
        if lacks_load_balancing(base_model(model)):
            log.info(
                "the load-balancing loss of the experts is not part of the objective, because the "
                "model's config does not set output_router_logits: true",
                extra={"style": "dim"},
            )
        parallelize(self.loss, transformer_blocks(model), mesh, trainer)
        register_fsdp_forward_method(self.loss, "own_loss")
        if files:
            fill(model, files, self.device, self.config.seed)

    @property
    def model(self) -> Any:
        assert self.loss is not None
        return self.loss.model

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.config.optimizer, self.config.seed)
        schedule = self.config.lr_scheduler
        steps = self.config.trainer.max_steps
        warmup = warmup_steps(self.config)
        scheduler = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, schedule, steps, warmup)
        )
        return [optimizer], [scheduler]

    def on_train_start(self) -> None:
        assert self.loss is not None
        # Lightning does not accept it as an argument here, but its loggers and callbacks read it.
        self.trainer.accumulate_grad_batches = self.config.trainer.accumulate_grad_batches
        with self.trainer.precision_plugin.forward_context():
            check_weights(self.loss, self.config)

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Find the target positions on the host, which avoids a host-device sync."""
        batch = with_targets(batch)
        if torch.cuda.is_available():
            for name, value in batch.items():
                batch[name] = value.pin_memory() if isinstance(value, Tensor) else value
        return batch

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Forward and backward pass of a micro-batch; the update after the last one of a step."""
        assert self.loss is not None
        accumulate = self.config.trainer.accumulate_grad_batches
        is_last = (batch_index + 1) % accumulate == 0
        set_gradient_sync(self.loss, is_last, self.config.trainer)
        # FSDP2 averages gradients over ranks; the factor world_size makes the average a sum.
        scale = self.trainer.world_size / max(1, batch["step_targets"])
        loss, losses = self.loss(batch, scale, self.config.mixture.intra_document_mask)
        self._add_losses(batch["target_sources"], losses)
        if self.loss.load_balancing is not None and self.loss.aux_loss is not None:
            loss = loss + self.loss.load_balancing.coefficient * self.loss.aux_loss / accumulate
            self._own_aux_loss += self.loss.aux_loss.detach()
        with torch.autocast(self.device.type, enabled=False):  # autocast is for forward passes only
            self.manual_backward(loss)
            if is_last:
                self._update()
        return loss

    def _update(self) -> None:
        """Clip the gradients and take an optimizer step, unless the guard skips it."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        with_gradient = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(with_gradient, self.config.trainer.gradient_clip_val)
        self._grad_norm.copy_(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        mean_loss = self._reduce_losses()
        optimizer.optimizer.found_inf = self.guard(mean_loss, self._grad_norm)  # 1: skip the step
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def _add_losses(self, sources: Tensor, losses: Tensor) -> None:
        """Add the losses of target tokens to the sums of their sources."""
        of_source = sources == torch.arange(len(self.sources), device=losses.device)[:, None]
        sums = (of_source * losses.double()).sum(1)
        self._own_losses += torch.stack([sums, of_source.sum(1)])

    def _reduce_losses(self) -> Tensor:
        """Reduce the statistics of a step over ranks; returns the mean cross-entropy."""
        reduce = self.trainer.strategy.reduce
        self._step_losses.copy_(reduce(self._own_losses.clone(), reduce_op="sum"))
        self._own_losses.zero_()
        if self.loss is not None and self.loss.load_balancing is not None:
            micro_batches = self.config.trainer.accumulate_grad_batches * self.trainer.world_size
            total = reduce(self._own_aux_loss.clone(), reduce_op="sum")
            self._step_aux_loss.copy_(total / micro_batches)
            self._own_aux_loss.zero_()
        return self._step_losses[0].sum() / self._step_losses[1].sum().clamp_min(1)

    def finish_step(self) -> dict[str, float]:
        """Metrics of the last optimizer step over all ranks: loss and gradient norm, losses and
        target tokens by source, skipped steps so far.

        If the model has a load-balancing loss, `aux_loss` is that loss without its coefficient, and
        `loss` includes it; `loss/<source>` is always the cross-entropy. Raises UserError after
        MAX_SKIPPED skipped steps in a row.
        """
        numbers = [self._grad_norm, self.guard.skipped, self.guard.in_a_row, self._step_aux_loss]
        values = torch.cat([torch.stack(numbers).double(), self._step_losses.flatten()])
        # The only point of a step where the host waits for the device.
        grad_norm, skipped, in_a_row, aux_loss, *by_source = values.tolist()
        losses, tokens = by_source[: len(self.sources)], by_source[len(self.sources) :]
        if in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{int(in_a_row)} steps in a row were skipped: loss or gradients are not finite; "
                "lower optimizer.lr, or check the data"
            )
        metrics = {
            "loss": sum(losses) / max(1.0, sum(tokens)),
            "grad_norm": grad_norm,
            "skipped": int(skipped),
        }
        if self.loss is not None and self.loss.load_balancing is not None:
            metrics["aux_loss"] = aux_loss
            metrics["loss"] += self.loss.load_balancing.coefficient * aux_loss
        for name, loss, count in zip(self.sources, losses, tokens, strict=True):
            metrics[f"tokens/{name}"] = int(count)
            if count:
                metrics[f"loss/{name}"] = loss / count
        return metrics

    def _add_statistic(self, name: str, value: Tensor) -> None:
        """Statistics follow the module to its device and are not part of checkpoints."""
        self.register_buffer(name, value, persistent=False)
