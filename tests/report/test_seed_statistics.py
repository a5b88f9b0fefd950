import math

import numpy as np
import pytest
from scipy import stats

from ipt.evaluation.metrics import statistics
from ipt.evaluation.results import compare
from ipt.evaluation.task_types import multiple_choice
from ipt.report.seed_statistics import (
    Table,
    compare_seeds,
    compare_within_seeds,
    difference_of,
    plain_average,
    student,
    with_spread,
)
from tests.report.report_cases import choice_predictions, write_evaluation


def table(random, mean, seeds, items, seed_noise, item_noise, both, hardness=0.0) -> Table:
    shares = (
        mean
        + hardness
        + random.normal(0, item_noise, items)
        + random.normal(0, both, (seeds, items))
    )
    shares = shares + random.normal(0, seed_noise, (seeds, 1))
    return Table(shares.mean(1), shares - shares.mean(1, keepdims=True))


@pytest.mark.parametrize(
    ("seeds", "items", "seed_noise", "item_noise", "both"),
    [
        (3, 100, 0.05, 0.3, 0.3),
        (5, 40, 0.0, 0.3, 0.5),
        (2, 100, 0.1, 0.1, 0.1),
        (4, 30, 0.02, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_over_items_and_seeds_hold_the_truth(
    seeds, items, seed_noise, item_noise, both, paired
):
    """A crossed model with known variances: 95% intervals hold the true difference about so often,
    items being as hard for both.
    """
    random = np.random.default_rng(seeds)
    held, trials = 0, 400
    for _ in range(trials):
        hardness = random.normal(0, 1, items)
        ours = table(random, 0.3, seeds, items, seed_noise, item_noise, both, hardness)
        theirs = table(random, 0.1, seeds, items, seed_noise, item_noise, both, hardness)
        interval = difference_of(ours, theirs, paired)
        held += interval.low <= 0.2 <= interval.high
    assert 0.9 * trials < held  # 0.92 to 0.99 in long runs


def test_items_alone_would_not_do():
    """The same with the interval of one seed: it knows nothing of the seeds' spread, and fails."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        ours, theirs = (table(random, 0.0, 1, 100, 0.1, 0.1, 0.1) for _ in range(2))
        interval = difference_of(ours, theirs, paired=True)
        held += interval.low <= 0 <= interval.high
    assert held < 0.6 * 200


def test_one_seed_is_the_paired_difference_over_items():
    random = np.random.default_rng(1)
    a, b = statistics.mean(random.random(50)), statistics.mean(random.random(50))
    expected, found = (
        statistics.difference(a, b),
        difference_of(Table.of([a]), Table.of([b]), paired=True),
    )
    assert (found.value, found.stderr) == pytest.approx((expected.difference, expected.stderr))
    assert (found.low, found.high) == pytest.approx(expected.ci95) and found.p == pytest.approx(
        expected.p
    )


def test_without_items_noise_it_is_the_t_test():
    ours, theirs = (
        Table(np.array(values), np.zeros((len(values), 10)))
        for values in ([1.0, 1.3, 1.1], [0.6, 0.8, 0.9])
    )
    assert difference_of(ours, theirs, paired=True).p == pytest.approx(
        stats.ttest_rel(ours.values, theirs.values).pvalue
    )
    assert difference_of(ours, theirs, paired=False).p == pytest.approx(
        stats.ttest_ind(ours.values, theirs.values).pvalue
    )
    lone = Table(np.array([0.7]), np.zeros((1, 10)))
    pooled = difference_of(ours, lone, paired=False)  # one seed takes its spread from the others
    assert pooled.stderr == pytest.approx(ours.values.std(ddof=1) * math.sqrt(1 / 3 + 1))
    assert difference_of(ours, lone, paired=True).stderr == pytest.approx(
        ours.values.std(ddof=1) / math.sqrt(3)
    )


def test_an_entry_with_its_spread():
    entry = {"value": 0.5, "stderr": 0.03, "n": 200, "spread": 0.04, "runs": 4}
    interval = with_spread(entry)
    assert interval is not None and interval.stderr == pytest.approx(math.hypot(0.03, 0.02))
    assert interval.high - 0.5 > 1.96 * interval.stderr  # Student's
    alone = with_spread({"value": 0.5, "stderr": 0.03, "n": 200})
    assert alone is not None and (alone.low, alone.high) == pytest.approx(
        (0.5 - 1.96 * 0.03, 0.5 + 1.96 * 0.03), abs=1e-4
    )
    assert with_spread({"value": 0.5, "stderr": None, "n": 1}) is None


def test_student_of_nothing():
    assert student(0.0, [(0.0, 5)]).p == 1 and student(1.0, []).p == 0
    unknown = student(1.0, [(math.nan, 0), (0.1, 2)])
    assert math.isnan(unknown.low) and math.isnan(unknown.p)


def test_two_parts_of_a_variance_have_an_interval_that_its_p_agrees_with():
    for value, parts in (
        (0.5, [(0.01, 99), (0.02, 2)]),
        (3.0, [(0.01, 9), (0.02, 2)]),
        (1e9, [(0.01, 9)]),
    ):
        interval = student(value, parts)
        assert (interval.p < 0.05) == (interval.low > 0) and 0 < interval.p < 1
    edge = student(2.0, [(0.3, 7), (0.1, 3)])
    edge = student((edge.high - edge.low) / 2, [(0.3, 7), (0.1, 3)])
    assert edge.low == pytest.approx(0, abs=1e-9) and edge.p == pytest.approx(0.05)


@pytest.fixture
def folders(tmp_path):
    def write(name, right, prefix="q"):
        rows = [{**row, "id": f"{prefix}{row['id']}"} for row in choice_predictions(right, 0.3)]
        return write_evaluation(tmp_path / name, {"quiz": (multiple_choice, rows)})

    return write


def test_folders_are_paired_by_item_and_seed(folders):
    ours = {seed: folders(f"a{seed}", [i % 3 != seed for i in range(60)]) for seed in (0, 1)}
    theirs = {seed: folders(f"b{seed}", [i % 2 == seed for i in range(60)]) for seed in (0, 1)}
    entry = compare_seeds(ours, theirs, "quiz")["accuracy"]
    each = [compare(ours[seed], theirs[seed])["quiz"]["accuracy"]["difference"] for seed in (0, 1)]
    assert entry["difference"] == pytest.approx(np.mean(each)) and entry["n"] == 60
    assert entry["ci95"][0] < entry["difference"] < entry["ci95"][1]
    fixed = compare_seeds({0: ours[0]}, theirs, "quiz", fixed=True)["accuracy"]
    assert fixed["difference"] == pytest.approx(2 / 3 - 0.5)


def test_seeds_with_items_of_their_own_are_compared_within_them(folders):
    ours = {
        seed: folders(f"a{seed}", [i % 3 != 0 for i in range(60)], prefix=f"s{seed}")
        for seed in (0, 1, 2)
    }
    theirs = {
        seed: folders(f"b{seed}", [i % (2 + seed) == 0 for i in range(60)], prefix=f"s{seed}")
        for seed in (0, 1, 2)
    }
    with pytest.raises(ValueError, match="no item in common"):
        compare_seeds(ours, theirs, "quiz")
    entry = compare_within_seeds(ours, theirs, "quiz")["accuracy"]
    each = [2 / 3 - share for share in (1 / 2, 1 / 3, 1 / 4)]
    assert entry["difference"] == pytest.approx(np.mean(each)) and entry["p"] == pytest.approx(
        stats.ttest_1samp(each, 0).pvalue
    )
    assert entry["n"] == 180
    with pytest.raises(ValueError, match="share fewer than two seeds"):
        compare_within_seeds({0: ours[0]}, theirs, "quiz")
    mean = plain_average(list(theirs.values()))["quiz"]["accuracy"]
    assert (
        mean["value"] == pytest.approx(13 / 36)
        and mean["stderr"] is None
        and mean["spread"] > 0
        and mean["runs"] == 3
    )
