"""What each command does with its config. Heavy imports wait until a config is known to be good."""

from collections.abc import Callable
from functools import partial

from ipt.config import Config
from ipt.experiment.cli import run_command


def synthesize(config: Config) -> None:
    from ipt.experiment import checks, pipeline

    checks.check_synthesize_command(config)
    pipeline.synthesize(config)


def train(config: Config) -> None:
    from ipt.experiment import checks, pipeline

    checks.check_train_command(config)
    pipeline.train(config)


def evaluate(config: Config) -> None:
    from ipt.experiment import checks, pipeline

    checks.check_evaluate_command(config)
    pipeline.evaluate(config)


def reproduce(config: Config) -> None:
    from ipt.experiment import checks, pipeline

    checks.check_reproduce_command(config)
    pipeline.reproduce(config)


COMMANDS: dict[str, Callable[[], None]] = {
    work.__name__: partial(run_command, work.__name__, work) for work in (synthesize, train, evaluate, reproduce)
}
