"""A sweep over ratios with made-up models whose best ratio is known."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ipt.evaluation.task_types import multiple_choice, perplexity
from ipt.sweeps.job import Job, save_job
from tests.report.report_cases import choice_predictions, training, write_evaluation

BEST, ITEMS = 0.4, 120
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def sweep_jobs(
    folder: Path,
    ratios: Sequence[float] = RATIOS,
    seeds: Sequence[int] = (0, 1, 2),
    repeats: float = 4.0,
) -> list[Job]:
    """Finished jobs, one for each ratio and seed, and two that are not. `repeats`: how often the
    pool is read at ratio 1.
    """
    random = np.random.default_rng(0)
    hardness = random.normal(0, 0.4, ITEMS)
    jobs = []
    for ratio in ratios:
        taste = random.normal(0, 0.01, ITEMS)
        for seed in seeds:
            place = folder / f"{ratio}-{seed}"
            trained = training(
                place,
                {
                    name: share
                    for name, share in (("raw", 1 - ratio), ("instruction", ratio))
                    if share
                },
            )
            _set_repeats(trained, ratio * repeats)
            nll = (
                2
                + 0.4 * (ratio - BEST) ** 2
                + hardness
                + taste
                + random.normal(0, 0.01)
                + random.normal(0, 0.02, ITEMS)
            )
            right = (hardness < 0.3 * ratio + random.normal(0, 0.1)).tolist()
            tasks = {
                "held_out_perplexity": (perplexity, _documents(nll)),
                "is_a_recall": (multiple_choice, choice_predictions(right, 0.3)),
            }
            jobs.append(
                _finished(
                    ratio, seed, len(jobs), trained, write_evaluation(place / "evaluation", tasks)
                )
            )
    failed = ("mixture.ratios.instruction=2", "trainer.seed=0")
    jobs.append(
        Job(
            " ".join(failed),
            failed,
            "failed",
            number=len(jobs),
            error="error: <b>no</b> such ratio",
        )
    )
    return jobs


def save_sweep(folder: Path, jobs: Sequence[Job]) -> Path:
    for job in jobs:
        save_job(folder, job)
    (folder / "sweep.json").write_text(
        json.dumps({"jobs": [{"number": job.number} for job in jobs]})
    )
    return folder


def _finished(ratio: float, seed: int, number: int, trained: Path, scored: Path) -> Job:
    overrides = (
        f"mixture.ratios.instruction={ratio}",
        f"trainer.seed={seed}",
        "logger.wandb.group=sweep",
    )
    loss = json.loads((trained / "summary.json").read_text())["final_loss"]
    return Job(
        " ".join(overrides[:2]),
        overrides,
        "finished",
        trained,
        scored,
        {"final loss": loss},
        75.0,
        number,
        folder=trained,
    )


def _set_repeats(trained: Path, repeats: float) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    if "instruction" in summary["sources"]:
        summary["sources"]["instruction"]["repeats"] = repeats
    (trained / "summary.json").write_text(json.dumps(summary))


def _documents(nll: np.ndarray) -> list[dict]:
    """Bits per byte are nats per token over 4 ln 2 here."""
    return [
        {
            "id": f"d{i}",
            "prompt_hash": str(i),
            "nll": float(value) * 100,
            "tokens": 100,
            "bytes": 400,
            "windows": 1,
        }
        for i, value in enumerate(nll)
    ]
