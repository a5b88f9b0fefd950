"""The commands: compose a typed config with Hydra, check it, run, and tell a user's mistake in one
line.
"""

import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

# Ours to read, theirs to ignore: set before any library that would ask the network or print at
# import.
QUIET = {
    "TOKENIZERS_PARALLELISM": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_HTTP_TIMEOUT": "10",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
OPEN_KEYS = (
    "mixture.ratios",
    "mixture.sources",
    "mixture.max_repeats",
    "mixture.subsample",
    "architecture",
    "arms",
)  # take any name
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+"
)  # names and values may hold what a terminal obeys
# objects. At Python's 700 a sixth of the time of `import lightning` goes into looking for garbage
COLLECT_EVERY = 10_000
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ELOOP,
)  # of a path that the user chose


def run_command(command: str, work: Callable[[Config], None]) -> None:
    """Run `work` on the config that the command line composes; `command` names a file of conf/.

    A mistake of the user's (a misspelt key, a missing file, a value that cannot be) is one line on
    standard error and exit code 1. Errors that are not the user's keep their traceback.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(COLLECT_EVERY)
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # let errors through to us instead of Hydra's own many lines
    )

    use_utf8()
    _check_current_folder()
    sys.argv[1:] = plain_command(sys.argv[1:])
    obey_launcher()
    failures: list[BaseException] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)
    def main(config: DictConfig) -> Any:
        if (
            HydraConfig.get().mode == RunMode.MULTIRUN
        ):  # under a launcher that is not ours, such as submitit's
            from ipt.sweeps.process import launch_of, run_here

            return run_here(launch_of(HydraConfig.get()), HydraConfig.get().job.num)
        setup_logging()  # again, since Hydra has replaced the handlers
        try:
            work(to_config(config))
        except (
            BaseException
        ) as error:  # carried past Hydra, which would print it in its own way too
            failures.append(error)

    with exit_on_user_error():
        main()
        if failures:
            raise failures[0]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an error that the user can fix as one line on standard error and exit with code 1.

    Every other exception keeps its traceback. Commands that do not go through `run_command` do
    their work in this context.
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
                f"no room to write {error.filename or 'a file'} ({error.strerror}): what is "
                "finished is kept, make room and run again"
            )
        if error.errno in NO_PLACE:
            _fail(f"{error.strerror}: {error.filename}")
        raise
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from here", code=130)


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:  # it was deleted, or is on a disk that is gone
        _fail(
            f"the current folder cannot be used ({error.strerror}): change to another one with cd"
        )


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {CONTROL.sub(' ', message)}", file=sys.stderr)
    sys.exit(code)


def _explain(error: BaseException) -> str:
    """One line, with the nearest key where a key was misspelt."""
    causes = [error]
    while (
        cause := causes[-1].__cause__
    ) is not None and cause not in causes:  # OmegaConf makes circles under a debugger
        causes.append(cause)
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
    if key and missing and key[1] in OPEN_KEYS:  # a dictionary with names of the user's own
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
