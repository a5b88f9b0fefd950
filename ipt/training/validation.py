"""What can be known to be wrong with a training config without importing torch or Lightning."""

import os

from ipt.config import Config, TrainerConfig, check_choices
from ipt.distributed import launcher_number
from ipt.errors import UserError

FIRST_SPECIAL_STEP = (
    0xFFFF_FFF0  # ids of SLURM's own steps: batch script, interactive shell, extern
)
SHELLS = (
    "bash",
    "sh",
    "zsh",
    "fish",
    "ksh",
    "csh",
    "tcsh",
)  # names of jobs that are `srun --pty SHELL`


def check_training(config: Config) -> None:
    """UserErrors for values that no run could use."""
    trainer = config.trainer
    for name in (
        "max_steps",
        "micro_batch_size",
        "accumulate_grad_batches",
        "devices",
        "num_nodes",
        "replicas",
        "loss_chunk",
    ):
        if getattr(trainer, name) < 1:
            raise UserError(f"trainer.{name}={getattr(trainer, name)}: must be at least 1")
    if config.mixture.seq_len < 2:
        raise UserError(f"mixture.seq_len={config.mixture.seq_len}: must be at least 2")
    check_choices(config)
    _check_shares(config)
    _check_combinations(config)
    _check_saving(config)


def check_launch(trainer: TrainerConfig, command: str = "train.py …") -> None:
    """The device must be there, and as many processes as the config has devices: one must never
    wait for another that nobody starts.

    `command` is what torchrun has to start, for messages.
    """
    if trainer.accelerator in ("gpu", "cuda"):
        import torch

        if not torch.accelerator.is_available():
            found = f"torch {torch.__version__} sees no GPU here"
            raise UserError(
                f"trainer.accelerator={trainer.accelerator}: {found}: trainer=cpu does without"
            )
    keys = f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}"
    wanted = trainer.devices * trainer.num_nodes
    started = launcher_number("WORLD_SIZE") or slurm_tasks()
    if started == wanted:
        return
    if started == 1:
        nodes = (
            ""
            if trainer.num_nodes == 1
            else f"--nnodes={trainer.num_nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        )
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
    """The processes that `srun` started together with this one; 1 in a batch script, in a shell and
    outside of SLURM.

    A job's variables describe its allocation, so they also reach a single process: one of a batch
    script, of a shell that `salloc` or `srun --pty` opened, or of anything started from there.
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


def _check_saving(config: Config) -> None:
    names = ("every_n_train_steps", "every_n_minutes", "keep_last", "keep_every_n_steps")
    values = {f"checkpoint.{name}": getattr(config.checkpoint, name) for name in names}
    values["trainer.log_every_n_steps"] = config.trainer.log_every_n_steps
    for name, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"{name}={value}: must be above 0")


def _check_shares(config: Config) -> None:
    shares = {
        "trainer.activation_budget": config.trainer.activation_budget,
        "lr_scheduler.decay_fraction": config.lr_scheduler.decay_fraction,
        "lr_scheduler.min_lr_ratio": config.lr_scheduler.min_lr_ratio,
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key}={value}: must be between 0 and 1")
    if config.trainer.skip_spikes is not None and config.trainer.skip_spikes <= 0:
        raise UserError(
            f"trainer.skip_spikes={config.trainer.skip_spikes}: must be above 0; null skips only "
            "steps that are not finite"
        )


def _check_combinations(config: Config) -> None:
    """Keys that only work together."""
    trainer, schedule, lora = config.trainer, config.lr_scheduler, config.lora
    world = trainer.devices * trainer.num_nodes
    if trainer.activation_checkpointing == "budget" and not trainer.compile:
        raise UserError(
            "trainer.activation_checkpointing=budget: it is the compiler that keeps the budget, "
            "set trainer.compile=true"
        )
    if world % trainer.replicas:
        raise UserError(
            f"trainer.replicas={trainer.replicas}: must divide the number of devices, {world}"
        )
    if trainer.replicas > 1 and trainer.strategy == "single":
        raise UserError(
            f"trainer.replicas={trainer.replicas}: copies are of a sharded model, set "
            "trainer.strategy=fsdp2"
        )
    if trainer.strategy == "single" and world > 1:
        raise UserError(
            f"trainer.strategy=single: is for one device, and there are {world}: set "
            "trainer.strategy=auto"
        )
    if config.optimizer.name == "paged_adamw_8bit" and trainer.accelerator == "cpu":
        raise UserError(
            "optimizer.name=paged_adamw_8bit: pages between a GPU and its host, on a CPU use "
            "adamw_8bit"
        )
    if lora.quantize and not lora.rank:
        raise UserError(
            f"lora.quantize={lora.quantize}: quantised weights cannot be trained themselves, set "
            "lora.rank, as 16"
        )
    if lora.quantize and config.architecture:
        raise UserError(
            f"lora.quantize={lora.quantize}: there are no weights to quantise in a model that is "
            "trained from scratch"
        )
    if schedule.warmup_tokens is not None and schedule.warmup_steps:
        raise UserError(
            "lr_scheduler.warmup_tokens: give the warm-up in steps or in tokens, and set the other to "
            "0 or null"
        )
