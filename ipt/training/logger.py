"""The Lightning loggers of a run, which the config group `logger` lists."""

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from ipt.config import Config
from ipt.distributed import rank
from ipt.errors import UserError
from ipt.places import expanded
from ipt.training.checkpoint.storage import read_facts, whole_checkpoints

log = logging.getLogger(__name__)

RUN_ID = ".wandb_id"
# folder of the loggers that are only checked
NOWHERE = {"save_dir": "."}
# commands that upload W&B runs, of those that were reported once
incomplete: set[str] = set()


def check_loggers(config: Config) -> None:
    """Raises UserError for a class that is no logger or needs a package that is not installed, and
    for wrong arguments.
    """
    for name, settings in config.loggers.items():
        arguments = {
            key: value for key, value in _filled(settings, NOWHERE).items() if key[0] != "_"
        }
        try:
            logger = get_class(settings["_target_"])
            if not issubclass(logger, Logger):
                raise TypeError(f"{settings['_target_']} is not a Lightning logger")
            inspect.signature(logger).bind(**arguments)
            if issubclass(logger, WandbLogger):
                _check_wandb(arguments)
            if issubclass(logger, CSVLogger | TensorBoardLogger | WandbLogger):
                logger(**arguments)  # which writes nothing
        except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"logger.{name}: {_one_line(error)}") from error


@contextmanager
def open_loggers(config: Config, name: str, output: Path) -> Iterator[list[Logger]]:
    """The loggers of the run `name`, such as "training" or "evaluation", in the folder `output`.
    They are finished at the end of the context; an exception marks their runs as failed.

    Arguments that are null in the config are filled in. W&B runs keep their id in `output`, so that
    a resumed run continues its W&B run. Only the first process has loggers.
    """
    loggers = _build_loggers(config, name, output) if config.loggers and rank() == 0 else []
    try:
        yield loggers
    except BaseException:
        _finish(loggers, failed=True)
        raise
    _finish(loggers)


def log_metrics(loggers: list[Logger], metrics: dict[str, float], step: int) -> None:
    """Log to all loggers, and remove a logger that fails from the list."""
    for logger in list(loggers):
        try:
            logger.log_metrics(metrics, step)
        except Exception as error:
            loggers.remove(logger)
            _warn(logger, error)


@contextmanager
def tolerating(logger: Logger) -> Iterator[None]:
    """Errors of a logger are warnings: all results are on the disk."""
    try:
        yield
    except Exception as error:
        _warn(logger, error)


def wandb_loggers(loggers: Sequence[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def has_wandb_key() -> bool:
    """Whether W&B is online and has an API key, without contact to the server.

    Raises UserError for an invalid key and for unreadable settings of W&B.
    """
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B: {_one_line(error)}") from error


def run_id(output: Path) -> str | None:
    """The id of the W&B run of the stage in `output`: random, and the same after an interruption,
    also on another machine if there is a checkpoint.

    None in all processes but the first, which is the only one that logs.
    """
    if rank() > 0:
        return None
    path = output / RUN_ID
    if not path.exists():
        newest = next(reversed(whole_checkpoints(output / "checkpoints")), None)
        known = read_facts(newest)["about"].get("wandb_id") if newest else None
        path.write_text(known or uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _check_wandb(arguments: Mapping[str, Any]) -> None:
    import wandb

    own = inspect.signature(WandbLogger).parameters
    inspect.signature(wandb.init).bind(
        **{key: value for key, value in arguments.items() if key not in own}
    )
    try:
        wandb.Settings(**arguments.get("settings") or {})
        wandb.Settings(project=arguments.get("project"), run_tags=arguments.get("tags"))
    except wandb.Error as error:
        raise ValueError(error) from error
    has_wandb_key()


def _filled(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a logger, with `values` for those that are null."""
    return {key: values.get(key) if value is None else value for key, value in settings.items()}


def _build_loggers(config: Config, name: str, output: Path) -> list[Logger]:
    values: dict[str, Any] = {
        "id": run_id(output),
        "name": f"{config.name} {name}",
        "group": config.name,
        "job_type": name.partition(" ")[0],
        "save_dir": str(output),
    }
    loggers: list[Logger] = []
    for settings in config.loggers.values():
        arguments = _filled(settings, values)
        if arguments.get("save_dir"):
            arguments["save_dir"] = expanded(arguments["save_dir"])
        if issubclass(get_class(arguments["_target_"]), WandbLogger):
            loggers += _start_wandb({"id": values["id"], **arguments})
        else:
            loggers.append(instantiate(arguments, _convert_="all"))
    for logger in loggers:
        logger.log_hyperparams(asdict(config))
    return loggers


def _start_wandb(arguments: dict[str, Any]) -> list[WandbLogger]:
    """A logger whose run has started: offline without an API key, and if the server does not answer
    in time. Empty if W&B cannot start at all.
    """
    import wandb

    # Reports about errors in W&B itself, which offline runs would also send
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return [_started(arguments)]
    except (wandb.Error, OSError, ValueError) as error:
        reason = _one_line(error)
    # W&B's process still holds the id of the run, or is gone
    with suppress(Exception, SystemExit):
        wandb.teardown()
    _stay_offline()
    try:
        logger = _started({**arguments, "mode": "offline"})
    except (wandb.Error, OSError, ValueError) as error:
        log.warning("W&B cannot start (%s); metrics.jsonl has all steps", _one_line(error))
        return []
    log.warning("W&B is offline (%s). To upload the run later: %s", reason, _sync(logger))
    return [logger]


def _started(arguments: dict[str, Any]) -> WandbLogger:
    import wandb

    offline = bool(arguments.get("offline"))
    needs_key = not (offline or has_wandb_key()) and wandb.setup().settings.mode == "online"
    if offline or needs_key:
        arguments = {"mode": "offline", **arguments}
    logger: WandbLogger = instantiate(arguments, _convert_="all")
    logger.experiment.define_metric("*", step_metric="tokens", overwrite=True)
    if needs_key:
        message = f"W&B has no API key. To upload the run later: {_sync(logger)}"
        log.info(message, extra={"style": "dim"})
    return logger


def _finish(loggers: Sequence[Logger], failed: bool = False) -> None:
    for logger in loggers:
        with tolerating(logger):
            logger.finalize("failed" if failed else "success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(failed))


def _warn(logger: Logger, error: Exception) -> None:
    if not isinstance(logger, WandbLogger):
        log.warning("%s failed (%s)", type(logger).__name__, _one_line(error))
        return
    _stay_offline()
    command = _sync(logger)
    if command not in incomplete:
        incomplete.add(command)
        log.warning("W&B lacks data (%s). To upload them later: %s", _one_line(error), command)


def _stay_offline() -> None:
    """Later runs of this process do not wait for the server."""
    import wandb

    wandb.setup(wandb.Settings(mode="offline"))


def _sync(logger: WandbLogger) -> str:
    """The command that uploads a run from its folder."""
    return f"wandb sync {Path(logger.experiment.dir).parent}"


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
