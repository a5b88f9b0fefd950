"""Reports of finished runs: `python -m ipt report FOLDER...`, and that of a sweep at its end."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ipt.cli import exit_on_user_error
from ipt.console import console
from ipt.errors import UserError
from ipt.files import read_json
from ipt.pipeline.provenance import Record, read_record
from ipt.places import check_writable
from ipt.report.scores import Arm
from ipt.stage import MANIFEST, git_commit, hardware, installed_versions
from ipt.sweeps.job import (
    FINISHED,
    SEEDS,
    Job,
    assignments,
    job_folder,
    job_values,
    load_job,
    varying_keys,
)

RESULTS, STEPS, EVALUATION = "results.json", "metrics.jsonl", "evaluation"
RATIOS = "mixture.ratios."
ALL_JOBS = "all jobs"  # name of the arm where jobs differ in their seeds alone


# The command
# ----------------------------------------------------------------------------------------------


def main() -> None:
    """Read the command line and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m ipt report", description="Write one report of finished runs."
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a training run, an evaluation, the output of a recipe, or a sweep",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/report"),
        help="folder of the report (default: %(default)s)",
    )
    parser.add_argument("--title", default="Report of finished runs", help="title of the page")
    arguments = parser.parse_args()
    with exit_on_user_error():
        print(f"report: {report_folders(arguments.folders, arguments.output, arguments.title)}")


def report_folders(folders: Sequence[Path], output: Path, title: str) -> Path:
    """Write a report of the runs in these folders to `output` and return the page.

    A folder is a training run, an evaluation, the output of `reproduce`, or a sweep. The scores of
    a training run are in its `evaluation` folder, or in the newest evaluation of its model in the
    same parent folder. Raises UserError for any other folder, and for a training run without
    scores.
    """
    from ipt.report.html import write_report

    check_writable("--output", output)
    arms: dict[Path, Arm] = {}
    jobs: list[Job] = []
    records: list[Record] = []
    for folder in folders:
        jobs += _jobs(folder)
        records += _records(folder)
        for arm in _arms(folder):
            arms.setdefault(arm.evaluation.resolve(), arm)  # two folders may share an evaluation
    named = _with_unique_names(list(arms.values()))
    command = ["python", "-m", "ipt", "report", *map(str, folders), "--output", str(output)]
    write_report(
        output,
        title=title,
        config_yaml="".join(f"# {folder}\n" for folder in folders),
        arms=named,
        pairs=None,
        texts=None,
        stages=[],
        quality={},
        facts={
            "runs": len(named),
            "hardware of the report": f"{hardware()['cpus']} CPU cores",
            "command": shlex.join(command),
            "versions": installed_versions(),
        },
        records=records,
        jobs=jobs,
    )
    models = len({arm.name for arm in named})
    console.print(f"[dim]{len(named)} runs of {models} models")
    return output / "report.html"


def _arms(folder: Path) -> list[Arm]:
    if (folder / "arms").is_dir():
        return [arm for place in sorted((folder / "arms").iterdir()) for arm in _recipe_arms(place)]
    jobs = _jobs(folder)
    if jobs:
        return job_arms(jobs)
    if (folder / STEPS).exists():
        return [Arm(folder.name, folder, _evaluation_of(folder), _seed_of(folder))]
    if (folder / RESULTS).exists():
        return [Arm(folder.name, None, folder)]
    raise UserError(
        f"{folder} has no training run ({STEPS}), evaluation ({RESULTS}), recipe (arms) or sweep "
        "(sweep.json): name another folder"
    )


def _recipe_arms(place: Path) -> Iterator[Arm]:
    """The evaluated seeds of an arm in the output of `reproduce`."""
    for member in [place, *sorted(place.glob("seed-*"))]:
        training, evaluation = member / "training", member / EVALUATION
        if (evaluation / RESULTS).exists():
            trained = training.resolve() if training.exists() else None
            seed = 0 if member == place else _seed_in_name(member)
            yield Arm(place.name, trained, evaluation.resolve(), seed)


def _seed_in_name(folder: Path) -> int:
    seed = folder.name.removeprefix("seed-")
    if not seed.isdecimal():
        raise UserError(f"{folder}: expected seed-NUMBER: rename the folder, or move it away")
    return int(seed)


def _jobs(folder: Path) -> list[Job]:
    if not (folder / "sweep.json").exists():
        return []
    jobs = []
    for entry in read_json(folder / "sweep.json")["jobs"]:
        number = entry["number"]
        job = load_job(folder, number)
        if job is not None and job_folder(folder, number).is_dir():
            jobs.append(job)
    return jobs


def _records(folder: Path) -> Iterator[Record]:
    for place in sorted((folder / "arms").glob("**/record.json")):
        with suppress(KeyError, TypeError):  # written by another version
            yield read_record(place.parent)


def _evaluation_of(training: Path) -> Path:
    """The evaluation below a training run, or the newest one next to it that has its model as
    input.
    """
    if (training / EVALUATION / RESULTS).exists():
        return training / EVALUATION
    own = training / MANIFEST
    digest = read_json(own)["digest"] if own.exists() else None
    found = {}
    for path in training.parent.glob(f"{EVALUATION}-*/{MANIFEST}"):
        manifest = read_json(path)
        if digest and manifest["inputs"].get("model") == digest:
            found[manifest["finished"]] = path.parent
    if not found:
        raise UserError(
            f"{training} has no scores, neither in {EVALUATION} nor in an evaluation stage in the "
            "same folder: evaluate its export first"
        )
    return found[max(found)]


def _seed_of(training: Path) -> int:
    path = training / MANIFEST
    if not path.exists():
        return 0
    manifest = read_json(path)
    seed = manifest["config"].get("trainer", {}).get("seed")
    return int(manifest["seed"] if seed is None else seed)


def _with_unique_names(arms: Sequence[Arm]) -> list[Arm]:
    """Number arms of the same name and seed, which are different runs of several folders."""
    counts = Counter((arm.name, arm.seed) for arm in arms)
    seen: Counter[tuple[str, int]] = Counter()
    named = []
    for arm in arms:
        key = (arm.name, arm.seed)
        seen[key] += 1
        named.append(arm if counts[key] == 1 else replace(arm, name=f"{arm.name} {seen[key]}"))
    return named


# Sweeps
# ----------------------------------------------------------------------------------------------


def write_sweep_report(output: Path, jobs: Sequence[Job], config_yaml: str) -> Path | None:
    """Write the report of a sweep to `output` and return the page; None if no job has scores.

    Finished jobs with scores are arms, named by their values of the keys that vary. Jobs that
    differ only in the seed are seeds of one arm. The table of jobs also has those that failed or
    were stopped. If a mixture ratio varies, a mixing law is fitted.
    """
    from ipt.report.html import write_report

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
        facts=_sweep_facts(jobs, keys),
        jobs=jobs,
        over_ratios=any(key.startswith(RATIOS) for key in keys),
    )
    return output / "report.html"


def job_arms(jobs: Sequence[Job]) -> list[Arm]:
    """Finished jobs with scores as arms. Of jobs with the same overrides only the first counts."""
    keys = [key for key in varying_keys(jobs) if key not in SEEDS]
    arms: dict[tuple[str, int], Arm] = {}
    for job in jobs:
        if job.status in FINISHED and job.evaluation is not None:
            values = job_values(job, keys)
            name = " ".join(f"{key}={value}" for key, value in values.items() if value)
            arm = Arm(name or ALL_JOBS, job.training, job.evaluation, _seed(job))
            arms.setdefault((arm.name, arm.seed), arm)
    return list(arms.values())


def _seed(job: Job) -> int:
    given = assignments(job.overrides)
    seed = next((given[key] for key in SEEDS if key in given), "0")
    return int(seed) if seed.isdecimal() else 0


def _sweep_facts(jobs: Sequence[Job], keys: Sequence[str]) -> dict[str, Any]:
    machine = hardware()
    statuses = Counter(job.status for job in jobs)
    cores = f"{machine['cpus']} CPU cores ({machine['machine']})"
    return {
        "jobs": ", ".join(f"{count} {status}" for status, count in statuses.items()),
        "varying keys": ", ".join(keys) or "none",
        "hardware": ", ".join(machine["gpus"]) or cores,
        "git commit": git_commit(),
        "command": _command(),
        "versions": installed_versions(),
    }


def _command() -> str:
    program = sys.argv[0]
    if program.startswith("ipt "):
        return f"python -m {shlex.join([*program.split(), *sys.argv[1:]])}"
    return shlex.join(["python", Path(program).name, *sys.argv[1:]])
