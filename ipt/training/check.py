"""What can be known to be wrong with a training config without importing torch or Lightning."""

from ipt.config import Config


def check_training(config: Config) -> None:
    """One-line ValueErrors for values that no run could use."""
    trainer = config.trainer
    for name in ("max_steps", "micro_batch_size", "accumulate", "devices", "num_nodes", "loss_chunk"):
        if getattr(trainer, name) < 1:
            raise ValueError(f"trainer.{name}={getattr(trainer, name)}: must be at least 1")
    if config.mixture.seq_len < 2:
        raise ValueError(f"mixture.seq_len={config.mixture.seq_len}: must be at least 2")
    choices = {
        "trainer.precision": (trainer.precision, ("fp32", "bf16")),
        "trainer.strategy": (trainer.strategy, ("auto", "single", "fsdp2")),
        "optimizer.name": (config.optimizer.name, ("adamw", "adamw_8bit")),
        "schedule.name": (config.schedule.name, ("cosine", "linear", "constant")),
        "logger.name": (config.logger.name, ("none", "wandb")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{key}={value}: must be one of {', '.join(known)}")
