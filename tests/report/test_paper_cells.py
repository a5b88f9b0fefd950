import pytest

from ipt.evaluation.task_types import multiple_choice
from ipt.report.paper_cells import METRIC, paper_table
from ipt.report.scores import Arm, load_runs
from tests.report.report_cases import choice_predictions, write_evaluation

MEDICINE = ("pubmedqa", "chemprot", "rct", "mqp", "usmle")
FIGURES = {
    task: {"Instruct PT-8B": 60.0 + place, "Vanilla PT-8B": 50.0}
    for place, task in enumerate(MEDICINE)
}


def arm(folder, name, published, right, seed=0, tasks=MEDICINE, figures=FIGURES) -> Arm:
    predictions = {
        task: (multiple_choice, choice_predictions([i < right for i in range(100)], 0.3))
        for task in tasks
    }
    return Arm(
        name,
        folder,
        write_evaluation(folder / f"{name}-{seed}", predictions, figures),
        seed,
        published,
    )


def test_each_cell_is_compared_with_the_paper(tmp_path):
    start = Arm("start", None, arm(tmp_path, "start", "", 30).evaluation)
    runs = load_runs([start, arm(tmp_path, "instruct", "Instruct PT-8B", 65)])
    table = paper_table(runs)
    assert table is not None and [run.name for run in table.runs] == ["instruct"]
    assert [(task, average) for task, average, _ in table.rows] == [
        *((task, False) for task in MEDICINE),
        ("medicine", True),
    ]
    for place, (_, _, (cell,)) in enumerate(table.rows[:5]):
        entry = runs[1].results[MEDICINE[place]][METRIC]
        assert (
            cell.paper == pytest.approx(0.6 + place / 100)
            and cell.score.value == entry["value"] == 0.65
        )
        found = cell.score.difference
        assert found.value == pytest.approx(0.05 - place / 100)
        assert found.reading == "not significant"
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * entry["stderr"], rel=1e-3)
        assert (found.high + found.low) / 2 == pytest.approx(found.value)
    average = table.rows[5][2][0]
    assert (average.score.value, average.paper) == pytest.approx((0.65, 0.62))
    assert width(average) < 0.5 * width(table.rows[0][2][0])  # of five tasks
    assert (average.score.shown, average.paper_shown) == ("65.0%", "62.0%")
    assert average.score.difference_shown == "+3.0 points"


def width(cell) -> float:
    return cell.score.difference.high - cell.score.difference.low


def test_a_cell_that_differs_says_so_and_one_that_is_not_published_is_empty(tmp_path):
    figures = {**FIGURES, "usmle": {"Instruct PT-8B": 90.0}}
    runs = load_runs(
        [
            arm(tmp_path, "vanilla", "Vanilla PT-8B", 55, figures=figures),
            arm(tmp_path, "instruct", "Instruct PT-8B", 65, figures=figures),
        ]
    )
    table = paper_table(runs)
    assert table is not None
    rows = {task: cells for task, _, cells in table.rows}
    assert (
        rows["usmle"][0] is None
        and rows["usmle"][1].score.difference.reading == "worse"
        and rows["medicine"][0] is None
    )


def test_seeds_widen_the_interval_of_tasks_and_averages(tmp_path):
    once = paper_table(load_runs([arm(tmp_path, "once", "Instruct PT-8B", 65)]))
    seeds = paper_table(
        load_runs(
            [
                arm(tmp_path, "often", "Instruct PT-8B", right, seed)
                for seed, right in enumerate((55, 65, 75))
            ]
        )
    )
    assert once is not None and seeds is not None
    for row in (0, 5):
        narrow, wide = once.rows[row][2][0], seeds.rows[row][2][0]
        assert wide.score.value == pytest.approx(0.65) and width(wide) > 2 * width(narrow)


def test_without_published_figures_there_is_no_table(tmp_path):
    assert paper_table(load_runs([arm(tmp_path, "instruct", "", 65)])) is None
    assert paper_table(load_runs([arm(tmp_path, "other", "Nobody-7B", 65)])) is None
