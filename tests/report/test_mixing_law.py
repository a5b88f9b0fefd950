import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.report.mixing_law import MIN_RATIOS, Point, fit_law
from tests.examples import examples

FIVE = np.linspace(0, 1, 5)


def points(ratios, curve, random, seeds=1, noise=0.0, taste=0.0, items=200) -> list[Point]:
    """Runs of a known curve: `noise` of each training, `taste` of each item for each ratio, and
    items that are as hard for all.
    """
    hardness = random.normal(0, 1, items)
    runs = []
    for ratio in ratios:
        liked = random.normal(0, taste, items)
        for _ in range(seeds):
            shares = curve(ratio) + hardness + liked + random.normal(0, noise)
            runs.append(Point(float(ratio), float(shares.mean()), shares - shares.mean()))
    return runs


@pytest.mark.parametrize(
    ("seeds", "count", "noise", "taste"),
    [(3, 5, 0.01, 0.2), (1, 9, 0.01, 0.2), (2, 5, 0.02, 0.0), (1, 5, 0.01, 0.1)],
)
def test_the_interval_of_the_best_ratio_holds_the_true_one(seeds, count, noise, taste):
    """Nominally 95%; of 60 trials 50 and fewer would come by chance in less than 1 of 1,000."""
    random = np.random.default_rng(seeds * 100 + count)
    held, shown = 0, 0
    for trial in range(60):
        runs = points(
            np.linspace(0, 1, count),
            lambda ratio: 2 + 0.3 * (ratio - 0.4) ** 2,
            random,
            seeds,
            noise,
            taste,
        )
        law = fit_law(runs, -1, samples=100, seed=trial)
        held += law.best_low <= 0.4 <= law.best_high
        shown += not law.is_flat
    assert held > 50 and shown > 30


def test_a_flat_line_is_called_flat():
    random = np.random.default_rng(0)
    laws = [
        fit_law(points(FIVE, lambda ratio: 2.0, random, 2, 0.02, 0.1), 1, samples=100, seed=trial)
        for trial in range(60)
    ]
    assert sum(not law.is_flat for law in laws) <= 10  # 3 expected


def test_runs_that_are_all_the_same_show_nothing():
    law = fit_law([Point(float(ratio), 0.25) for ratio in FIVE], 1)
    assert law.is_flat and law.p == 1 and np.allclose(law.curve, 0.25)


@pytest.mark.parametrize(("better", "edge"), [(1, "highest"), (-1, "lowest")])
def test_what_only_rises_is_best_at_an_edge(better, edge):
    law = fit_law(
        points(FIVE, lambda ratio: 1 - np.exp(-3 * ratio), np.random.default_rng(1), noise=0.005),
        better,
    )
    assert law.edge == edge and not law.is_flat
    assert (
        law.best in (law.best_low, law.best_high)
        and law.best == {"lowest": 0.0, "highest": 1.0}[edge]
    )


def test_each_law_is_found_where_it_is_the_true_one():
    ratios = np.linspace(0.1, 0.9, 6)
    exponential = fit_law([Point(float(r), 2.5 + 0.7 * np.exp(-2 * r)) for r in ratios], -1)
    assert "exp" in exponential.formula and np.allclose(
        exponential.curve, 2.5 + 0.7 * np.exp(-2 * exponential.ratios), atol=2e-3
    )
    parabola = fit_law([Point(float(r), 2.5 + 0.7 * (r - 0.3) ** 2) for r in ratios], -1)
    assert parabola.formula == "2.563 −0.42·r +0.7·r²" and parabola.edge == ""
    assert parabola.best == pytest.approx(0.3, abs=0.002) and parabola.at_best == pytest.approx(
        2.5, abs=1e-4
    )
    assert parabola.best_low == parabola.best == parabola.best_high  # nothing is left over


def test_nothing_is_said_beyond_what_was_tried():
    law = fit_law([Point(r, (r - 0.9) ** 2) for r in (0.2, 0.3, 0.4, 0.5)], -1)
    assert (law.ratios[0], law.ratios[-1], law.best, law.edge) == (0.2, 0.5, 0.5, "highest")


def test_fewer_than_four_ratios_are_no_data_for_a_law():
    with pytest.raises(AssertionError, match="four ratios"):
        fit_law([Point(float(r), 1.0) for r in (0, 0.5, 0.5, 1)], 1)
    assert MIN_RATIOS == 4


def test_hard_items_that_are_hard_for_all_do_not_blur_the_best_ratio():
    """The level depends on the items; where the best is does not."""
    law = fit_law(points(FIVE, lambda ratio: (ratio - 0.5) ** 2, np.random.default_rng(2)), -1)
    assert np.ptp([law.low[100], law.high[100]]) > 0.2 and law.best_high - law.best_low < 0.02


@examples(25)
@given(st.floats(-50, 50), st.floats(0.1, 20), st.sampled_from([1, -1]))
def test_units_do_not_matter(shift, scale, better):
    values = [1.0, 1.4, 1.5, 1.2, 0.7]
    plain = fit_law(
        [Point(float(r), v) for r, v in zip(FIVE, values, strict=True)], better, samples=50
    )
    other = fit_law(
        [Point(float(r), shift + scale * v) for r, v in zip(FIVE, values, strict=True)],
        better,
        samples=50,
    )
    assert other.best == plain.best and np.allclose(
        other.curve, shift + scale * plain.curve, atol=1e-6 * (abs(shift) + scale)
    )
