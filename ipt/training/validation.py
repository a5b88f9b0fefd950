"""Errors in a training config that can be found without importing torch or Lightning."""

import os

from ipt.config import Config, TrainerConfig, check_choices
from ipt.distributed import launcher_number
from ipt.errors import UserError

AT_LEAST_ONE = (
    "trainer.max_steps",
    "trainer.micro_batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.replicas",
    "trainer.loss_chunk",
)
ABOVE_ZERO = (
    "trainer.skip_spikes",
    "trainer.log_every_n_steps",
    "checkpoint.every_n_train_steps",
    "checkpoint.every_n_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_every_n_steps",
)
FRACTIONS = (
    "trainer.activation_budget",
    "lr_scheduler.decay_fraction",
    "lr_scheduler.min_lr_ratio",
)
# Step ids from here on are SLURM's own steps: batch script, interactive shell, extern.
FIRST_SPECIAL_STEP = 0xFFFF_FFF0
SHELLS = {"bash", "sh", "zsh", "fish", "ksh", "csh", "tcsh"}  # job names of `srun --pty SHELL`


def check_training(config: Config) -> None:
    """Raises UserError for values that no run can use."""
    for key in AT_LEAST_ONE:
        value = _value(config, key)
        if value is None or value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
    if config.mixture.seq_len < 2:
        raise UserError(f"mixture.seq_len={config.mixture.seq_len}: must be at least 2")
    check_choices(config)
    for key in FRACTIONS:
        value = _value(config, key)
        if value is None or not 0 <= value <= 1:
            raise UserError(f"{key}={value}: must be between 0 and 1")
    for key in ABOVE_ZERO:
        value = _value(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value}: must be above 0")
    _check_devices(config)
    _check_combinations(config)


def check_launch(trainer: TrainerConfig, command: str = "train.py …") -> None:
    """Raises UserError if the device is missing, or if the number of processes is not the one in
    the config: a process would wait for others forever.

    `command` is what torchrun should start, for the message.
    """
    if trainer.accelerator in ("gpu", "cuda"):
        import torch

        if not torch.accelerator.is_available():
            raise UserError(
                f"trainer.accelerator={trainer.accelerator}: torch {torch.__version__} finds no "
                "GPU here; use trainer=cpu"
            )
    keys = f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}"
    wanted = trainer.world_size
    started = launcher_number("WORLD_SIZE") or slurm_tasks()
    if started == wanted:
        return
    if started == 1:
        nodes = ""
        if trainer.num_nodes > 1:
            nodes = f"--nnodes={trainer.num_nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        raise UserError(
            f"{keys}: {wanted} processes are needed: torchrun "
            f"{nodes}--nproc-per-node={trainer.devices} {command}"
        )
    hint = "" if "WORLD_SIZE" in os.environ else ", or start one with srun --ntasks=1"
    raise UserError(
        f"{keys}: {started} processes were started: set "
        f"trainer.devices={started // trainer.num_nodes or 1}{hint}"
    )


def slurm_tasks() -> int:
    """The number of processes that `srun` started together with this one; 1 in a batch script, in a
    shell and outside of SLURM.

    The variables of a job describe its allocation and are set for single processes too: in a batch
    script, in a shell of `salloc` or `srun --pty`, and for anything started from there.
    """
    environment = os.environ
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP:
        return 1
    name = environment.get("SLURM_JOB_NAME", "")
    is_shell = name in SHELLS or (name == "interactive" and "SLURM_PROCID" not in environment)
    if is_shell or any(variable.startswith("SLURM_PTY_") for variable in environment):
        return 1
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    return int(tasks) if tasks.isdigit() else 1


def _value(config: Config, key: str) -> float | None:
    part, name = key.split(".")
    value: float | None = getattr(getattr(config, part), name)
    return value


def _check_devices(config: Config) -> None:
    """Keys that depend on the number and kind of devices."""
    trainer = config.trainer
    if trainer.world_size % trainer.replicas:
        raise UserError(
            f"trainer.replicas={trainer.replicas}: must divide the number of devices, "
            f"{trainer.world_size}"
        )
    if trainer.strategy == "single" and trainer.replicas > 1:
        raise UserError(
            f"trainer.replicas={trainer.replicas}: needs a sharded model; set "
            "trainer.strategy=fsdp2"
        )
    if trainer.strategy == "single" and trainer.world_size > 1:
        raise UserError(
            f"trainer.strategy=single: works on one device only, and there are "
            f"{trainer.world_size}; set trainer.strategy=auto"
        )
    if config.optimizer.name == "paged_adamw_8bit" and trainer.accelerator == "cpu":
        raise UserError(
            "optimizer.name=paged_adamw_8bit: needs a GPU, whose memory it pages to the host; on a "
            "CPU use adamw_8bit"
        )


def _check_combinations(config: Config) -> None:
    """Keys that only work together."""
    trainer, schedule, lora = config.trainer, config.lr_scheduler, config.lora
    if trainer.activation_checkpointing == "budget" and not trainer.compile:
        raise UserError(
            "trainer.activation_checkpointing=budget: the compiler implements it; set "
            "trainer.compile=true"
        )
    if lora.quantize and not lora.rank:
        raise UserError(
            f"lora.quantize={lora.quantize}: quantised weights cannot be trained; set lora.rank, "
            "for example to 16"
        )
    if lora.quantize and config.architecture:
        raise UserError(
            f"lora.quantize={lora.quantize}: a model that is trained from scratch has no weights "
            "to quantise"
        )
    if schedule.warmup_tokens is not None and schedule.warmup_steps:
        raise UserError(
            "lr_scheduler.warmup_tokens: give the warm-up in steps or in tokens, and set the other "
            "to 0 or null"
        )
