"""The commands. Heavy imports wait until a config is known to be good."""

from collections.abc import Callable
from functools import partial

from ipt.config import Config
from ipt.experiment.cli import run_command


def _work(command: str, config: Config) -> None:
    from ipt.experiment import checks, pipeline, reproduce

    check, work = {
        "synthesize": (checks.check_synthesize, pipeline.synthesize),
        "train": (checks.check_train, pipeline.train),
        "evaluate": (checks.check_evaluate, pipeline.evaluate),
        "reproduce": (checks.check_reproduce, reproduce.reproduce),
    }[command]
    check(config)
    work(config)


COMMANDS: dict[str, Callable[[], None]] = {
    command: partial(run_command, command, partial(_work, command)) for command in ("synthesize", "train", "evaluate", "reproduce")
}
