"""`python -m ipt report FOLDER...`: a report from finished runs, made by hand."""

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ipt.cli import exit_on_user_error
from ipt.console import console
from ipt.errors import UserError
from ipt.files import read_json
from ipt.pipeline.provenance import Record, read_record
from ipt.places import check_writable
from ipt.report.scores import Arm
from ipt.report.sweep_report import job_arms
from ipt.stage import MANIFEST, hardware, installed_versions
from ipt.sweeps.job import Job, job_folder, load_job

RESULTS, STEPS, EVALUATION = "results.json", "metrics.jsonl", "evaluation"


def main() -> None:
    """Read the command line and write the report; a user's mistake is one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ipt report", description="Write one report from finished runs."
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="training, evaluation, run of a recipe, or sweep",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/report"),
        help="where to write it (default: %(default)s)",
    )
    parser.add_argument("--title", default="Report of finished runs", help="heading of the page")
    arguments = parser.parse_args()
    with exit_on_user_error():
        print(f"report: {report_folders(arguments.folders, arguments.output, arguments.title)}")


def report_folders(folders: list[Path], output: Path, title: str) -> Path:
    """Write a report of what the folders hold to `output` and return the page.

    A folder is a training (its scores are looked for in its `evaluation`, and beside it among
    evaluations of its model), an evaluation, what `reproduce` has written, or a sweep's folder.
    Raises UserError for a folder that holds none of these, and for a training without scores.
    """
    from ipt.report.html import write_report

    check_writable("--output", output)
    found = [arm for folder in folders for arm in _arms(folder)]
    arms = list({arm.evaluation.resolve(): arm for arm in reversed(found)}.values())[
        ::-1
    ]  # what two folders lead to stands once
    jobs = [job for folder in folders for job in _jobs(folder)]
    write_report(
        output,
        title=title,
        config_yaml="".join(f"# {folder}\n" for folder in folders),
        arms=_named_apart(arms),
        pairs=None,
        texts=None,
        stages=[],
        quality={},
        facts={
            "runs": len(arms),
            "hardware of the report": f"{hardware()['cpus']} CPU cores",
            "command": shlex.join(
                ["python", "-m", "ipt", "report", *map(str, folders), "--output", str(output)]
            ),
            "versions": installed_versions(),
        },
        records=[record for folder in folders for record in _records(folder)],
        jobs=jobs,
    )
    console.print(f"[dim]{len(arms)} runs of {len({arm.name for arm in arms})} arms")
    return output / "report.html"


def _arms(folder: Path) -> list[Arm]:
    if (folder / "arms").is_dir():
        return [arm for place in sorted((folder / "arms").iterdir()) for arm in _recipe_arms(place)]
    if jobs := _jobs(folder):
        return job_arms(jobs)
    if (folder / STEPS).exists():
        return [Arm(folder.name, folder, _evaluation_of(folder), _seed_of(folder))]
    if (folder / RESULTS).exists():
        return [Arm(folder.name, None, folder)]
    raise UserError(
        f"{folder} holds no training ({STEPS}), evaluation ({RESULTS}), recipe (arms) or sweep "
        "(sweep.json): name another folder"
    )


def _recipe_arms(place: Path) -> Iterator[Arm]:
    """The arm in a folder of `reproduce`, or one for each of its seeds; an arm without scores is
    left out.
    """
    for member in [place, *sorted(place.glob("seed-*"))]:
        training, evaluation = member / "training", member / EVALUATION
        if (evaluation / RESULTS).exists():
            seed = 0 if member == place else _seed_in_name(member)
            yield Arm(
                place.name,
                training.resolve() if training.exists() else None,
                evaluation.resolve(),
                seed,
            )


def _seed_in_name(folder: Path) -> int:
    seed = folder.name.removeprefix("seed-")
    if not seed.isdecimal():
        raise UserError(f"{folder}: expected seed-NUMBER: rename the folder, or move it away")
    return int(seed)


def _jobs(folder: Path) -> list[Job]:
    if not (folder / "sweep.json").exists():
        return []
    numbers = [job["number"] for job in read_json(folder / "sweep.json")["jobs"]]
    return [
        job
        for number in numbers
        if (job := load_job(folder, number)) is not None and job_folder(folder, number).is_dir()
    ]


def _records(folder: Path) -> Iterator[Record]:
    for place in sorted((folder / "arms").glob("**/record.json")):
        with suppress(KeyError, TypeError):  # of another version
            yield read_record(place.parent)


def _evaluation_of(training: Path) -> Path:
    """The scores of a training: below it, or among the stages beside it that has its model as
    input, the newest.
    """
    if (training / EVALUATION / RESULTS).exists():
        return training / EVALUATION
    digest = read_json(training / MANIFEST)["digest"] if (training / MANIFEST).exists() else None
    manifests = {
        path.parent: read_json(path) for path in training.parent.glob(f"{EVALUATION}-*/{MANIFEST}")
    }
    scored = [
        folder
        for folder, manifest in manifests.items()
        if digest and manifest["inputs"].get("model") == digest
    ]
    if not scored:
        raise UserError(
            f"{training} has no scores, neither in {EVALUATION} nor beside it: evaluate its export "
            "first"
        )
    return max(scored, key=lambda folder: manifests[folder]["finished"])


def _seed_of(training: Path) -> int:
    path = training / MANIFEST
    if not path.exists():
        return 0
    manifest = read_json(path)
    given = manifest["config"].get("trainer", {}).get("seed")
    return int(manifest["seed"] if given is None else given)


def _named_apart(arms: list[Arm]) -> list[Arm]:
    """Arms of one name and seed from several folders get numbers: they are not the same run."""
    counts = Counter((arm.name, arm.seed) for arm in arms)
    seen: Counter[tuple[str, int]] = Counter()
    named = []
    for arm in arms:
        same = (arm.name, arm.seed)
        seen[same] += 1
        named.append(arm if counts[same] == 1 else replace(arm, name=f"{arm.name} {seen[same]}"))
    return named
