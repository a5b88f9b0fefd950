"""The report of a sweep: its jobs, those that could be scored as arms, and where they differ in a
ratio, which one is best.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ipt.report.html import write_report
from ipt.report.scores import Arm
from ipt.stage import git_commit, hardware, installed_versions
from ipt.sweeps.job import FINISHED, Job

SEEDS = ("trainer.seed", "seed")
RATIOS = "mixture.ratios."


def write_sweep_report(output: Path, jobs: list[Job], config_yaml: str) -> Path | None:
    """Write `report.html`, `results.csv` and `figures/` to `output` and return the page; None if no
    job has scores.

    Finished jobs that have an evaluation are arms, called by what varies; those that differ in the
    seed alone are seeds of one arm. Jobs that failed or were stopped are named in the table of
    jobs. Where a ratio varies, its law is fitted (ipt/report/ratio.py).
    """
    arms = job_arms(jobs)
    if not arms:
        return None
    config = OmegaConf.to_container(OmegaConf.create(config_yaml))
    assert isinstance(config, dict)
    keys = varying_keys(jobs)
    write_report(
        output,
        title=f"Sweep of {config.get('title') or config.get('name') or output.name}",
        config_yaml=config_yaml,
        arms=arms,
        pairs=None,
        texts=None,
        stages=[],
        quality={},
        facts=_facts(jobs, keys),
        jobs=jobs,
        over_ratios=any(key.startswith(RATIOS) for key in keys),
    )
    return output / "report.html"


def job_arms(jobs: Sequence[Job]) -> list[Arm]:
    """Finished jobs with scores as arms, in the order of the jobs; of jobs that are the same but
    for their numbers, the first.
    """
    labels = {job.number: label for job, label in zip(jobs, _labels(jobs), strict=True)}
    arms: dict[tuple[str, int], Arm] = {}
    for job in jobs:
        if job.status in FINISHED and job.evaluation is not None:
            arm = Arm(labels[job.number], job.training, job.evaluation, _seed(job))
            arms.setdefault((arm.name, arm.seed), arm)
    return list(arms.values())


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """The keys that have more than one value over the jobs."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in _assignments(job).items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _labels(jobs: Sequence[Job]) -> list[str]:
    """What varies in each job, seeds apart, by the shortest names that tell the keys apart:
    `instruction=0.5 lr=1e-3`.
    """
    keys = [key for key in varying_keys(jobs) if key not in SEEDS]
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in keys}
    return [
        " ".join(
            f"{short[key]}={value}" for key, value in _assignments(job).items() if key in short
        )
        or "all jobs"
        for job in jobs
    ]


def _assignments(job: Job) -> dict[str, str]:
    """Key -> value of the job's overrides; the W&B group is of no matter."""
    pairs = (override.lstrip("+").partition("=") for override in job.overrides)
    return {
        key: value
        for key, _, value in pairs
        if not key.startswith(("logger", "output_dir", "hydra"))
    }


def _seed(job: Job) -> int:
    given = _assignments(job)
    value = next((given[key] for key in SEEDS if key in given), "0")
    return int(value) if value.isdigit() else 0


def _facts(jobs: Sequence[Job], keys: Sequence[str]) -> dict[str, Any]:
    machine = hardware()
    states = Counter(job.status for job in jobs)
    return {
        "jobs": ", ".join(f"{count} {state}" for state, count in states.items()),
        "varied": ", ".join(keys) or "nothing",
        "hardware": ", ".join(machine["gpus"])
        or f"{machine['cpus']} CPU cores ({machine['machine']})",
        "git commit": git_commit(),
        "command": _command(),
        "versions": installed_versions(),
    }


def _command() -> str:
    program = sys.argv[0]
    start = (
        f"python -m {program}"
        if program.startswith("ipt ")
        else shlex.join(["python", Path(program).name])
    )
    return f"{start} {shlex.join(sys.argv[1:])}".strip()
