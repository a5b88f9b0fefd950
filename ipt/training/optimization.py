"""Optimizers and learning-rate schedules."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from ipt.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable parameters. Weight decay acts on matrices only, not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate_factor(step: int, config: ScheduleConfig, max_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0): linear warm-up, then the schedule's decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    if config.name == "cosine":
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    if config.name == "linear":
        return config.final_lr + (1 - config.final_lr) * (1 - progress)
    return 1.0
