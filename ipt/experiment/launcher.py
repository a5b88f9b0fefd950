"""Sweeps: each job of a Hydra multirun is a process of its own, and one table at the end shows them all."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

RESULT_FILE = "IPT_RESULT_FILE"  # a job writes what it did to the file that this environment variable names


def run_sweep(command: str, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Run `python -m ipt <command> <overrides>` for each job, one after another, and print one table of what came out.

    A job recognises what is finished by its key, so the same sweep run again does only what is missing. A failed job does
    not stop the others; the sweep then ends with a ValueError. Runs of a sweep share a W&B group.
    """
    group = [] if _has_group(job_overrides) else [f"logger.group={_sweep_name(job_overrides)}"]
    results = [_run_job(command, [*overrides, *group]) for overrides in job_overrides]
    _print_table(job_overrides, results)
    failed = sum(result is None for result in results)
    if failed:
        raise ValueError(f"{failed} of {len(results)} jobs failed; run the same command again to redo only those")
    return [_job_return(overrides, result) for overrides, result in zip(job_overrides, results, strict=True)]


def report_result(folder: Path, figures: dict[str, Any]) -> None:
    """Called by a job at its end: tell the sweep it belongs to, if any, what came out."""
    if RESULT_FILE in os.environ:
        Path(os.environ[RESULT_FILE]).write_text(json.dumps({"folder": str(folder), **figures}))


def _run_job(command: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Figures that the job reported, or None if it failed. Success is what the job says, not its exit code alone."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        start = [sys.executable, *_processes(command, overrides), "-m", "ipt", command, *overrides]
        process = subprocess.run(start, env={**os.environ, RESULT_FILE: str(result)}, check=False)
        if process.returncode or not result.exists():
            return None
        return json.loads(result.read_text())


def _processes(command: str, overrides: Sequence[str]) -> list[str]:
    """What starts a job's processes: torchrun where its config wants more than one. A config that is wrong is told by the job itself."""
    try:
        trainer = compose(command, list(overrides)).trainer  # Hydra is set up: this is its launcher
    except (HydraException, OmegaConfBaseException):
        return []
    if command != "train" or trainer.devices * trainer.num_nodes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={trainer.devices}"]


def _has_group(job_overrides: Sequence[Sequence[str]]) -> bool:
    return any(override.startswith("logger.group=") for override in job_overrides[0])


def _sweep_name(job_overrides: Sequence[Sequence[str]]) -> str:
    names = sorted({override.split("=")[0].lstrip("+") for overrides in job_overrides for override in _varying(overrides, job_overrides)})
    return "sweep-" + "-".join(name.replace(".", "_") for name in names)


def _varying(overrides: Sequence[str], job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """The overrides in which a job differs from the others."""
    common = set(job_overrides[0]).intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
    return [override for override in overrides if override not in common]


def _print_table(job_overrides: Sequence[Sequence[str]], results: Sequence[dict[str, Any] | None]) -> None:
    from rich.table import Table

    from ipt.console import console

    columns = list(dict.fromkeys(name for result in results if result for name in result if name != "folder"))
    table = Table(title="Sweep", title_justify="left")
    for name in ("job", *columns, "result in"):
        table.add_column(name, justify="left" if name in ("job", "result in") else "right", overflow="fold")
    for overrides, result in zip(job_overrides, results, strict=True):
        cells = ["failed", *[""] * len(columns)] if result is None else [*(_cell(result.get(name)) for name in columns), result["folder"]]
        table.add_row(" ".join(_varying(overrides, job_overrides)), *cells)
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")


def _job_return(overrides: Sequence[str], result: dict[str, Any] | None) -> JobReturn:
    job = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    job.return_value = result
    return job
