"""A sweep as a whole: its folder, the plan of its jobs, and its table and report at the end."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import wrap
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
from ipt.report.formatting import spaced, task_label
from ipt.report.measures import MEASURES
from ipt.sweeps.job import Job, job_values, load_job, save_job, varying_keys, varying_name

AUTO = "auto"  # hydra.sweep.dir: outputs/sweeps/NAME-KEY
COLUMNS = 6  # figures in the table at most; sweep.json has all
HEADING = 14  # characters of a line in the heading of a figure
UNLIMITED = 10_000  # characters


def name_sweep(config: DictConfig) -> Path:
    """The folder of a sweep, by default outputs/sweeps/NAME-KEY.

    KEY is a hash of the command without its `hydra` keys, so the same command has the same folder.
    `config` is the whole config of the sweep; the folder is written into it for launchers. Raises
    UserError for a dry run.
    """
    if config.dry_run:
        raise UserError("dry_run=true describes one run: leave out -m, and give each key one value")
    if config.hydra.sweep.dir == AUTO:
        params = config.hydra.sweeper.get("params")
        parts = [
            config.hydra.job.config_name,
            sorted(config.hydra.overrides.task),
            OmegaConf.to_container(params) if OmegaConf.is_config(params) else params,
        ]
        folder = f"outputs/sweeps/{config.name}-{hash_json(parts)[:12]}"
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = folder
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
    return Path(config.hydra.sweep.dir)


@contextmanager
def open_sweep(folder: Path) -> Iterator[None]:
    """Lock the sweep's folder. Raises UserError if another process runs the sweep."""
    check_writable("hydra.sweep.dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"this sweep is already running in another process, which holds {folder / '.lock'}: "
            "wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def plan_jobs(
    command: str, folder: Path, batch: Sequence[Sequence[str]], first: int, varying: Sequence[str]
) -> list[int]:
    """Write a job for each list of overrides in `batch`, numbered from `first`; return the numbers.

    A job that an earlier run of the sweep wrote for the same config keeps its result. Jobs share a
    W&B group. Raises UserError if two jobs would write to the same folder.
    """
    jobs = []
    outputs: Counter[str] = Counter()
    for number, overrides in enumerate(batch, first):
        job, config = _planned(command, overrides, number, varying)
        jobs.append(job)
        if config.output_dir or command == "reproduce":
            outputs[config.output_dir or f"outputs/{config.name}"] += 1
    for output, count in outputs.items():
        if count > 1:
            key = varying[0] if varying else "seed"
            raise UserError(
                f"output_dir={output} is the same for several jobs: give each its own, as "
                f"output_dir='{output}/${{{key}}}'"
            )
    for job in jobs:
        known = load_job(folder, job.number)
        if known is not None and known.key == job.key:
            job = replace(known, name=job.name, overrides=job.overrides)
        save_job(folder, job)
    return [job.number for job in jobs]


def close_sweep(
    folder: Path, numbers: Sequence[int], config: DictConfig, summary: str = ""
) -> None:
    """Write sweep.json and the report of a sweep, and print its table, followed by `summary`.

    Raises UserError if a job has failed, so that the exit code is 1.
    """
    found = [load_job(folder, number) for number in numbers]
    jobs = [job for job in found if job is not None]
    write_json(
        folder / "sweep.json", {"folder": str(folder), "jobs": [asdict(job) for job in jobs]}
    )
    if not jobs:
        return
    console.print(sweep_table(jobs))
    if summary:
        console.print(summary, highlight=False)
    failed = [job for job in jobs if job.status == "failed"]
    lines = [f"job {job.number} failed: {escape(job.error)}" for job in failed]
    lines.append(f"sweep: {folder / 'sweep.json'}, logs: {folder / 'jobs'}/NUMBER/log.txt")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    _write_report(folder, jobs, config)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed; run the same command again to rerun only "
            "those"
        )


def sweep_table(jobs: Sequence[Job]) -> Table:
    """One row per job: its values of the keys that vary, its status and its figures.

    Figures that are the same in all jobs, or that do not fit the width of the console, are left out
    and counted below the table. The folder of the result is shown if there is space for it.
    """
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    shown = [name for name in figures if len(jobs) == 1 or _varies(name, jobs)][:COLUMNS]
    has_folders = True
    table = _table(jobs, shown, len(figures) - len(shown), has_folders)
    while (has_folders or shown) and _width(table) > console.width:
        if has_folders:
            has_folders = False
        else:
            shown.pop()
        table = _table(jobs, shown, len(figures) - len(shown), has_folders)
    return table


def _table(jobs: Sequence[Job], figures: Sequence[str], left_out: int, has_folders: bool) -> Table:
    caption = f"{left_out} more figures in sweep.json" if left_out else None
    table = Table(title="Sweep", title_justify="left", caption=caption, caption_justify="left")
    keys = varying_keys(jobs)
    table.add_column("job", justify="right", no_wrap=True)
    for name in job_values(jobs[0], keys):
        table.add_column(name, overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in figures:
        table.add_column(_heading(name), justify="right", no_wrap=True)
    if has_folders:
        table.add_column("result", no_wrap=True)
    for job in jobs:
        cells = [str(job.number), *job_values(job, keys).values(), job.status]
        for name in figures:
            cells.append(_cell(job.figures.get(name)))
        if has_folders:
            cells.append(str(job.folder or ""))
        table.add_row(*map(escape, cells))
    return table


def _varies(figure: str, jobs: Sequence[Job]) -> bool:
    return len({job.figures[figure] for job in jobs if figure in job.figures}) > 1


def _width(table: Table) -> int:
    """The width at which nothing is wrapped."""
    return console.measure(table, options=console.options.update(width=UNLIMITED)).maximum


def _heading(figure: str) -> str:
    """The name of a figure in short lines: the task, then the short name of the metric."""
    task, _, metric = figure.rpartition(" ")
    if metric in MEASURES:
        measure = MEASURES[metric]
        return "\n".join([*wrap(task_label(task), HEADING), measure.short or measure.label])
    return "\n".join(wrap(spaced(figure), HEADING))


def _planned(
    command: str, overrides: Sequence[str], number: int, varying: Sequence[str]
) -> tuple[Job, Config]:
    """The job, and its config; called by a sweeper, for which Hydra is set up."""
    config = to_config(compose(command, list(overrides)))
    group = [
        f"logger.{name}.group={_group(varying)}"
        for name, logger in config.loggers.items()
        if logger.get("group", "") is None
    ]
    settings = asdict(config) | {"logger": None}  # the logger does not change the result
    job = Job(
        varying_name(overrides, varying),
        (*overrides, *group),
        number=number,
        key=hash_json([command, settings]),
    )
    return job, config


def _group(varying: Sequence[str]) -> str:
    keys = [re.sub(r"\W", "_", key.lstrip("+")) for key in sorted(varying)]
    return f"sweep-{'-'.join(keys)}"


def _write_report(folder: Path, jobs: Sequence[Job], config: DictConfig) -> None:
    from ipt.report.cli import write_sweep_report

    with open_dict(config):
        recipe = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    report = write_sweep_report(folder, jobs, OmegaConf.to_yaml(recipe))
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")
