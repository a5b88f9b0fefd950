"""The LightningModule around any Hugging Face causal language model."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ipt.config import Config
from ipt.mixture.batches import IGNORE
from ipt.models import load_model, resolve_model
from ipt.training.attention import PACKED, document_bounds, register_packed_attention
from ipt.training.loss import chunked_cross_entropy
from ipt.training.optimization import build_optimizer, learning_rate_factor
from ipt.training.parallelize import parallelize


class CausalLMLoss(nn.Module):
    """Model and loss in one module, so that under FSDP2 one forward pass gathers the projection's weight too."""

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, scale: float, document_mask: bool) -> tuple[Tensor, Tensor]:
        """Loss `scale * sum` and the loss of each target token, in the order of the batch; tensors are [B, T]."""
        base = _base(self.model)
        decoder, projection = base.get_decoder(), base.get_output_embeddings()
        if not document_mask:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        options = {}
        if base.config._attn_implementation == PACKED:  # one row: where rows meet, documents do too
            input_ids, position_ids = input_ids.flatten()[None], position_ids.flatten()[None]
            options["cu_seq_lens_q"] = document_bounds(position_ids[0])
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options).last_hidden_state
        targets = labels.flatten() != IGNORE
        return chunked_cross_entropy(hidden.flatten(0, 1)[targets], projection.weight, labels.flatten()[targets], scale, self.chunk)


class PretrainingModule(L.LightningModule):
    """Next-token training on packed batches (ipt.mixture.batches).

    The loss of an optimizer step is the sum over its target tokens divided by their global number, whatever the
    accumulation and the number of ranks.
    """

    def __init__(self, config: Config, sources: list[str]) -> None:
        super().__init__()
        self.config, self.sources = config, sources
        self.loss: CausalLMLoss | None = None
        self.grad_norm = 0.0
        self._sums = torch.zeros(2, len(sources), dtype=torch.float64)  # loss and target tokens of each source

    def configure_model(self) -> None:
        if self.loss is not None:
            return
        model = build_model(self.config)
        self.loss = CausalLMLoss(model, self.config.trainer.loss_chunk)
        if self.device_mesh is not None:
            parallelize(self.loss, transformer_blocks(model), self.device_mesh["data_parallel"], self.config.trainer)

    @property
    def model(self) -> Any:
        assert self.loss is not None
        return self.loss.model

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        # Lightning divides by the accumulation and FSDP2 averages over ranks: both are undone, the divisor is global.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / int(batch["step_targets"])
        assert self.loss is not None
        loss, losses = self.loss(batch["input_ids"], batch["position_ids"], batch["labels"], scale, self.config.mixture.document_mask)
        source = batch["source_ids"][batch["labels"] != IGNORE].cpu()
        self._sums[0].index_add_(0, source, losses.double().cpu())
        self._sums[1] += torch.bincount(source, minlength=len(self.sources))
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.trainer.gradient_clip)
        self.grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self.config.optimizer)
        steps, schedule = self.config.trainer.max_steps, self.config.schedule
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, schedule, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def finish_step(self) -> dict[str, float]:
        """Figures of the optimizer step that just ended, over all ranks: loss and target tokens, in all and by source."""
        sums = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum").cpu()
        self._sums = torch.zeros_like(self._sums)
        figures = {"loss": float(sums[0].sum() / sums[1].sum()), "grad_norm": self.grad_norm}
        for name, (loss, tokens) in zip(self.sources, sums.T.tolist(), strict=True):
            figures[f"tokens/{name}"] = int(tokens)
            if tokens:
                figures[f"loss/{name}"] = loss / tokens
        return figures


def build_model(config: Config) -> nn.Module:
    """The model in fp32 and in training mode, from its weights or from scratch, with LoRA layers if asked for."""
    register_packed_attention()
    attention = PACKED if config.trainer.attention == "packed" else config.trainer.attention
    if config.architecture:
        from transformers import AutoConfig, AutoModelForCausalLM

        architecture = AutoConfig.for_model(**config.architecture)
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation=attention)
    else:
        model = load_model(resolve_model(config.model), torch.float32, attn_implementation=attention)
    model.train()  # from_pretrained leaves it in eval mode, which would turn activation checkpointing off without a word
    if config.trainer.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face decoder: what FSDP shards one by one."""
    names = _base(model)._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _base(model: Any) -> Any:
    """The Hugging Face model inside the LoRA layers, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
