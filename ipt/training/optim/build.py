"""The optimizer, its parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ipt.config import Config, LrSchedulerConfig, OptimizerConfig
from ipt.training.optim import optimizers


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> Optimizer:
    """The optimizer of the trainable parameters. It skips a step if its `found_inf` is not 0.

    `seed` determines the noise of stochastic rounding of bf16 weights.
    """
    groups = parameter_groups(model, config)
    betas = (config.betas[0], config.betas[1])
    defaults: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.eps}
    trained = [parameter for group in groups for parameter in group["params"]]
    if config.name == "adamw" and all(parameter.dtype.itemsize == 4 for parameter in trained):
        return AdamW(groups, **defaults, fused=True)
    if config.name == "paged_adamw_8bit":
        return optimizers.AdamW8bit(groups, defaults, seed, paged=True)
    classes: dict[str, type[optimizers.ShardedOptimizer]] = {
        "adamw": optimizers.AdamW,
        "adamw_8bit": optimizers.AdamW8bit,
        "lion": optimizers.Lion,
        "lion_8bit": optimizers.Lion8bit,
        "muon": optimizers.Muon,
    }
    return classes[config.name](groups, defaults, seed)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of trainable parameters. Weight decay applies to matrices, and to embedding tables
    with `decay_embeddings`.

    Muon orthogonalises (`orthogonal`) the matrices other than embedding tables and the projection
    to the vocabulary.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = max((table.shape[0] for table in tables), default=0)
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        embeds = _is_one_of(parameter, tables)
        decays = parameter.ndim >= 2 and (config.decay_embeddings or not embeds)
        is_hidden = parameter.ndim == 2 and not embeds and parameter.shape[0] != vocabulary
        orthogonal = config.name == "muon" and is_hidden
        groups.setdefault((decays, orthogonal), []).append(parameter)
    result = []
    for (decays, orthogonal), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters}
        group["weight_decay"] = config.weight_decay if decays else 0.0
        if config.name == "muon":
            group |= {"orthogonal": orthogonal, "momentum": config.momentum}
        result.append(group)
    return result


def warmup_steps(config: Config) -> int:
    """Steps of the warm-up: `lr_scheduler.warmup_steps`, or `warmup_tokens` rounded up to steps."""
    tokens = config.lr_scheduler.warmup_tokens
    if tokens is None:
        return config.lr_scheduler.warmup_steps
    return math.ceil(tokens / (config.trainer.global_batch_size * config.mixture.seq_len))


def learning_rate_factor(
    step: int, config: LrSchedulerConfig, max_steps: int, warmup: int | None = None
) -> float:
    """Learning rate at optimizer step `step` (from 0) relative to the peak: linear warm-up, then
    the schedule's decay.

    `warmup` is the warm-up in steps; by default `config.warmup_steps`.
    """
    warmup = config.warmup_steps if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    decay_steps = max_steps - warmup
    if config.name == "wsd":
        decay_steps = min(decay_steps, round(config.decay_fraction * max_steps))
    progress = min(1.0, max(0.0, (step - (max_steps - decay_steps)) / max(1, decay_steps)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def _is_one_of(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in others)
