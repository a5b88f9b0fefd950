from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt.mixture.plan import make_plan, resolve_ratios

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(lambda weights: weights[0] > 0),
    seq_len=st.integers(1, 40),
    sequences=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_sequences_are_full_shares_exact_and_epochs_complete(lengths, weights, seq_len, sequences, seed):
    sources = {f"s{number}": np.array(values) for number, values in enumerate(lengths)}
    ratios = resolve_ratios({name: float(weight) for name, weight in zip(sources, weights, strict=False)})
    plan = make_plan(sources, ratios, seq_len, sequences, seed)
    total = seq_len * sequences
    used = Counter()
    served = {name: Counter() for name in plan.sources}
    for index in range(sequences):
        pieces = plan.sequence(index)
        assert sum(piece.end - piece.start for piece in pieces) == seq_len
        for piece in pieces:
            name = plan.sources[piece.source]
            assert 0 <= piece.start < piece.end <= sources[name][piece.document]
            used[name] += piece.end - piece.start
            served[name].update((piece.document, position) for position in range(piece.start, piece.end))
    for name, ratio in ratios.items():
        assert abs(used[name] - ratio * total) < 1
    for name, counts in served.items():  # a token is served again only once every other has been served as often
        unique = int(sources[name].sum())
        times = used[name] // unique
        assert all(counts[token] in (times, times + 1) for token in counts)
        assert len(counts) == min(unique, used[name])


def test_the_share_holds_all_along_the_run():
    random = np.random.default_rng(0)
    sources = {"raw": random.integers(50, 400, 4000), "instruction": random.integers(100, 900, 2000)}
    plan = make_plan(sources, {"raw": 0.7, "instruction": 0.3}, 1024, 1000, seed=1)
    sizes = plan.pieces[:, 3] - plan.pieces[:, 2]
    for percent in range(1, 101):
        pieces = plan.boundaries[percent * 10]
        share = sizes[:pieces][plan.pieces[:pieces, 0] == 1].sum() / (percent * 10 * 1024)
        assert abs(share - 0.3) * percent * 10 * 1024 <= 900  # never further off than one document
    assert plan.report()["instruction"]["realised"] == pytest.approx(0.3, abs=1e-6)


def test_the_order_is_random_by_seed_and_the_plan_repeats():
    lengths = {"raw": np.full(50, 10)}
    plans = [make_plan(lengths, {"raw": 1.0}, 100, 5, seed) for seed in (0, 0, 1)]
    assert (plans[0].pieces == plans[1].pieces).all()
    assert (plans[0].pieces != plans[2].pieces).any()


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
    with pytest.raises(ValueError, match="source a has no tokens"):
        make_plan({"a": np.array([0])}, {"a": 1.0}, 8, 1, 0)
