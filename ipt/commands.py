"""The commands. Heavy imports wait until a config is known to be good."""

from collections.abc import Callable
from functools import partial

from ipt.cli import run_command
from ipt.config import Config
from ipt.errors import UserError

WRITING = (
    "synthesize",
    "train",
    "evaluate",
    "reproduce",
)  # these write to output_dir and stages_dir
DRY = (
    "train",
    "reproduce",
)  # both describe the recipe's training, reproduce the stages of its arms too


def _work(command: str, config: Config) -> None:
    if config.dry_run:
        if command not in DRY:
            raise UserError(
                f"dry_run=true describes a training: use it with {' or '.join(DRY)}, not with "
                f"{command}"
            )
        return _dry_run(command, config)
    from ipt.pipeline import reproduce, stages, validation

    if command in WRITING:
        validation.check_places(config)
    check, work = {
        "synthesize": (validation.check_synthesize, stages.synthesize),
        "train": (validation.check_train, stages.train),
        "evaluate": (validation.check_evaluate, stages.evaluate),
        "chat": (validation.check_chat, _chat),
        "playground": (validation.check_playground, _playground),
        "reproduce": (validation.check_reproduce, reproduce.reproduce),
    }[command]
    check(config)
    work(config)


def _dry_run(command: str, config: Config) -> None:
    from ipt.pipeline.dry_run import dry_run

    dry_run(config)
    if command == "reproduce" and config.arms:
        from ipt.pipeline.dry_run_arms import dry_run_arms
        from ipt.pipeline.validation import check_arms

        check_arms(config)
        dry_run_arms(config)


def _chat(config: Config) -> None:
    from ipt.chat import chat

    chat(config.chat, config.evaluation, config.model)


def _playground(config: Config) -> None:
    from ipt.playground.server import serve

    serve(config)


def _verify() -> None:
    from ipt.pipeline.verify import main

    main()


def _report() -> None:
    from ipt.report.cli import main

    main()


def _dashboard() -> None:
    from ipt.pipeline.tracking.dashboard import main

    main()


def _runs() -> None:
    from ipt.pipeline.runs import main

    main()


CONFIGURED = (
    "synthesize",
    "train",
    "evaluate",
    "chat",
    "playground",
    "reproduce",
)  # each has a file of its name in conf/
COMMANDS: dict[str, Callable[[], None]] = {
    command: partial(run_command, command, partial(_work, command)) for command in CONFIGURED
}
COMMANDS |= {
    "report": _report,
    "verify": _verify,
    "runs": _runs,
    "dashboard": _dashboard,
}  # those that take no config
