"""Which parameters an optimizer decays and orthogonalises, and how learning rates change over a
run.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ipt.config import Config, LrSchedulerConfig, OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> Optimizer:
    """The optimizer of the trainable parameters; all of them take the step or leave it as
    `optimizer.found_inf` says.

    `seed` is that of the noise by which weights in bf16 are rounded.
    """
    groups = parameter_groups(model, config)
    defaults: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
    }
    if config.name == "adamw" and all(
        parameter.dtype.itemsize == 4 for group in groups for parameter in group["params"]
    ):
        return AdamW(groups, **defaults, fused=True)
    from ipt.training.optim import optimizers

    if config.name == "paged_adamw_8bit":
        return optimizers.AdamW8bit(groups, defaults, seed, paged=True)
    kinds: dict[str, type[optimizers.ShardedOptimizer]] = {
        "adamw": optimizers.AdamW,
        "adamw_8bit": optimizers.AdamW8bit,
        "lion": optimizers.Lion,
        "lion_8bit": optimizers.Lion8bit,
        "muon": optimizers.Muon,
    }
    return kinds[config.name](groups, defaults, seed)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters by what is done to them: decay acts on matrices only, on the
    embedding table by choice.

    For Muon also by whether they are orthogonalised: matrices are, but for the embedding table and
    the projection to the vocabulary.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    rows = max((table.shape[0] for table in tables), default=0)
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            embeds = _is_one_of(parameter, tables)
            decays = parameter.ndim >= 2 and (config.decay_embeddings or not embeds)
            orthogonal = (
                config.name == "muon"
                and parameter.ndim == 2
                and not embeds
                and parameter.shape[0] != rows
            )
            groups.setdefault((decays, orthogonal), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            **(
                {"orthogonal": orthogonal, "momentum": config.momentum}
                if config.name == "muon"
                else {}
            ),
        }
        for (decays, orthogonal), parameters in groups.items()
    ]


def warmup_steps(config: Config) -> int:
    """Steps of the warm-up: as given, or those of `lr_scheduler.warmup_tokens`, rounded up."""
    trainer, tokens = config.trainer, config.lr_scheduler.warmup_tokens
    if tokens is None:
        return config.lr_scheduler.warmup_steps
    sequences = (
        trainer.micro_batch_size
        * trainer.accumulate_grad_batches
        * trainer.devices
        * trainer.num_nodes
    )
    return math.ceil(tokens / (sequences * config.mixture.seq_len))


def learning_rate_factor(
    step: int, config: LrSchedulerConfig, max_steps: int, warmup: int | None = None
) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0): linear warm-up, then the
    schedule's decay.

    `warmup` is the warm-up in steps; by default the config's.
    """
    warmup = config.warmup_steps if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    decaying = (
        max_steps - warmup
        if config.name != "wsd"
        else min(max_steps - warmup, round(config.decay_fraction * max_steps))
    )
    progress = min(1.0, max(0.0, (step - (max_steps - decaying)) / max(1, decaying)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def _is_one_of(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in others)
