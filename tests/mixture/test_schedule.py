import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import MixtureConfig, SchedulePoint
from ipt.mixture.quotas import Quotas, cap_shares
from ipt.mixture.schedule import (
    Schedule,
    read_schedule,
    resolve_ratios,
    schedule_points,
    used_sources,
)
from tests.examples import examples


@st.composite
def schedules(draw):
    moments = sorted(draw(st.sets(st.integers(0, 20), min_size=1, max_size=4)))
    sources = draw(st.integers(1, 4))
    rows = draw(
        st.lists(
            st.lists(st.integers(0, 3), min_size=sources, max_size=sources).filter(any),
            min_size=4,
            max_size=4,
        )
    )
    shares = np.array(rows[: len(moments)], float)
    names = [f"s{number}" for number in range(sources)]
    return Schedule(
        names,
        np.array(moments) / 20,
        shares / shares.sum(axis=1, keepdims=True),
        draw(st.booleans()),
    )


def _share_at(schedule, moment):
    """The shares at a moment, the plain way."""
    if schedule.linear:
        return np.array([np.interp(moment, schedule.at, column) for column in schedule.shares.T])
    return schedule.shares[max(0, int(np.searchsorted(schedule.at, moment, side="right")) - 1)]


@examples(60)
@given(schedule=schedules(), moment=st.floats(0, 1))
def test_the_integral_is_that_of_the_shares(schedule, moment):
    steps = 2000
    summed = (
        sum(_share_at(schedule, (step + 0.5) / steps * moment) for step in range(steps))
        / steps
        * moment
    )
    found = schedule.integral(np.array([moment]))[0]
    assert found == pytest.approx(summed, abs=2e-3)
    assert found.sum() == pytest.approx(moment)


@examples(200)
@given(schedule=schedules(), total=st.integers(1, 300))
def test_quotas_sum_up_never_fall_and_stay_with_the_integral(schedule, total):
    quotas = Quotas(schedule, total)
    positions = np.arange(total + 1)
    rows = quotas.at(positions)
    assert (rows.sum(axis=1) == positions).all()
    assert (np.diff(rows, axis=0) >= 0).all()
    assert np.abs(rows - quotas.exact(positions)).max() < 1.5
    alone = quotas.at(np.array([total // 2]))
    assert (alone[0] == rows[total // 2]).all()


def test_linear_and_step_schedules_by_hand():
    points = [
        SchedulePoint(0.0, {"raw": 1.0}),
        SchedulePoint(0.5, {"raw": None, "instruction": 0.5}),
    ]
    step = read_schedule(MixtureConfig(schedule=points))
    assert step.sources == ["raw", "instruction"]
    assert step.integral(np.array([0.25, 0.5, 1.0])).tolist() == [
        [0.25, 0.0],
        [0.5, 0.0],
        [0.75, 0.25],
    ]
    linear = read_schedule(MixtureConfig(schedule=points, interpolation="linear"))
    assert linear.integral(np.array([0.5, 1.0])).tolist() == [[0.375, 0.125], [0.625, 0.375]]


def test_a_trillion_tokens_are_counted_exactly():
    schedule = read_schedule(MixtureConfig(ratios={"a": 0.7, "b": 0.2, "c": 0.1}))
    positions = np.arange(0, 10**12 + 1, 10**12 // 64)
    rows = Quotas(schedule, 10**12).at(positions)
    assert (rows.sum(axis=1) == positions).all()
    assert np.abs(rows - np.outer(positions, [0.7, 0.2, 0.1])).max() < 1.5


def test_capped_sources_give_their_cap_and_the_others_share_the_rest():
    schedule = read_schedule(MixtureConfig(ratios={"a": 0.5, "b": 0.25, "c": 0.2, "d": 0.05}))
    kept = cap_shares(schedule, {"a": 100.0}, 1000)
    assert kept.mean().tolist() == pytest.approx([0.1, 0.45, 0.36, 0.09])
    # the rest of a lifts b over its own cap
    kept = cap_shares(schedule, {"a": 100.0, "b": 400.0}, 1000)
    assert kept.mean().tolist() == pytest.approx([0.1, 0.4, 0.4, 0.1])
    with pytest.raises(ValueError, match=r"no more of a, b, c, d than mixture\.max_repeats allows"):
        cap_shares(schedule, dict.fromkeys("abcd", 10.0), 1000)
    halves = [SchedulePoint(0.0, {"a": 1.0}), SchedulePoint(0.5, {"a": 0.5, "b": 0.5})]
    with pytest.raises(ValueError, match="no source is left"):
        cap_shares(read_schedule(MixtureConfig(schedule=halves)), {"a": 100.0}, 1000)


def test_ratios():
    assert resolve_ratios({"raw": None, "instruction": 0.25}) == {"raw": 0.75, "instruction": 0.25}
    assert resolve_ratios({"raw": None, "instruction": 1.0}) == {"raw": 0.0, "instruction": 1.0}
    assert resolve_ratios({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    with pytest.raises(ValueError, match=r"mixture.ratios.a=-1"):
        resolve_ratios({"a": -1.0, "b": 2.0})
    with pytest.raises(ValueError, match="sum to 0"):
        resolve_ratios({"a": 0.0, "b": 0.0})
    with pytest.raises(ValueError, match="only one source can take the rest"):
        resolve_ratios({"a": None, "b": None})
    with pytest.raises(ValueError, match="zero or more"):
        resolve_ratios({"a": float("nan")})


def test_the_sources_of_a_schedule_are_those_of_all_its_points():
    points = [
        SchedulePoint(0.0, {"raw": 1.0, "never": 0.0}),
        SchedulePoint(0.5, {"instruction": 1.0}),
    ]
    assert used_sources(MixtureConfig(ratios={"other": 1.0}, schedule=points)) == [
        "raw",
        "instruction",
    ]
    assert used_sources(MixtureConfig(ratios={"raw": None, "instruction": 1.0})) == ["instruction"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "words"}, "mixture.unit=words: must be one of tokens, documents"),
        ({"packing": "best"}, "mixture.packing=best: must be one of concat, best_fit"),
        ({"subsample": {"a": 0.0}}, r"mixture.subsample.a=0.0: must be above 0"),
        (
            {"subsample": {"a": 0.5}, "match_tokens": 100},
            r"mixture.match_tokens=100 and mixture.subsample.a=0.5",
        ),
        ({"match_tokens": 0}, "mixture.match_tokens=0: must be at least 1"),
        (
            {"schedule": [SchedulePoint(1.5, {"a": 1.0})]},
            r"mixture.schedule\[0\].at=1.5: must be a share",
        ),
        (
            {"schedule": [SchedulePoint(0.5, {"a": 1.0}), SchedulePoint(0.5, {"a": 1.0})]},
            r"schedule\[1\].at=0.5: must come after",
        ),
        (
            {"schedule": [SchedulePoint(0.5, {"a": -1.0})]},
            r"mixture.schedule\[0\].ratios.a=-1.0: a ratio must be",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule_points(MixtureConfig(**{"ratios": {"a": 1.0}, **settings}))
