"""The report of a run: one page that opens from disk without any server, its figures as PNG, and
all scores as CSV.
"""

import base64
import csv
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

from ipt.files import atomic, hash_json, read_parts
from ipt.pipeline.provenance import Record
from ipt.report.formatting import (
    SPLITS,
    duration,
    finite,
    listed,
    plain,
    plural,
    spaced,
    task_label,
    thousands,
)
from ipt.report.paper_cells import paper_table
from ipt.report.plot_style import PALETTE
from ipt.report.plots import draw_figures
from ipt.report.ratio import ratio_study
from ipt.report.scores import (
    Arm,
    Run,
    Score,
    against_baseline,
    all_scores,
    column,
    load_runs,
    main_scores,
    measure_of,
    median,
)
from ipt.sweeps.job import Job
from ipt.synthesis.quality.statistics import examples

SHOWN_DOCUMENTS, SHOWN_TEXTS = 4, 2
SHOWN_CHARACTERS, FOLDED_CHARACTERS = (
    1200,
    20_000,
)  # of one text: in sight, and at most so many more behind a fold
JOB_FIGURES = 6  # of a job in the table; sweep.json has all
SAMPLED_ROWS = (
    50_000  # rows among which the shown texts are drawn; keeps the report quick on large corpora
)


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
    """Write `report.html`, `results.csv` and `figures/*.png` to `output` and return counts for the
    stage's statistics.

    `pairs` and `texts` are the synthesis and rendering stages' folders, or None where there is
    nothing to show. `stages` holds one {"name", "folder", "seconds", "reused", "stats"} per stage;
    every field of `stages`, `quality` and `facts` is optional. `records` are the run records of
    arms, `jobs` those of a sweep, and with `over_ratios` the arms are a sweep over a ratio. Arms of
    one name are seeds of one model. Differences are measured against the arm called "vanilla", else
    against the first trained one. Raises MissingFileError if an arm has no results.json, UserError
    if two arms have the same name and seed.
    """
    runs = load_runs(arms)
    baseline = next(
        (run for run in runs if run.name == "vanilla"),
        next((run for run in runs if run.is_trained), None),
    )
    unpaired: list[str] = []
    scores = all_scores(runs, baseline, unpaired.append)
    study = ratio_study(runs, scores, over_ratios)
    figures = draw_figures(runs, scores, stages, quality, study)
    page = {
        "title": title,
        "facts": facts,
        "palette": PALETTE,
        **_findings(runs, scores, baseline),
        "unpaired": unpaired,
        "paper": paper_table(runs),
        "study": study,
        "jobs": _job_table(jobs),
        "records": _record_table(records),
        "figures": figures,
        "documents": _example_documents(pairs),
        "texts": _example_texts(texts),
        "quality": _quality_table(quality),
        "stages": stages,
        "config_yaml": config_yaml,
    }
    for name, figure in figures.items():
        with atomic(output / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(figure.png)
    _write_csv(output / "results.csv", scores, baseline)
    with atomic(output / "report.html") as temporary:
        temporary.write_text(
            _environment().get_template("report.html.jinja").render(page), encoding="utf-8"
        )
    differences = (
        score.difference
        for row in page["verdict"]
        for score in row["differences"]
        if score is not None
    )
    readings = Counter(difference.reading for difference in differences if difference is not None)
    return {
        "arms": len(runs),
        "runs": len(arms),
        "tasks": len({score.task for score in scores}),
        "scores": len(scores),
        "figures": list(figures),
        "main_differences": dict(sorted(readings.items())),
    }


def _write_csv(path: Path, scores: list[Score], baseline: Run | None) -> None:
    names = ["arm", "task", "metric", "value", "stderr", "ci95_low", "ci95_high", "n"]
    names += [
        "baseline",
        "difference",
        "difference_ci95_low",
        "difference_ci95_high",
        "difference_p",
        "seeds",
        "spread",
    ]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for score in scores:
            row = [
                score.arm,
                score.task,
                score.metric,
                score.value,
                score.stderr,
                score.low,
                score.high,
                score.n,
            ]
            if (difference := score.difference) is not None and baseline is not None:
                row += [
                    baseline.name,
                    difference.value,
                    difference.low,
                    difference.high,
                    difference.p,
                ]
            row += [None] * (len(names) - 2 - len(row))
            writer.writerow([*row, score.seeds, score.spread])


# What it says
# ----------------------------------------------------------------------------------------------


def _findings(runs: list[Run], scores: list[Score], baseline: Run | None) -> dict[str, Any]:
    """What the page says about the models."""
    return {
        "lead": _lead(runs, scores, baseline),
        "runs": runs,
        "baseline": baseline,
        "compared": against_baseline(runs, baseline),
        "sentences": _sentences(runs, scores, baseline),
        "verdict": _verdict(runs, scores, baseline),
        "notes": _notes(runs, scores),
        "training": _training_table(runs),
        "scores": scores,
        "main": [score for by_arm in main_scores(scores).values() for score in by_arm.values()],
    }


def _verdict(runs: list[Run], scores: list[Score], baseline: Run | None) -> list[dict[str, Any]]:
    """One row per main measure: the score of each arm, and the difference of each trained arm from
    the baseline.
    """
    rows = []
    for (task, metric), by_arm in main_scores(scores).items():
        measure = measure_of(metric)
        chance = (
            next((run.chance[task] for run in runs if task in run.chance), None)
            if "accuracy" in metric
            else None
        )
        differences = [by_arm.get(run.name) for run in against_baseline(runs, baseline)]
        bounds = [score.difference.low for score in differences if score and score.difference]
        bounds += [score.difference.high for score in differences if score and score.difference]
        rows.append(
            {
                "task": task,
                "measure": measure,
                "n": max((score.n or 0 for score in by_arm.values()), default=0),
                "chance": None if chance is None else measure.show(chance),
                "values": [by_arm.get(run.name) for run in runs],
                "differences": differences,
                "reach": max((abs(bound) for bound in bounds if bound is not None), default=0.0),
            }
        )
    return rows


def _sentences(runs: list[Run], scores: list[Score], baseline: Run | None) -> list[dict[str, Any]]:
    """What the main measures say of each pair of models: lists of differences by their reading."""
    if baseline is None:
        return []
    main = [
        score
        for by_arm in main_scores(scores).values()
        for score in by_arm.values()
        if score.difference
    ]
    compared = [
        (run.name, baseline.name, run.name, False) for run in against_baseline(runs, baseline)
    ]
    compared += [
        (baseline.name, run.name, run.name, True)
        for run in runs
        if run is not baseline and not run.is_trained
    ]
    sentences = []
    for subject, reference, arm, turned in compared:
        readings: dict[str, list[Score]] = {}
        for score in main:
            if score.arm == arm and score.difference is not None:
                difference = score.difference.negated() if turned else score.difference
                readings.setdefault(difference.reading, []).append(
                    replace(score, difference=difference)
                )
        if readings:
            counts = {reading: len(found) for reading, found in readings.items()}
            details = {reading: _spelled_out(found) for reading, found in readings.items()}
            sentences.append(
                {"subject": subject, "reference": reference, "counts": counts, "details": details}
            )
    return sentences


def _spelled_out(scores: list[Score]) -> str:
    """definition to term, recall (accuracy +8.1 points, log-probability +1.213); …"""
    by_task: dict[str, list[str]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(f"{score.measure.label} {score.difference_shown}")
    return "; ".join(f"{task_label(task)} ({', '.join(found)})" for task, found in by_task.items())


def _lead(runs: list[Run], scores: list[Score], baseline: Run | None) -> str:
    trained = [
        run.name + (f" ({len(run.arms)} seeds)" if len(run.arms) > 1 else "")
        for run in runs
        if run.is_trained
    ]
    others = [run.name for run in runs if not run.is_trained]
    scored = f"scored on {plural(len({score.task for score in scores}), 'task')}"
    if not trained:
        return (
            f"{plural(len(others), 'model')}, {listed(others)}, "
            f"{'was' if len(others) == 1 else 'were'} {scored}; nothing was trained."
        )
    budgets = {run.summary.get("tokens") for run in runs if run.is_trained}
    budget = ""
    if len(budgets) == 1 and None not in budgets:
        budget = f" on {budgets.pop():,} tokens{' each' if len(trained) > 1 else ''}"
    lead = (
        f"{plural(len(trained), 'model')}, {listed(trained)}, "
        f"{'was' if len(trained) == 1 else 'were'} trained{budget} and {scored}"
    )
    lead += f" beside {listed(others)}, not trained here." if others else "."
    return lead + (
        f" Every difference is measured against {baseline.name}."
        if baseline and len(runs) > 1
        else ""
    )


def _notes(runs: list[Run], scores: list[Score]) -> list[str]:
    """What a reader must keep in mind before believing the table."""
    main = [score for by_arm in main_scores(scores).values() for score in by_arm.values()]
    tested = sum(
        score.difference is not None and score.difference.low is not None for score in main
    )
    notes = _interval_notes(runs)
    if tested:
        notes.append(
            "The intervals are not corrected for the number of comparisons: of "
            f"{plural(tested, 'difference')} in the main measures, "
            f"about {max(tested * 0.05, 0.1):.1f} would exclude zero by chance alone if no model "
            "differed from another."
        )
    if any(score.n is not None and score.n < 30 for score in main):
        notes.append("Some tasks have fewer than 30 items; their intervals are rough.")
    splits = {
        suffix for suffix in SPLITS if any(score.task.endswith(f"_{suffix}") for score in scores)
    }
    return [
        f"{suffix.capitalize()}: {SPLITS[suffix]}." for suffix in SPLITS if suffix in splits
    ] + notes


def _interval_notes(runs: list[Run]) -> list[str]:
    """What the intervals cover, which depends on how often each arm was trained."""
    several = [run.name for run in runs if len(run.arms) > 1]
    if not several:
        return [
            "Intervals are 95% and cover the choice of questions and documents. They do not cover "
            "the training seed: "
            "one training run stands behind each arm."
        ]
    notes = [
        f"Scores of {listed(several)} are means over training seeds. The interval below such a "
        "score is 95% and covers the choice of "
        "questions and documents alone; what the seeds differ by (their standard deviation) "
        "stands apart.",
        "Intervals of differences cover both: items are paired, seeds too where both models have "
        "the same ones; the variances of items and "
        "of seeds are added, without what they share (crossed random effects), each with its own "
        "quantile of Student's t. With two or "
        "three seeds that is wide, as it must be.",
    ]
    single = [run.name for run in runs if run.is_trained and len(run.arms) == 1]
    return notes + (
        [
            f"{listed(single)}: one seed, whose spread is taken to be that of the others where "
            "they are compared."
        ]
        if single
        else []
    )


def _training_table(runs: list[Run]) -> list[tuple[str, list[tuple[str, float | None, str]]]]:
    """Columns of (heading, [(arm, value, value for readers)]); a column that no arm can fill is
    left out.
    """
    trained = [run for run in runs if run.steps or run.summary]
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float], str]]] = [
        ("parameters", lambda run: run.summary.get("parameters"), thousands),
        ("tokens", lambda run: run.summary.get("tokens"), thousands),
        ("steps", lambda run: run.summary.get("steps", len(run.steps) or None), thousands),
        (
            "loss, first step",
            lambda run: next(iter(column(run.steps, "loss")[1]), None),
            "{:.3f}".format,
        ),
        ("loss, last step", lambda run: run.summary.get("final_loss"), "{:.3f}".format),
        (
            "skipped steps",
            lambda run: sum(column(run.steps, "skipped")[1]) if run.steps else None,
            thousands,
        ),
        (
            "tokens per second, median",
            lambda run: median(run.steps, "tokens_per_second"),
            thousands,
        ),
        ("MFU, median", lambda run: median(run.steps, "mfu"), "{:.1%}".format),
        ("training FLOPs", lambda run: run.summary.get("flops"), "{:.2e}".format),
        ("time", lambda run: run.summary.get("seconds"), duration),
    ]
    table = []
    for heading, read, show in columns:
        values = [(run.name, finite(read(run))) for run in trained]
        if any(value is not None for _, value in values):
            table.append(
                (
                    heading,
                    [
                        (name, value, "–" if value is None else show(value))
                        for name, value in values
                    ],
                )
            )
    return table


def _job_table(jobs: Sequence[Job]) -> dict[str, Any] | None:
    """Columns and rows of the jobs of a sweep: what varies, how it ended, its main figures, and of
    a failed one why.
    """
    if not jobs:
        return None
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    rows = []
    for job in jobs:
        values = [finite(job.figures.get(name)) for name in figures[:JOB_FIGURES]]
        result = job.error if job.status == "failed" else str(job.folder or "")
        rows.append(
            {
                "name": job.name,
                "status": job.status,
                "seconds": job.seconds,
                "figures": values,
                "result": result,
            }
        )
    states = Counter(job.status for job in jobs)
    failed = [job.name for job in jobs if job.status == "failed"]
    return {
        "figures": figures[:JOB_FIGURES],
        "rows": rows,
        "states": states,
        "failed": failed,
        "left_out": max(0, len(figures) - JOB_FIGURES),
    }


def _record_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each source of each arm and seed, and the costs with the first of them."""
    seeds = Counter(record.arm for record in records)
    return [
        {
            "arm": record.arm,
            "label": f"{record.arm}, seed {record.seed}" if seeds[record.arm] > 1 else record.arm,
            "record": record,
            "sources": list(record.sources.items()),
        }
        for record in records
    ]


QUALITY = {  # statistic of the synthesis stage -> what it is called and what it means
    "documents": ("documents", "that went into synthesis"),
    "documents_with_pairs": ("documents with pairs", "at least one pair from one of their pieces"),
    "documents_without_pairs": (
        "documents without pairs",
        "generated, but nothing could be read from it",
    ),
    "dropped": ("documents dropped", "never generated, by reason"),
    "long_documents": (
        "long documents",
        "split into pieces or truncated to fit the context window",
    ),
    "rows": ("generations", "one for each document or piece"),
    "joined": ("joined generations", "continue the text of the one before them in a chain"),
    "pairs": ("pairs", ""),
    "pairs_before": ("pairs before the filters", ""),
    "refused": ("refused prompts", "in the words of the engine or server"),
    "filtered": ("pairs that the filters took away", "by the first reason that applies"),
    "rewrites": ("generations with a rewrite", "a text in place of pairs"),
    "rewrite_words": ("words per rewrite", "mean"),
    "pairs_per_row": ("pairs per generation", ""),
    "well_formed_rate": (
        "well-formed generations",
        "not cut, gave a pair, and the parser rejected nothing but repeated questions",
    ),
    "distinct_question_rate": ("distinct questions", "of all questions of all documents"),
    "repeated_question_rate": (
        "repeated questions",
        "of all questions written, those dropped because their document had them before",
    ),
    "grounded_rate": (
        "grounded answers",
        "at least four fifths of their words occur in the document",
    ),
    "verbatim_rate": ("answers found in the document", "word for word"),
    "what_is_share": ("questions that begin with What is or What are", ""),
    "stock_question_share": ("stock questions", "have one of the ten most frequent frames"),
    "frames": ("most frequent frames", "_ stands for words taken from the document"),
    "self_bleu": ("self-BLEU of questions", "1 if all of the sampled ones say the same"),
    "distinct_4grams": ("distinct 4-grams", "of all in the sampled pairs"),
    "question_words": ("words per question", "mean"),
    "answer_words": ("words per answer", "mean"),
    "prompt_tokens": ("prompt tokens", ""),
    "cached_tokens": ("prompt tokens from the prefix cache", ""),
    "generated_tokens": ("generated tokens", ""),
    "tokens_not_generated": (
        "tokens not generated",
        "at most so many were saved by stopping at repetitions",
    ),
    "generator_flops": (
        "generator FLOPs",
        "2 x parameters x tokens computed, prompt tokens from the cache left out",
    ),
    "rejected": ("rejected pieces", "of generations, by reason"),
    "finish_reasons": ("why generations ended", ""),
    "session": ("last session", "generation only; a resumed stage has several"),
    "judge_accuracy": ("right answers", "as a judge model finds them, of a random sample"),
    "judge_relevance": (
        "pairs about their document",
        "as a judge model finds them, of the same sample",
    ),
    "judge_kinds_of_task": ("kinds of task", "that the judge told apart"),
    "judge_failed": ("pairs without a verdict", "because the judge failed, by reason"),
}
DRAWN = ("histograms", "kinds")  # shown as figures
IF_ANY = (
    "rewrites",
    "rewrite_words",
    "refused",
    "filtered",
    "tokens_not_generated",
    "generator_flops",
    "judge_failed",
)


def _quality_table(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, meaning) for readers; a statistic that is not known here comes last and is
    shown by its key.
    """
    entries = {
        name: value
        for name, value in quality.items()
        if name not in ("well_formed", "diversity", "judge", "overlap")
    }
    diversity, judge, overlap = (
        quality.get(name) or {} for name in ("diversity", "judge", "overlap")
    )
    entries |= {name: value for name, value in diversity.items() if name in QUALITY}
    for measure in ("accuracy", "relevance"):
        if judge.get(measure) is not None:
            low, high = judge[f"{measure}_ci95"]
            entries[f"judge_{measure}"] = (
                f"{judge[measure]:.1%} (95%: {low:.1%} to {high:.1%}; {judge['judged']:,} pairs)"
            )
    entries |= {
        f"judge_{name}": judge[name] for name in ("kinds_of_task", "failed") if name in judge
    }
    rows = []
    for key in [known for known in QUALITY if known in entries] + [
        other for other in entries if other not in QUALITY
    ]:
        if key not in DRAWN and (entries[key] or key not in IF_ANY):
            name, meaning = QUALITY.get(key, (spaced(key), ""))
            rows.append((name, _quality_value(key, entries[key]), meaning))
    return rows + [
        (f"overlap with {task_label(task)}", *_overlap(counts)) for task, counts in overlap.items()
    ]


def _quality_value(key: str, value: Any) -> str:
    if key.endswith(("_rate", "_share", "_4grams")) and finite(value) is not None:
        return f"{value:.1%}"
    return f"{value:.2e}" if key.endswith("_flops") and value is not None else plain(value)


def _overlap(counts: dict[str, int]) -> tuple[str, str]:
    meaning = "items of the task that share an n-gram with a pair"
    if counts["items_too_short_to_look_for"]:
        meaning += f"; {counts['items_too_short_to_look_for']:,} were too short to look for"
    return (
        f"{counts['items_found']:,} of {counts['items']:,} items, in "
        f"{plural(counts['texts_that_overlap'], 'pair')}",
        meaning,
    )


# Examples
# ----------------------------------------------------------------------------------------------


def _example_documents(pairs: Path | None) -> dict[str, Any] | None:
    """A few documents with their pairs, drawn at random: nobody chose them for their looks."""
    if pairs is None:
        return None
    folder = _parts(pairs, "pairs")
    shown = examples(folder, SHOWN_DOCUMENTS, seed=0)
    return {
        "rows": [{**row, **_folded(row["text"])} for row in shown],
        "total": _count_rows(folder),
    }


def _example_texts(texts: Path | None) -> dict[str, Any] | None:
    """A few texts that hold pairs, those whose ids have the smallest hashes."""
    if texts is None:
        return None
    folder = _parts(texts, "texts")
    rows = islice(read_parts(folder, ["id", "text", "n_shots", "n_pairs", "layout"]), SAMPLED_ROWS)
    shown = heapq.nsmallest(
        SHOWN_TEXTS, (row for row in rows if row["n_pairs"]), key=lambda row: hash_json(row["id"])
    )
    return {
        "rows": [{**row, **_folded(row["text"])} for row in shown],
        "total": _count_rows(folder),
    }


def _parts(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _count_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("part-*.parquet"))


def _folded(text: str) -> dict[str, Any]:
    """`text` in two, cut between words: what is in sight and what is folded, and how many
    characters are left out of both.
    """
    if len(text) <= SHOWN_CHARACTERS:
        return {"text": text, "folded": "", "left_out": 0}
    cut = text.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)
    cut = cut if cut > 0 else SHOWN_CHARACTERS
    end = cut + FOLDED_CHARACTERS
    return {"text": text[:cut], "folded": text[cut:end], "left_out": max(0, len(text) - end)}


# The template
# ----------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # model output and file content are shown as text, whatever they hold
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "words": spaced,
        "task": task_label,
        "plain": plain,
        "capital": lambda text: text[:1].upper() + text[1:],
        "exact": lambda value: "" if value is None else repr(value),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
        "sha256": lambda text: base64.b64encode(
            hashlib.sha256(str(text).encode()).digest()
        ).decode(),
    }
    return environment
