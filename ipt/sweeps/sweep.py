"""A sweep as a whole: its folder, the plan of its jobs, and what is told and kept of it at its end."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.markup import escape
from rich.table import Table

from ipt.config import Config, to_config
from ipt.console import console
from ipt.errors import UserError
from ipt.files import hash_json, write_json
from ipt.places import check_writable
from ipt.sweeps.job import FINISHED, Job, load_job, save_job, varying_name
from ipt.sweeps.progress import job_label

AUTO = "auto"  # hydra.sweep.dir: outputs/sweeps/NAME-KEY
COLUMNS = 6  # figures in the table; sweep.json has all
NARROW_COLUMNS, WIDE = 2, 120  # so many on a terminal of fewer characters a line


def name_sweep(config: DictConfig) -> Path:
    """The folder of a sweep, by default outputs/sweeps/NAME-KEY: the same command has the same one,
    whatever its hydra.* keys.

    `config` is the sweep's whole config, into which the folder is put as if it had been given, for
    launchers to find. Raises UserError for what is no sweep.
    """
    if config.dry_run:
        raise UserError("dry_run=true describes one run: leave out -m, and give each key one value")
    if config.hydra.sweep.dir == AUTO:
        parts = [
            config.hydra.job.config_name,
            sorted(config.hydra.overrides.task),
            config.hydra.sweeper.get("params"),
        ]
        parts = [
            OmegaConf.to_container(part) if OmegaConf.is_config(part) else part for part in parts
        ]
        folder = f"outputs/sweeps/{config.name}-{hash_json(parts)[:12]}"
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = folder
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
    return Path(config.hydra.sweep.dir)


@contextmanager
def open_sweep(folder: Path) -> Iterator[None]:
    """The sweep's folder is this process's alone. Raises UserError if another one runs the sweep."""
    check_writable("hydra.sweep.dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"this sweep is running already, in another process that holds {folder / '.lock'}: "
            "wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def plan_jobs(
    command: str, folder: Path, batch: Sequence[Sequence[str]], first: int, varying: Sequence[str]
) -> list[int]:
    """Note down a job for each list of overrides in `batch`, numbered from `first`; return the
    numbers.

    What is known of a job of the same config from an earlier run of the sweep stays known. Runs of
    a sweep share a W&B group. Raises UserError if two jobs would write to one folder.
    """
    jobs = [
        _planned(command, overrides, number, varying)
        for number, overrides in enumerate(batch, first)
    ]
    outputs = [
        config.output_dir or f"outputs/{config.name}"
        for _, config in jobs
        if config.output_dir or command == "reproduce"
    ]
    if shared := next((output for output in outputs if outputs.count(output) > 1), None):
        key = varying[0] if varying else "seed"
        raise UserError(
            f"output_dir={shared} is the same for several jobs: give each its own, as "
            f"output_dir='{shared}/${{{key}}}'"
        )
    for job, _ in jobs:
        known = load_job(folder, job.number)
        save_job(
            folder,
            replace(known, name=job.name, overrides=job.overrides)
            if known and known.key == job.key
            else job,
        )
    return [job.number for job, _ in jobs]


def close_sweep(folder: Path, numbers: Sequence[int], config: DictConfig, told: str = "") -> None:
    """Keep and show what came of a sweep: sweep.json, one table, and the report. `told` is added to
    the table.

    Raises UserError if a job has failed, so that the exit code tells too.
    """
    jobs = [job for number in numbers if (job := load_job(folder, number)) is not None]
    write_json(
        folder / "sweep.json", {"folder": str(folder), "jobs": [asdict(job) for job in jobs]}
    )
    if not jobs:
        return
    console.print(sweep_table(jobs))
    if told:
        console.print(told, highlight=False)
    console.print(
        f"sweep: {folder / 'sweep.json'}, logs: {folder / 'jobs'}/NUMBER/log.txt",
        highlight=False,
        soft_wrap=True,
    )
    _write_report(folder, jobs, config)
    failed = sum(job.status == "failed" for job in jobs)
    if failed:
        raise UserError(
            f"{failed} of {len(jobs)} jobs failed; run the same command again to redo only those"
        )


def sweep_table(jobs: Sequence[Job]) -> Table:
    """One row for each job: state, figures, and where its result is or why it has none."""
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    shown = figures[: COLUMNS if console.width >= WIDE else NARROW_COLUMNS]
    table = Table(
        title="Sweep",
        title_justify="left",
        caption=_left_out(len(figures) - len(shown)),
        caption_justify="left",
    )
    for name in ("job", "state", *shown, "result in"):
        table.add_column(
            name,
            justify="left" if name in ("job", "state", "result in") else "right",
            overflow="fold",
        )
    for job in jobs:
        cells = [_cell(job.figures.get(name)) for name in shown]
        result = str(job.folder or "") if job.status in FINISHED else job.error
        table.add_row(escape(job.name), job_label(job), *cells, escape(result))
    return table


def _planned(
    command: str, overrides: Sequence[str], number: int, varying: Sequence[str]
) -> tuple[Job, Config]:
    config = to_config(
        compose(command, list(overrides))
    )  # Hydra is set up: this is called by its sweeper
    group = [
        f"logger.{name}.group={_group(varying)}"
        for name, logger in config.loggers.items()
        if logger.get("group", "") is None
    ]
    settings = asdict(config) | {"logger": None}  # it changes nothing
    job = Job(
        varying_name(overrides, varying),
        (*overrides, *group),
        number=number,
        key=hash_json([command, settings]),
    )
    return job, config


def _group(varying: Sequence[str]) -> str:
    return "sweep-" + "-".join(re.sub(r"\W", "_", key.lstrip("+")) for key in sorted(varying))


def _write_report(folder: Path, jobs: Sequence[Job], config: DictConfig) -> None:
    from ipt.report.sweep_report import write_sweep_report

    with open_dict(config):
        recipe = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    report = write_sweep_report(folder, list(jobs), OmegaConf.to_yaml(recipe))
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _left_out(more: int) -> str | None:
    return f"{more} more figures in sweep.json" if more > 0 else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")
