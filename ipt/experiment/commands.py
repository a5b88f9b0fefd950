"""The commands. Heavy imports wait until a config is known to be good."""

from collections.abc import Callable
from functools import partial

from ipt.config import Config
from ipt.experiment.cli import run_command

DRY = ("train", "reproduce")  # both describe the recipe's training; its arms differ in their data alone


def _work(command: str, config: Config) -> None:
    if config.dry_run:
        if command not in DRY:
            raise ValueError(f"dry_run=true describes a training: use it with {' or '.join(DRY)}, not with {command}")
        from ipt.experiment.dry_run import dry_run

        return dry_run(config)
    from ipt.experiment import checks, pipeline, reproduce

    check, work = {
        "synthesize": (checks.check_synthesize, pipeline.synthesize),
        "train": (checks.check_train, pipeline.train),
        "evaluate": (checks.check_evaluate, pipeline.evaluate),
        "chat": (checks.check_chat, _chat),
        "reproduce": (checks.check_reproduce, reproduce.reproduce),
    }[command]
    check(config)
    work(config)


def _chat(config: Config) -> None:
    from ipt.evaluation.chat import chat

    chat(config.chat, config.evaluation, config.model)


COMMANDS: dict[str, Callable[[], None]] = {
    command: partial(run_command, command, partial(_work, command)) for command in ("synthesize", "train", "evaluate", "chat", "reproduce")
}
