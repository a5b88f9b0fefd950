"""The tables of a sweep, while it runs and at its end, at the width of the console."""

import io
import json

import pytest
from rich.console import Console

from ipt.config import Config
from ipt.sweeps import sweep
from ipt.sweeps.job import Job, job_values, varying_keys
from ipt.sweeps.process import Launch, Run
from ipt.sweeps.progress import Live

SCORES = {
    "definition_to_term_generalisation logprob": -10.8,
    "is_a_recall correct": 0.25,
    "held_out_perplexity nll": 7.125,
    "held_out_perplexity bits_per_byte": 3.5,
    "another_long_task_name perplexity": 1234.5,
}


def job(number: int, ratio: str, status: str = "finished", error: str = "") -> Job:
    overrides = (f"mixture.ratios.instruction={ratio}", f"trainer.seed={number}", "logger.group=a")
    figures = {"steps": 20, "final loss": 2.0 + number}
    figures |= {name: value + number for name, value in SCORES.items()}
    if status == "failed":
        figures = {}
    return Job(
        "", overrides, status, figures=figures, number=number, folder="outputs/a", error=error
    )


JOBS = [job(0, "0"), job(1, "0.5", "skipped"), job(2, "[a]", "failed", "no such ratio")]


@pytest.fixture
def shown(monkeypatch):
    def show(width: int, jobs=JOBS) -> list[str]:
        console = Console(width=width, file=io.StringIO())
        monkeypatch.setattr(sweep, "console", console)
        console.print(sweep.sweep_table(jobs))
        return console.file.getvalue().splitlines()

    return show


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]


def heading(lines: list[str]) -> list[str]:
    """The last line of the heading."""
    return cells([line for line in lines if line.startswith("┃")][-1])


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_line_is_wider_than_the_console_and_no_cell_is_cut(shown, width):
    lines = shown(width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert heading(lines)[:4] == ["job", "instruction", "seed", "status"]
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        ["0", "0", "0", "finished"],
        ["1", "0.5", "1", "skipped"],
        ["2", "[a]", "2", "failed"],
    ]


def test_a_wide_console_shows_more_and_figures_that_are_left_out_are_counted(shown):
    narrow, wide = shown(80), shown(160)
    assert heading(wide)[4:] == [
        "final loss",
        "logprob",
        "score",
        "NLL",
        "bits/byte",
        "ppl",
        "result",
    ]
    assert heading(narrow)[4:] == ["final loss", "logprob"]
    assert narrow[-1].strip() == "5 more figures in sweep.json"
    assert wide[-1].strip() == "1 more figures in sweep.json"  # the steps, the same in all jobs


def test_one_job_shows_all_of_its_figures(shown):
    assert heading(shown(160, JOBS[:1]))[:4] == ["job", "status", "steps", "final loss"]


def test_keys_are_named_by_their_last_part_unless_two_end_alike():
    jobs = [Job("", ("a.lr=1", "b.lr=1", "+c.seed=1")), Job("", ("a.lr=2", "b.lr=2", "+c.seed=2"))]
    assert job_values(jobs[1], varying_keys(jobs)) == {"a.lr": "2", "b.lr": "2", "seed": "2"}
    assert job_values(Job("", ()), ["c.seed"]) == {"seed": ""}


@pytest.mark.parametrize("width", [80, 160])
def test_the_live_table_keeps_its_columns_and_cuts_only_the_note(width, tmp_path):
    runs = []
    for planned in JOBS:
        run = Run(Launch("train", tmp_path), planned, Config())
        run.tries = int(planned.status != "skipped")
        runs.append(run)
    runs[0].process = object()
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "training").write_text(str(tmp_path))
    metrics = {"step": 5, "tokens": 500, "tokens_per_second": 100.0, "loss": 7.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics))
    console = Console(width=width, file=io.StringIO())
    console.print(Live(runs)._table())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert heading(lines)[:7] == ["job", "instruction", "seed", "status", "step", "left", "loss"]
    rows = [cells(line) for line in lines if line.startswith("│")]
    steps = Config().trainer.max_steps
    assert rows[0][:5] == ["0", "0", "0", "running", f"5/{steps:,}"]
    assert [row[:4] for row in rows[1:]] == [
        ["1", "0.5", "1", "skipped"],
        ["2", "[a]", "2", "failed"],
    ]
