"""Runs benchmarks one after another, keeps what each has found, and makes one page of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.results import Comparison, markdown_table, read_report
from ipt.files import write_json
from ipt.stage import git_commit, hardware, installed_versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.md"
QUIET = 0.5  # load average up to which nothing else is at work
HOW_TO_READ = (
    "Figures are medians over passes, in brackets the least and the most. Sides take turns, and "
    "`ipt is better by` is the median ratio of "
    "neighbouring passes: above 1x ipt is better, whatever the unit."
)

Record = dict[str, Any]  # of one benchmark: as `measure` makes it, and as it lies in the folder


@dataclass(frozen=True)
class Benchmark:
    """A script that understands --json."""

    name: str
    script: Path
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        script = self.script.relative_to(ROOT) if self.script.is_relative_to(ROOT) else self.script
        return " ".join(["python", str(script), *self.options])


def run_all(
    benchmarks: Sequence[Benchmark], folder: Path, only: Collection[str] = (), again: bool = False
) -> bool:
    """Run those named in `only`, or all, and write the page after each. Gives whether all of these
    have figures.

    What finished before with the same command is kept unless `again`; the page has all benchmarks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console, load = Console(), os.getloadavg()[0]
    if load > QUIET:
        console.print(
            f"[yellow]load average {load:.2f}: something else is at work, so timings mean little"
        )
    chosen = [benchmark for benchmark in benchmarks if not only or benchmark.name in only]
    for benchmark in chosen:
        record = read_record(folder, benchmark)
        if record and record["finished"] and record["command"] == benchmark.command and not again:
            console.print(f"{benchmark.name}: finished before, kept (--again runs it again)")
            continue
        console.print(
            f"{benchmark.name}: {benchmark.command}, see {log_path(folder, benchmark)}",
            soft_wrap=True,
        )
        record = measure(benchmark, folder, load)
        write_json(folder / f"{benchmark.name}.json", record)
        write_page(benchmarks, folder)
        console.print(
            f"{benchmark.name}: {outcome(record)}, {record['seconds']:.0f} s", soft_wrap=True
        )
    write_page(benchmarks, folder)
    console.print(f"{folder / RESULTS} is written", soft_wrap=True)
    return all(
        record and record["finished"]
        for record in (read_record(folder, benchmark) for benchmark in chosen)
    )


def measure(benchmark: Benchmark, folder: Path, load: float) -> Record:
    """Run a benchmark as a process of its own. Its output goes to a log in the folder."""
    report, log = folder / f".{benchmark.name}.report", log_path(folder, benchmark)
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    started, clock = datetime.now(UTC), time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        command = [
            sys.executable,
            str(benchmark.script),
            *benchmark.options,
            "--json",
            str(report.absolute()),
        ]
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    finished = code == 0 and report.exists()
    record = {
        "benchmark": benchmark.name,
        "command": benchmark.command,
        "finished": finished,
        "reason": "" if finished else failure(code, log),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "load": round(load, 2),
        "commit": git_commit() or "unknown",
        "machine": machine(),
        "versions": ", ".join(
            f"{package} {version}" for package, version in installed_versions().items()
        ),
        "comparisons": [asdict(comparison) for comparison in read_report(report)]
        if finished
        else [],
    }
    report.unlink(missing_ok=True)
    return record


def read_record(folder: Path, benchmark: Benchmark) -> Record | None:
    path = folder / f"{benchmark.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def log_path(folder: Path, benchmark: Benchmark) -> Path:
    return folder / f"{benchmark.name}.log"


def failure(code: int, log: Path) -> str:
    if code == 0:
        return "it ended without figures"
    lines = [
        line.strip()
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines()
        if line.strip()
    ]
    return f"failed with code {code}: {lines[-1][:300] if lines else 'it said nothing'}"


def outcome(record: Record) -> str:
    return "finished" if record["finished"] else record["reason"]


def machine() -> str:
    """What figures depend on, in words."""
    import torch

    facts = hardware()
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    gpus = ", ".join(facts["gpus"]) or "no NVIDIA GPU"
    return (
        f"{models[0] if models else facts['machine']}, {facts['cpus']} cores, {memory}, {gpus}, "
        f"{torch.get_num_threads()} torch threads"
    )


# The page
# ----------------------------------------------------------------------------------------------


def write_page(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """results.md and results.json from the records in the folder."""
    found = {benchmark.name: read_record(folder, benchmark) for benchmark in benchmarks}
    records = [record for record in found.values() if record]
    write_json(folder / "results.json", records)
    rows = [
        {"benchmark": name, **comparison.cells}
        for name, record in found.items()
        for comparison in comparisons_of(record)
    ]
    rows.append({"benchmark": "gpu", **gpu_part().cells})
    lines = [
        "# Benchmarks",
        "",
        *facts(records),
        "",
        HOW_TO_READ,
        "",
        *markdown_table(rows),
        "",
        "## Runs",
        "",
    ]
    (folder / RESULTS).write_text(
        "\n".join([*lines, *markdown_table([run_cells(record) for record in records])]) + "\n",
        encoding="utf-8",
    )


def comparisons_of(record: Record | None) -> list[Comparison]:
    """Those of a record; where it has none, one that says why."""
    if record is None:
        return [Comparison("all", missing="not run yet")]
    if not record["finished"]:
        return [Comparison("all", missing=record["reason"])]
    return [Comparison(**fields) for fields in record["comparisons"]]


def gpu_part() -> Comparison:
    here = "" if hardware()["gpus"] else "there is no NVIDIA GPU here; "
    return Comparison(
        "all", missing=f"{here}benchmarks/gpu/run.sh measures it, on a page of its own"
    )


def facts(records: Sequence[Record]) -> Iterator[str]:
    """The machine, versions and commit of all records; where they differ, of which benchmarks they
    are.
    """
    for key in ("machine", "versions", "commit"):
        names: dict[str, list[str]] = {}
        for record in records:
            names.setdefault(record[key], []).append(record["benchmark"])
        for value, those in names.items():
            of = f" ({', '.join(those)})" if len(names) > 1 else ""
            yield f"- {key}{of}: {value}"
    disturbed = [record["benchmark"] for record in records if record["load"] > QUIET]
    if disturbed:
        yield (
            f"- **Something else was at work** (load average above {QUIET} at the start), so "
            f"timings mean little: {', '.join(disturbed)}"
        )


def run_cells(record: Record) -> dict[str, Any]:
    names = {
        "benchmark": record["benchmark"],
        "command": f"`{record['command']}`",
        "started": record["started"],
    }
    return {
        **names,
        "seconds": record["seconds"],
        "load at the start": record["load"],
        "outcome": outcome(record),
    }
