import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ipt.report.cli import job_arms, report_folders, write_sweep_report
from ipt.report.findings import lead
from ipt.report.mixing_law import ratio_study
from ipt.report.scores import all_scores, load_runs
from ipt.stage import MANIFEST
from ipt.sweeps.job import varying_keys
from tests.report.report_cases import Page
from tests.sweeps.sweep_cases import BEST, save_sweep, sweep_jobs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return sweep_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def output(jobs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert write_sweep_report(folder, jobs, "name: made-up\n") == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(output) -> Page:
    return Page(output / "report.html")


def study(jobs, required=True):
    runs = load_runs(job_arms(jobs))
    return ratio_study(runs, all_scores(runs, runs[0]), required)


def test_jobs_that_differ_in_the_seed_alone_are_one_arm(jobs):
    arms = job_arms(jobs)
    assert varying_keys(jobs) == ["mixture.ratios.instruction", "trainer.seed"]
    assert [(arm.name, arm.seed) for arm in arms[:4]] == [
        *(("instruction=0.0", seed) for seed in range(3)),
        ("instruction=0.25", 0),
    ]
    assert len(arms) == 15


def test_keys_of_one_last_name_keep_their_whole_one(jobs):
    others = [
        replace(
            job, overrides=(*job.overrides, f"optimizer.lr={job.number}", f"other.lr={job.number}")
        )
        for job in jobs[:2]
    ]
    assert job_arms(others)[1].name == "optimizer.lr=1 other.lr=1"


def test_failed_jobs_are_named(page):
    assert "16 jobs: 15 finished, 1 failed. Failed: job 15." in page.text()
    rows = page.rows("Jobs of the sweep")
    assert (
        len(rows) == 16
        and rows[-1][-1][0] == "error: <b>no</b> such ratio"
        and rows[0][4] == ("3", "3.0")
        and [cell[0] for cell in rows[-1][:4]] == ["15", "2", "0", "failed"]
    )


def test_the_best_ratio_is_found_and_said(page, jobs):
    found = {(row[0][0], row[1][0]): row for row in page.rows("Best ratios")}
    documents = found["held-out perplexity", "bits per byte"]
    low, high = (float(bound) for bound in documents[3][0].split(" to "))
    assert low <= BEST <= high and high - low < 0.3 and documents[6][0].startswith("Best at 0.")
    assert found["is-a, recall", "accuracy"][6][0].startswith(
        "Best at the highest ratio tried, 1.00"
    )
    assert found["is-a, recall", "log-probability"][6][0] == "No significant effect of the ratio"


def test_repetition_of_the_pool_is_a_warning(page, jobs, tmp_path):
    assert "instruction was read 1.00 times at one ratio and 4.00 times at another" in page.text()
    assert (
        "mixture.match_tokens to the token budget" in page.text()
        and "mixture.subsample.instruction in proportion" in page.text()
    )
    once = study(sweep_jobs(tmp_path / "once", seeds=(0,), repeats=0.9))
    assert once.warnings == [] and "No tokens other than raw text were repeated" in once.notes[-1]
    for job in jobs[:15]:
        (job.training / MANIFEST).write_text(
            json.dumps({"config": {"mixture": {"match_tokens": 10**9}}})
        )
    assert study(jobs).warnings == []
    for job in jobs[:15]:
        (job.training / MANIFEST).unlink()


def test_too_few_ratios_or_more_than_ratios_have_no_law(jobs):
    few = study([job for job in jobs if "=0.75" not in job.name and "=1.0" not in job.name])
    assert (
        few.panels == []
        and "at least 4 different ratios of instruction, and 0, 0.25 and 0.5 were" in few.notes[0]
    )
    assert study(jobs[:9], required=False) is None and study(jobs[:3]) is None
    for job in jobs[:15]:
        (job.training / MANIFEST).write_text(
            json.dumps(
                {"config": {"optimizer": {"lr": job.number}, "trainer": {"seed": job.number}}}
            )
        )
    assert study(jobs).notes == [
        "No law was fitted: the runs differ in more than the ratio of instruction (optimizer.lr)."
    ]
    for job in jobs[:15]:
        (job.training / MANIFEST).write_text(
            json.dumps({"inputs": {"raw": "a", "instruction": "b" if job.number < 9 else "c"}})
        )
    assert study(jobs).notes == [
        "No law was fitted: the runs differ in more than the ratio of instruction (the data of "
        "instruction)."
    ]
    for job in jobs[:15]:
        (job.training / MANIFEST).unlink()


def test_scores_are_means_over_seeds_and_the_spread_stands_apart(output, jobs):
    with (output / "results.csv").open(newline="") as file:
        rows = {
            (row["arm"], row["metric"]): row
            for row in csv.DictReader(file)
            if row["task"] == "held_out_perplexity"
        }
    values = [
        json.loads((job.evaluation / "results.json").read_text())["held_out_perplexity"][
            "bits_per_byte"
        ]
        for job in jobs[3:6]
    ]
    row = rows["instruction=0.25", "bits_per_byte"]
    assert float(row["value"]) == pytest.approx(sum(entry["value"] for entry in values) / 3)
    assert int(row["seeds"]) == 3 and 0 < float(row["spread"]) < 0.02 < float(row["stderr"]) * 2
    assert (
        float(row["difference_ci95_low"])
        < float(row["difference"])
        < float(row["difference_ci95_high"])
    )


def test_a_sweep_without_scores_has_no_report(jobs, tmp_path):
    assert write_sweep_report(tmp_path, jobs[-1:], "name: made-up\n") is None
    assert (
        write_sweep_report(tmp_path, [replace(jobs[0], evaluation=None)], "name: made-up\n") is None
    )
    assert list(tmp_path.iterdir()) == []


# By hand
# ----------------------------------------------------------------------------------------------


def test_a_report_from_folders(jobs, tmp_path):
    sweep = save_sweep(tmp_path / "sweep", jobs[:6])
    recipe = tmp_path / "recipe"
    for job in jobs[:2]:
        place = recipe / "arms" / "vanilla" / f"seed-{job.number}"
        place.mkdir(parents=True)
        (place / "training").symlink_to(job.training)
        (place / "evaluation").symlink_to(job.evaluation)
    page = Page(report_folders([sweep, jobs[9].training, recipe], tmp_path / "report", "By hand"))
    assert page.text("h1") == "By hand"
    models = {row[2][0] for row in page.rows("All scores")}
    # vanilla is what the sweep had already
    assert models == {"instruction=0.0", "instruction=0.25", "0.75-0"}


def test_scores_beside_a_training_are_found_by_its_model(jobs, tmp_path):
    training, evaluation = tmp_path / "training-abc", tmp_path / "evaluation-abc"
    training.mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (training / name).write_bytes((jobs[0].training / name).read_bytes())
    with pytest.raises(ValueError, match=r"training-abc has no scores.*evaluate its export first"):
        report_folders([training], tmp_path / "report", "By hand")
    (training / MANIFEST).write_text(
        json.dumps({"digest": "d1", "config": {"trainer": {"seed": 3}}, "seed": 0})
    )
    evaluation.mkdir()
    (evaluation / "results.json").write_bytes((jobs[0].evaluation / "results.json").read_bytes())
    (evaluation / MANIFEST).write_text(json.dumps({"inputs": {"model": "d1"}, "finished": "2026"}))
    assert (
        Page(report_folders([training], tmp_path / "report", "By hand")).rows("All scores")[0][2][0]
        == "training-abc"
    )


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no training run \(metrics.jsonl\), evaluation \(results.json\)"
    ):
        report_folders([tmp_path], tmp_path / "report", "By hand")


def test_the_first_paragraph_says_what_was_trained(jobs, page):
    assert (
        "Five models (instruction=0.0, instruction=0.25, instruction=0.5, instruction=0.75, "
        "instruction=1.0) were trained on 2,560 tokens each (3 seeds per model) and evaluated on 2 "
        "tasks. Differences are relative to instruction=0.0." in page.text()
    )
    runs = load_runs(job_arms(jobs[1:6]))
    assert lead(runs, all_scores(runs, None), None).startswith(
        "Two models (instruction=0.0, instruction=0.25) were trained on 2,560 tokens each "
        "(2 to 3 seeds per model) and "
    )
