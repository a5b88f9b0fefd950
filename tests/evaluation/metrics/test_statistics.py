import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.evaluation.metrics import statistics

floats = st.floats(-100, 100)


def test_mean_by_hand():
    metric = statistics.mean([1.0, 2.0, 3.0, 6.0])
    assert metric.value == 3.0
    assert metric.stderr == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    assert metric.ci95 == pytest.approx(
        (3 - 1.959964 * metric.stderr, 3 + 1.959964 * metric.stderr), rel=1e-6
    )


def test_one_item_has_no_spread():
    entry = statistics.mean([2.0]).as_dict()
    assert entry == {"value": 2.0, "stderr": None, "ci95": [None, None], "n": 1}


# 6 of 20: solved by hand from |p - share| = z * sqrt(p (1 - p) / n), to which a Wilson bound p is
# the root.
@pytest.mark.parametrize(("successes", "n"), [(6, 20), (1, 3), (99, 100), (500, 1000)])
def test_wilson_bounds_solve_the_score_equation(successes, n):
    share = successes / n
    for bound in statistics.wilson(successes, n):
        assert abs(bound - share) == pytest.approx(
            1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        )


def test_wilson_at_the_ends():
    low, high = statistics.wilson(0, 10)
    assert low == 0.0 and high == pytest.approx(3.841458820694124 / 13.841458820694124)
    assert statistics.wilson(10, 10) == pytest.approx((1 - high, 1.0))


def test_a_proportion_is_a_mean_with_a_wilson_interval():
    right = [True, False, True, True]
    metric, plain = statistics.proportion(right), statistics.mean(np.array(right, float))
    assert (metric.value, metric.stderr) == (plain.value, plain.stderr)
    assert metric.ci95 == statistics.wilson(3, 4) != plain.ci95


def test_ratio_weighs_by_denominator_and_clusters_by_item():
    nll, tokens = [10.0, 30.0, 2.0], [5.0, 10.0, 1.0]
    metric = statistics.ratio(nll, tokens)
    assert metric.value == pytest.approx(42 / 16)
    # Textbook variance of a ratio estimator: D/(D-1) * sum((x - r w)^2) / (sum w)^2
    residual = [10 - 2.625 * 5, 30 - 2.625 * 10, 2 - 2.625]
    assert metric.stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residual)) / 16)


def test_exponential_maps_value_and_interval():
    metric = statistics.mean([0.9, 1.1, 1.3, 0.7])
    result = statistics.exponential(metric)
    assert result.value == pytest.approx(math.e)
    assert result.stderr == pytest.approx(math.e * metric.stderr)
    assert result.ci95 == pytest.approx(tuple(np.exp(metric.ci95)))


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=30))
def test_paired_difference_of_means_is_the_mean_of_differences(pairs):
    a, b = np.array(pairs).T
    result, direct = (
        statistics.difference(statistics.mean(a), statistics.mean(b)),
        statistics.mean(a - b),
    )
    assert result.difference == pytest.approx(direct.value, abs=1e-9)
    assert result.stderr == pytest.approx(direct.stderr, abs=1e-9)
    assert result.ci95 == pytest.approx(direct.ci95, abs=1e-9)


def test_pairing_sees_what_separate_errors_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)  # items differ far more than models do
    a, b = hard + 0.2 + rng.normal(0, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    result = statistics.difference(statistics.mean(a), statistics.mean(b))
    assert result.stderr < 0.02 < statistics.mean(a).stderr
    assert result.p < 1e-6


def test_normal_p_matches_the_table():
    assert statistics.normal_p(1.959963984540054, 1.0) == pytest.approx(0.05)
    assert statistics.normal_p(-2.5758293035489004, 1.0) == pytest.approx(0.01)
    assert statistics.normal_p(0.0, 0.0) == 1.0 and statistics.normal_p(0.1, 0.0) == 0.0


def test_mcnemar_by_hand():
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(1, 1) == 1.0
    assert statistics.mcnemar(5, 0) == statistics.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert statistics.mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_accuracies_are_compared_exactly():
    a, b = [1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1]
    result = statistics.difference(statistics.proportion(a), statistics.proportion(b))
    assert result.difference == pytest.approx(5 / 7)
    assert result.p == pytest.approx(2 / 32)


def test_ratio_difference_agrees_with_a_bootstrap():
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 400, 300)
    quality = rng.normal(3, 0.5, 300)
    a, b = (
        (quality - 0.1 + rng.normal(0, 0.1, 300)) * tokens,
        (quality + rng.normal(0, 0.1, 300)) * tokens,
    )
    result = statistics.difference(statistics.ratio(a, tokens), statistics.ratio(b, tokens))
    samples = rng.integers(0, 300, (4000, 300))
    boot = a[samples].sum(1) / tokens[samples].sum(1) - b[samples].sum(1) / tokens[samples].sum(1)
    assert result.stderr == pytest.approx(boot.std(), rel=0.08)


def test_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(2).normal(size=50)
    assert statistics.mean(x).stderr == pytest.approx(scipy.sem(x))


# F1 of classes
# ----------------------------------------------------------------------------------------------

classes = st.integers(0, 3)


@given(
    st.lists(st.tuples(classes, classes), min_size=1, max_size=30),
    st.sampled_from(["macro", "weighted"]),
)
def test_f1_is_scikit_learns(pairs, average):
    sklearn = pytest.importorskip("sklearn.metrics")
    answers, gold = zip(*pairs, strict=True)
    metric = statistics.f1(answers, gold, average)
    assert metric.value == pytest.approx(
        sklearn.f1_score(gold, answers, average=average, zero_division=0.0)
    )
    assert metric.influence.mean() == pytest.approx(0, abs=1e-12)


def drawn_classes(n=300, seed=0):
    """Answers that are right two times in three, for classes of different sizes."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    return np.where(rng.random(n) < 0.67, gold, rng.integers(0, 4, n)), gold


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_f1_influence_is_that_of_a_jackknife(average):
    answers, gold = drawn_classes()
    metric, n = statistics.f1(answers, gold, average), len(gold)
    without = [
        statistics.f1(np.delete(answers, item), np.delete(gold, item), average).value
        for item in range(n)
    ]
    assert metric.influence == pytest.approx(
        (n - 1) * (metric.value - np.array(without)), rel=0.2, abs=0.02
    )
    rng = np.random.default_rng(1)
    boot = [
        statistics.f1(answers[drawn], gold[drawn], average).value
        for drawn in rng.integers(0, n, (1000, n))
    ]
    assert metric.stderr == pytest.approx(np.std(boot), rel=0.1)


def test_mean_of_groups_by_hand():
    values = np.array([1.0, 3.0, 10.0, 0.0, 20.0, 30.0])
    metric = statistics.mean_of_groups(
        ["a", "a", "b", "b", "b", "b"], lambda items: statistics.mean(values[items])
    )
    assert metric.value == pytest.approx((2 + 15) / 2) and metric.n == 6
    # Each group a sample of its own: the variances of their means add up (here with n, not n - 1,
    # in each).
    expected = math.sqrt(6 / 5 * (1 / 2 + values[2:].var() / 4)) / 2
    assert metric.stderr == pytest.approx(expected)
