"""The commands. `python -m ipt COMMAND` composes a typed config with Hydra, checks it and runs."""

import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ipt.config import Config, conf_dir, plain_command, to_config, unknown_key
from ipt.console import setup_logging, use_utf8
from ipt.errors import UserError
from ipt.sweeps.job import obey_launcher

# Environment variables for libraries that would use the network or print at import.
QUIET = {
    "TOKENIZERS_PARALLELISM": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_HTTP_TIMEOUT": "10",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# keys with names that the user chooses
OPEN_KEYS = {
    "mixture.ratios", "mixture.sources", "mixture.max_repeats", "mixture.subsample",
    "architecture", "arms",
}  # fmt: skip
# control characters and line ends, which names and values in a message may contain
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Objects between two garbage collections. With Python's 700, collections take a sixth of the time
# of `import lightning`.
COLLECT_EVERY = 10_000
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# errors of a path that the user chose
BAD_PATH = {
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP,
}  # fmt: skip


def _work(command: str, config: Config) -> None:
    """Check the config and run the command. Heavy imports wait until the config is valid."""
    if config.dry_run:
        return _dry_run(command, config)
    from ipt.pipeline import commands, reproduce, validation

    if command in ("synthesize", "train", "evaluate", "reproduce"):
        validation.check_places(config)
    check, work = {
        "synthesize": (validation.check_synthesize, commands.synthesize),
        "train": (validation.check_train, commands.train),
        "evaluate": (validation.check_evaluate, commands.evaluate),
        "chat": (validation.check_chat, _chat),
        "playground": (validation.check_playground, _playground),
        "reproduce": (validation.check_reproduce, reproduce.reproduce),
    }[command]
    check(config)
    work(config)


def _dry_run(command: str, config: Config) -> None:
    """Describe the training of the config; `reproduce` also describes the stages of all arms."""
    if command not in ("train", "reproduce"):
        raise UserError(
            f"dry_run=true describes a training: use it with train or reproduce, not with {command}"
        )
    from ipt.pipeline.dry_run.training import dry_run

    dry_run(config)
    if command == "reproduce" and config.arms:
        from ipt.pipeline.dry_run.arms import dry_run_arms
        from ipt.pipeline.validation import check_arms

        check_arms(config)
        dry_run_arms(config)


def _chat(config: Config) -> None:
    from ipt.chat import chat

    chat(config.chat, config.evaluation, config.model)


def _playground(config: Config) -> None:
    from ipt.playground.server import serve

    serve(config)


def _report() -> None:
    from ipt.report.cli import main

    main()


def _verify() -> None:
    from ipt.pipeline.verify import main

    main()


def _runs() -> None:
    from ipt.pipeline.runs import main

    main()


def _dashboard() -> None:
    from ipt.pipeline.tracking.dashboard import main

    main()


def run_command(command: str, work: Callable[[Config], None]) -> None:
    """Compose the config of `command`, a file of conf/, from the command line and run `work` on it.

    Errors are printed as `exit_on_user_error` describes.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():  # bars of libraries would write hundreds of lines into a log
        os.environ.setdefault("TQDM_DISABLE", "1")
    gc.set_threshold(COLLECT_EVERY)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    use_utf8()
    _check_current_folder()
    sys.argv[1:] = plain_command(sys.argv[1:])
    obey_launcher()
    failures: list[BaseException] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)
    def main(config: DictConfig) -> Any:
        # the launcher of another project, such as submitit's
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            from ipt.sweeps.process import launch_of, run_here

            return run_here(launch_of(HydraConfig.get()), HydraConfig.get().job.num)
        setup_logging()  # again: Hydra has replaced the handlers
        try:
            work(to_config(config))
        except BaseException as error:  # Hydra would print it, too
            failures.append(error)

    with exit_on_user_error():
        main()
        if failures:
            raise failures[0]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an error that the user can fix as one line on standard error and exit with code 1.

    Every other exception keeps its traceback. Commands without a config, which do not use
    `run_command`, run in this context.
    """
    setup_logging()
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error))
    except OSError as error:
        if error.errno in DISK_FULL:
            _fail(
                f"no room to write {error.filename or 'a file'} ({error.strerror}): free some "
                "space and run again to resume"
            )
        if error.errno in BAD_PATH:
            _fail(f"{error.strerror}: {error.filename}")
        raise
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to resume", code=130)


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:  # it was deleted, or its disk was removed
        _fail(
            f"the current folder cannot be used ({error.strerror}): change to another one with cd"
        )


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {CONTROL.sub(' ', message)}", file=sys.stderr)
    sys.exit(code)


def _explain(error: BaseException) -> str:
    """An error of Hydra or OmegaConf in one line; for an unknown key with the most similar key."""
    causes = [error]
    cause = error.__cause__
    while cause is not None and cause not in causes:  # OmegaConf makes circles under a debugger
        causes.append(cause)
        cause = cause.__cause__
    text = "\n".join(map(str, causes))
    line = next(line for line in text.splitlines() if line.strip())
    available = re.search(r"Available options in '[^']+':((?:\s+\w+$)+)", text, re.MULTILINE)
    if available:
        return (
            f"{line.removeprefix('In ').partition(': ')[2]}; there are: "
            f"{', '.join(available[1].split())}"
        )
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    missing = re.search(r"Key '[^']+' (?:is )?not in", text)
    if key and missing and key[1].rpartition(".")[0] in OPEN_KEYS:
        return f"there is no key {key[1]} yet: write +{key[1]}=… to add it"
    if key and missing and key[1] in OPEN_KEYS:
        return f"{key[1]} has no such keys yet: write ++{key[1]}={{…}} to add them"
    if key and missing:
        return unknown_key(key[1])
    if "Ambiguous value for argument" in line or "is not a ListConfig" in text:
        return (
            f"{line}: write a list in brackets, as KEY=[a,b]; to sweep over values put -m before "
            "the keys"
        )
    detail = next(
        (
            part
            for part in text.splitlines()
            if part.startswith("Value ") or "Unsupported" in part or "is not" in part
        ),
        "",
    )
    return f"{line}: {detail}" if detail and detail != line else line


# Commands with a config have a file of their name in conf/.
COMMANDS: dict[str, Callable[[], None]] = {}
for name in ("synthesize", "train", "evaluate", "chat", "playground", "reproduce"):
    COMMANDS[name] = partial(run_command, name, partial(_work, name))
COMMANDS |= {"report": _report, "verify": _verify, "runs": _runs, "dashboard": _dashboard}
