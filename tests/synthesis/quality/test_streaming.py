import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.synthesis.quality.streaming import (
    BloomFilter,
    DistinctCount,
    FrequentCount,
    Histogram,
    ReservoirSample,
    share,
    wilson_interval,
)


@given(st.lists(st.text(max_size=3), max_size=60))
def test_distinct_texts_are_counted_exactly_while_they_fit(texts):
    count = DistinctCount(kept=60)
    for text in texts:
        count.add(text)
    assert count.result() == len(set(texts))


def test_many_distinct_texts_are_estimated_in_bounded_memory():
    count = DistinctCount(kept=2000)
    for number in range(50_000):
        count.add(str(number))
        count.add(str(number // 2))  # all of them came before
        assert len(count._hashes) <= 2000
    assert count.result() != 50_000  # it is an estimate, not a list
    assert count.result() == pytest.approx(50_000, rel=0.1)


def test_frequent_texts_are_counted_exactly_while_all_fit_and_survive_when_not():
    drawn = random.Random(0).choices(
        ["often", "at times", *map(str, range(5000))], [3000, 1000, *[1] * 5000], k=20_000
    )
    exact, bounded = FrequentCount(), FrequentCount(kept=400)
    before = Counter()
    for text in drawn:
        assert exact.add(text) == before[text]
        before[text] += 1
        bounded.add(text)
        assert len(bounded._counts) <= 400
    assert exact.most_common(2) == Counter(drawn).most_common(2)
    assert [text for text, _ in bounded.most_common(2)] == ["often", "at times"]
    assert all(
        0.99 * before[text] <= count <= before[text] for text, count in bounded.most_common(2)
    )


def test_seen_knows_all_that_came_and_hardly_anything_else():
    seen = BloomFilter(10_000)
    assert sum(seen.add(f"first {number}") for number in range(10_000)) < 10
    assert all(seen.add(f"first {number}") for number in range(10_000))


def test_a_sample_is_even_and_repeatable():
    def drawn(seed):
        sample = ReservoirSample(10, seed)
        for number in range(100):
            sample.add(number)
        return sample.items

    assert drawn(1) == drawn(1) != drawn(2)
    times = Counter(number for seed in range(400) for number in drawn(seed))
    # 40 are expected of each
    assert len(times) == 100 and all(15 < count < 75 for count in times.values())


def test_a_histogram_has_every_value_in_one_bin():
    histogram = Histogram((0, 1, 5))
    for value in (0, 1, 4, 5, 1000):
        histogram.add(value)
    assert histogram.result() == {"edges": [0, 1, 5], "counts": [1, 2, 2]}


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson_interval(0, 0) is None and share(1, 0) is None
