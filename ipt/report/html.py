"""The report of a run: a page that opens from disk without a server, its figures as PNG files, and
all scores as CSV.
"""

import base64
import csv
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow.parquet as pq

from ipt.files import atomic, hash_json, read_parts
from ipt.pipeline.provenance import Record
from ipt.report import formatting
from ipt.report.findings import MainRow, comparisons, lead, main_table, reading_notes
from ipt.report.formatting import duration, finite, scientific, thousands
from ipt.report.mixing_law import ratio_study
from ipt.report.paper_cells import paper_table
from ipt.report.plot_style import PALETTE
from ipt.report.plots import draw_figures
from ipt.report.quality import quality_table
from ipt.report.scores import (
    Arm,
    Run,
    Score,
    all_scores,
    baseline_of,
    column,
    compared_runs,
    load_runs,
    main_scores,
    median,
)
from ipt.sweeps.job import Job, job_values, varying_keys
from ipt.synthesis.quality.statistics import examples

SHOWN_DOCUMENTS, SHOWN_TEXTS = 4, 2
# Characters of a text that are visible, and that are folded below them at most.
SHOWN_CHARACTERS, FOLDED_CHARACTERS = 1200, 20_000
JOB_FIGURES = 6  # per job in the table; sweep.json has all
# Only the first rows are sampled, so that a large corpus does not slow the report down.
SAMPLED_ROWS = 50_000


def write_report(
    output: Path,
    *,
    title: str,
    config_yaml: str,
    arms: list[Arm],
    pairs: Path | None,
    texts: Path | None,
    stages: list[dict[str, Any]],
    quality: dict[str, Any],
    facts: dict[str, Any],
    records: Sequence[Record] = (),
    jobs: Sequence[Job] = (),
    over_ratios: bool = False,
) -> dict[str, Any]:
    """Write `report.html`, `results.csv` and `figures/*.png` to `output`.

    - `pairs`, `texts`: folders of the synthesis and rendering stages; None: not shown.
    - `stages`: a `{"name", "folder", "seconds", "reused", "stats"}` per stage, all optional.
    - `facts`: name -> value for the head and the foot of the page.
    - `over_ratios`: the arms are a sweep over a mixture ratio.

    Returns counts for the stage's statistics. Raises what `load_runs` raises.
    """
    runs = load_runs(arms)
    baseline = baseline_of(runs)
    unpaired: list[str] = []
    scores = all_scores(runs, baseline, unpaired)
    study = ratio_study(runs, scores, over_ratios)
    figures = draw_figures(runs, scores, stages, quality, study)
    page = _results(runs, scores, baseline) | {
        "title": title,
        "facts": facts,
        "palette": PALETTE,
        "unpaired": unpaired,
        "study": study,
        "jobs": _job_table(jobs),
        "records": _record_rows(records),
        "figures": figures,
        "documents": _example_documents(pairs),
        "texts": _example_texts(texts),
        "quality": quality_table(quality),
        "stages": stages,
        "config_yaml": config_yaml,
    }
    for name, figure in figures.items():
        with atomic(output / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(figure.png)
    _write_csv(output / "results.csv", scores, baseline)
    with atomic(output / "report.html") as temporary:
        html = _environment().get_template("report.html.jinja").render(page)
        temporary.write_text(html, encoding="utf-8")
    return {
        "arms": len(runs),
        "runs": len(arms),
        "tasks": len({score.task for score in scores}),
        "scores": len(scores),
        "figures": list(figures),
        "main_differences": _count_readings(page["main_rows"]),
    }


def _results(runs: list[Run], scores: list[Score], baseline: Run | None) -> dict[str, Any]:
    """The variables of the template that are about the models."""
    main = main_scores(scores).values()
    return {
        "lead": lead(runs, scores, baseline),
        "runs": runs,
        "baseline": baseline,
        "compared": compared_runs(runs, baseline),
        "comparisons": comparisons(runs, scores, baseline),
        "main_rows": main_table(runs, scores, baseline),
        "main_scores": [score for by_run in main for score in by_run.values()],
        "notes": reading_notes(runs, scores),
        "training": _training_table(runs),
        "scores": scores,
        "paper": paper_table(runs),
    }


def _count_readings(rows: Iterable[MainRow]) -> dict[str, int]:
    readings: Counter[str] = Counter()
    for row in rows:
        for score in row.differences:
            if score is not None and score.difference is not None:
                readings[score.difference.reading] += 1
    return dict(sorted(readings.items()))


def _write_csv(path: Path, scores: Iterable[Score], baseline: Run | None) -> None:
    """One row per score, in full precision; unknown values are empty."""
    names = ["arm", "task", "metric", "value", "stderr", "ci95_low", "ci95_high", "n", "baseline"]
    names += ["difference", "difference_ci95_low", "difference_ci95_high", "difference_p"]
    names += ["seeds", "spread"]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for score in scores:
            row = {
                "arm": score.arm,
                "task": score.task,
                "metric": score.metric,
                "value": score.value,
                "stderr": score.stderr,
                "ci95_low": score.low,
                "ci95_high": score.high,
                "n": score.n,
                "seeds": score.seeds,
                "spread": score.spread,
            }
            difference = score.difference
            if difference is not None and baseline is not None:
                row |= {
                    "baseline": baseline.name,
                    "difference": difference.value,
                    "difference_ci95_low": difference.low,
                    "difference_ci95_high": difference.high,
                    "difference_p": difference.p,
                }
            writer.writerow(row)


# Tables
# ----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    value: float | None
    shown: str


@dataclass(frozen=True)
class TrainingTable:
    headings: list[str]
    rows: list[tuple[str, list[Cell]]]  # name of the run, a cell for each heading


def _training_table(runs: Sequence[Run]) -> TrainingTable | None:
    """Columns that no run has a value for are left out."""
    trained = [run for run in runs if run.steps or run.summary]
    columns: dict[str, tuple[Callable[[Run], Any], Callable[[float], str]]] = {
        "parameters": (lambda run: run.summary.get("parameters"), thousands),
        "tokens": (lambda run: run.summary.get("tokens"), thousands),
        "steps": (lambda run: run.summary.get("steps", len(run.steps) or None), thousands),
        "first loss": (_first_loss, "{:.3f}".format),
        "final loss": (lambda run: run.summary.get("final_loss"), "{:.3f}".format),
        "skipped steps": (_skipped_steps, thousands),
        "tokens/s, median": (lambda run: median(run.steps, "tokens_per_second"), thousands),
        "MFU, median": (lambda run: median(run.steps, "mfu"), "{:.1%}".format),
        "training FLOPs": (lambda run: run.summary.get("flops"), scientific),
        "time": (lambda run: run.summary.get("seconds"), duration),
    }
    headings = []
    rows: list[tuple[str, list[Cell]]] = [(run.name, []) for run in trained]
    for heading, (read, show) in columns.items():
        values = [finite(read(run)) for run in trained]
        if any(value is not None for value in values):
            headings.append(heading)
            for (_, cells), value in zip(rows, values, strict=True):
                cells.append(Cell(value, "–" if value is None else show(value)))
    return TrainingTable(headings, rows) if headings else None


def _first_loss(run: Run) -> float | None:
    return next(iter(column(run.steps, "loss")[1]), None)


def _skipped_steps(run: Run) -> float | None:
    return sum(column(run.steps, "skipped")[1]) if run.steps else None


@dataclass(frozen=True)
class JobTable:
    jobs: Sequence[Job]
    figures: list[str]  # shown ones
    left_out: int  # further figures

    @property
    def states(self) -> str:
        """15 finished, 1 failed"""
        counts = Counter(job.status for job in self.jobs)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    @property
    def failed(self) -> list[int]:
        return [job.number for job in self.jobs if job.status == "failed"]

    @property
    def rows(self) -> list[tuple[Job, dict[str, str]]]:
        """The jobs with their values of the keys that vary."""
        keys = varying_keys(self.jobs)
        return [(job, job_values(job, keys)) for job in self.jobs]


def _job_table(jobs: Sequence[Job]) -> JobTable | None:
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    left_out = max(0, len(figures) - JOB_FIGURES)
    return JobTable(jobs, figures[:JOB_FIGURES], left_out) if jobs else None


def _record_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The records with a label each: the arm, and its seed if there are several."""
    seeds = Counter(record.arm for record in records)
    rows = []
    for record in records:
        seed = f", seed {record.seed}" if seeds[record.arm] > 1 else ""
        rows.append({"label": f"{record.arm}{seed}", "record": record})
    return rows


# Examples
# ----------------------------------------------------------------------------------------------


def _example_documents(pairs: Path | None) -> dict[str, Any] | None:
    """A random sample of documents with their pairs."""
    if pairs is None:
        return None
    folder = _parts(pairs, "pairs")
    return _shown(examples(folder, SHOWN_DOCUMENTS, seed=0), folder)


def _example_texts(texts: Path | None) -> dict[str, Any] | None:
    """A sample of texts with pairs: those whose ids have the smallest SHA-256."""
    if texts is None:
        return None
    folder = _parts(texts, "texts")
    rows = islice(read_parts(folder, ["id", "text", "n_shots", "n_pairs", "layout"]), SAMPLED_ROWS)
    with_pairs = (row for row in rows if row["n_pairs"])
    sample = heapq.nsmallest(SHOWN_TEXTS, with_pairs, key=lambda row: hash_json(row["id"]))
    return _shown(sample, folder)


def _shown(rows: Iterable[dict[str, Any]], folder: Path) -> dict[str, Any]:
    total = sum(pq.read_metadata(path).num_rows for path in folder.glob("part-*.parquet"))
    return {"rows": [{**row, **_folded(row["text"])} for row in rows], "total": total}


def _parts(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _folded(text: str) -> dict[str, Any]:
    """The visible part of a text, its folded part, and the number of characters left out.

    The visible part ends between words.
    """
    if len(text) <= SHOWN_CHARACTERS:
        return {"text": text, "folded": "", "left_out": 0}
    cut = text.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)
    if cut < 0:
        cut = SHOWN_CHARACTERS
    end = cut + FOLDED_CHARACTERS
    return {"text": text[:cut], "folded": text[cut:end], "left_out": max(0, len(text) - end)}


# The template
# ----------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # model output and file content are shown as text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "capital": formatting.capital,
        "duration": duration,
        "exact": lambda value: "" if value is None else repr(value),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
        "number_of": formatting.count_of,
        "p_value": formatting.p_value,
        "plain": formatting.plain,
        "scientific": scientific,
        "sha256": _sha256,
        "task": formatting.task_label,
        "thousands": thousands,
        "words": formatting.spaced,
    }
    return environment


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
