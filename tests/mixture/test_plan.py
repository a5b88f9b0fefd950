import io
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ipt.config import MixtureConfig, SchedulePoint
from ipt.mixture import plan as planning
from ipt.mixture.plan import make_plan
from ipt.mixture.report import plan_report
from ipt.mixture.schedule import resolve_ratios
from ipt.mixture.table import mixture_table
from tests.examples import examples
from tests.mixture.lengths import Lengths, log_normal

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


def _config(**settings):
    return MixtureConfig(**{"ratios": {"raw": 0.7, "instruction": 0.3}, "seq_len": 64, **settings})


@examples(100)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(
        lambda weights: weights[0] > 0
    ),
    seq_len=st.integers(2, 40),
    sequences=st.integers(1, 30),
    seed=st.integers(0, 3),
    packing=st.sampled_from(["concat", "best_fit"]),
    block=st.integers(1, 12),
    spare=st.integers(2, 6),
)
def test_every_token_of_a_pass_is_served_once_and_shares_are_exact(
    lengths, weights, seq_len, sequences, seed, packing, block, spare
):
    sources = {f"s{number}": Lengths(values) for number, values in enumerate(lengths)}
    ratios = resolve_ratios(
        {name: float(weight) for name, weight in zip(sources, weights, strict=False)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BLOCK", block)
        patch.setattr(planning, "SPARE", spare)
        plan = make_plan(
            sources,
            MixtureConfig(ratios=dict(ratios), seq_len=seq_len, packing=packing),
            sequences,
            seed,
        )
        rows = [plan.sequence(index) for index in range(sequences)]
    used, served = Counter(), {name: Counter() for name in plan.sources}
    for pieces in rows:
        filled = sum(piece.end - piece.start for piece in pieces)
        assert filled == seq_len if packing == "concat" else filled <= seq_len
        for piece in pieces:
            name = plan.sources[piece.source]
            assert (
                0
                <= piece.start
                < piece.end
                <= piece.length
                == sources[name].lengths[piece.document]
            )
            used[name] += piece.end - piece.start
            served[name].update(
                (piece.document, position) for position in range(piece.start, piece.end)
            )
    assert used.total() == plan.tokens
    for name, ratio in ratios.items():
        assert abs(used[name] - ratio * plan.tokens) < (1.5 if packing == "concat" else 4 * 30)
    for name, counts in served.items():
        # a token is served again only once every other has been served as often
        unique = sources[name].n_tokens
        times = used[name] // unique
        assert all(counts[token] in (times, times + 1) for token in counts)
        assert len(counts) == min(unique, used[name])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_share_holds_at_every_percent_of_the_run(packing):
    sources = {"raw": log_normal(30_000, 500), "instruction": log_normal(8000, 900, seed=1)}
    plan = make_plan(sources, _config(seq_len=256, packing=packing), 25_600, seed=1)
    used = np.zeros((25_600, 2))
    for index in range(25_600):
        for piece in plan.sequence(index):
            used[index, piece.source] += piece.end - piece.start
    reached = np.cumsum(used, axis=0)[255::256]
    shares = reached[:, 1] / reached.sum(axis=1)
    assert len(shares) == 100
    tokens = reached.sum(axis=1)
    longest = max(store.lengths.max() for store in sources.values())
    # never further off than one document (piece)
    assert (np.abs(shares - 0.3) * tokens <= (longest if packing == "concat" else 256)).all()
    assert np.abs(shares[9:] - 0.3).max() < 1e-3  # from 650,000 tokens on
    assert plan_report(plan)["sources"]["instruction"]["realised"] == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_block_derived_alone_is_the_block_derived_after_all_before_it(packing):
    sources = {"raw": log_normal(3000, 100), "instruction": log_normal(20, 90, seed=1)}
    one, other = (make_plan(sources, _config(packing=packing), 4096, seed=1) for _ in range(2))
    assert one.n_blocks == 16
    for number in range(16):
        one.block(number)
    for number in (15, 7, 0):
        assert (one.block(number).pieces == other.block(number).pieces).all()
        assert (one.block(number).bounds == other.block(number).bounds).all()


def test_the_order_is_random_by_seed_and_the_plan_repeats():
    stores = {"raw": Lengths(np.full(50, 10))}
    plans = [
        make_plan(stores, MixtureConfig(ratios={"raw": 1.0}, seq_len=100), 5, seed).block(0).pieces
        for seed in (0, 0, 1)
    ]
    assert (plans[0] == plans[1]).all()
    assert (plans[0] != plans[2]).any()


@examples(20)
@given(
    mean=st.integers(20, 300),
    sigma=st.floats(0.8, 1.2),
    sources=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_best_fit_cuts_no_document_that_fits_and_pads_under_two_percent(mean, sigma, sources, seed):
    stores = {
        f"s{number}": log_normal(4000, mean, sigma, seed + number) for number in range(sources)
    }
    config = MixtureConfig(ratios=dict.fromkeys(stores, 1.0), seq_len=1024, packing="best_fit")
    plan = make_plan(stores, config, 1000, seed)
    report = plan_report(plan)
    assert report["exact_cuts"]
    assert all(row["split_short_documents"] == 0 for row in report["sources"].values())
    assert report["padding"] == 1000 * 1024 - report["tokens"]
    assert 0 < report["padding"] < 0.02 * 1000 * 1024


def test_best_fit_splits_long_documents_counts_them_and_cuts_what_finds_no_room():
    plan = make_plan(
        {"raw": Lengths([1000] * 40)},
        MixtureConfig(ratios={"raw": 1.0}, seq_len=300, packing="best_fit"),
        128,
        seed=0,
    )
    row = plan_report(plan)["sources"]["raw"]
    pieces = np.concatenate([plan.block(number).pieces for number in range(plan.n_blocks)])
    assert row["split_documents"] == len(set(pieces[:, 1])) and row["split_short_documents"] == 0
    assert row["truncated"] == (pieces[:, 3] < 1000).sum()
    assert {300, 100} == set((pieces[:, 3] - pieces[:, 2]).tolist())
    two_thirds = make_plan(
        {"raw": Lengths([200] * 400)},
        MixtureConfig(ratios={"raw": 1.0}, seq_len=300, packing="best_fit"),
        128,
        seed=0,
    )
    cut = plan_report(two_thirds)["sources"]["raw"]["split_short_documents"]
    assert 0.3 < cut / 190 < 0.4  # no two fit one sequence, so every third is cut in two


def test_long_documents_do_not_all_come_first():
    plan = make_plan(
        {"raw": log_normal(4000, 200)},
        MixtureConfig(ratios={"raw": 1.0}, seq_len=512, packing="best_fit"),
        256,
        seed=0,
    )
    longest = [
        max(piece.end - piece.start for piece in plan.sequence(index)) for index in range(256)
    ]
    first = [plan.sequence(index)[0].end - plan.sequence(index)[0].start for index in range(256)]
    assert abs(np.corrcoef(longest, np.arange(256))[0, 1]) < 0.2
    assert np.mean(np.equal(first, longest)) < 0.8


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_schedule_is_followed(packing):
    points = [
        SchedulePoint(0.0, {"raw": 0.7, "instruction": 0.3}),
        SchedulePoint(0.5, {"raw": 0.3, "instruction": 0.7}),
    ]
    sources = {"raw": log_normal(3000, 100), "instruction": log_normal(3000, 100, seed=1)}
    plan = make_plan(sources, _config(schedule=points, packing=packing), 256 * 20, seed=0)
    half = plan.read_until(10)
    assert half[1] / half.sum() == pytest.approx(0.3, abs=2e-3)
    second = plan.read_until(20) - half
    assert second[1] / second.sum() == pytest.approx(0.7, abs=2e-3)
    report = plan_report(plan)
    assert report["course"][49]["tokens"]["instruction"] / sum(
        report["course"][49]["tokens"].values()
    ) == pytest.approx(0.3, abs=1e-4)
    assert report["sources"]["instruction"]["requested"] == pytest.approx(0.5)


def test_concat_follows_a_schedule_within_a_block_too():
    points = [
        SchedulePoint(0.0, {"raw": 0.7, "instruction": 0.3}),
        SchedulePoint(0.5, {"raw": 0.0, "instruction": 1.0}),
    ]
    sources = {"raw": Lengths([20] * 500), "instruction": Lengths([20] * 500)}
    plan = make_plan(sources, _config(schedule=points), 100, seed=0)
    assert plan.n_blocks == 1
    used = np.zeros((100, 2))
    for index in range(100):
        for piece in plan.sequence(index):
            used[index, piece.source] += piece.end - piece.start
    assert used[:50, 1].sum() == pytest.approx(0.3 * 50 * 64, abs=20)
    assert used[50:, 0].sum() <= 20


def test_repetition_caps():
    sources = {
        "raw": Lengths([10] * 1000),
        "instruction": Lengths([10] * 100),
        "general": Lengths([10] * 1000),
    }
    config = {
        "ratios": {"raw": 0.4, "instruction": 0.4, "general": 0.2},
        "max_repeats": {"instruction": 2},
        "seq_len": 100,
    }
    with pytest.raises(
        ValueError,
        match=(
            r"mixture.max_repeats.instruction=2: this run would read source instruction 4.00 times"
        ),
    ):
        make_plan(sources, MixtureConfig(**config), 100, 0)
    plan = make_plan(sources, MixtureConfig(**config, on_max_repeats="renormalise"), 100, 0)
    rows = plan_report(plan)["sources"]
    assert {name: row["tokens"] for name, row in rows.items()} == pytest.approx(
        {"raw": 5333, "instruction": 2000, "general": 2667}, abs=1
    )
    assert rows["instruction"]["repeats"] == pytest.approx(2, abs=1e-3)
    assert rows["instruction"]["requested"] == pytest.approx(0.4)
    assert plan.notes == [
        "instruction: 40.00% were asked for, 20.00% it gets: mixture.max_repeats.instruction=2; "
        "the others share the rest"
    ]
    plan = make_plan(sources, MixtureConfig(**config, on_max_repeats="repeat"), 100, 0)
    assert plan_report(plan)["sources"]["instruction"]["repeats"] == pytest.approx(4)
    assert plan.notes == ["instruction: read 4.00 times, above mixture.max_repeats.instruction=2"]
    assert make_plan(sources, MixtureConfig(**config), 40, 0).notes == []


def test_repeats_match_those_of_a_longer_run():
    sources = {"raw": log_normal(20_000, 50), "instruction": log_normal(4000, 50, seed=1)}
    long = plan_report(make_plan(sources, _config(), 16_000, 0))["sources"]
    plan = make_plan(sources, _config(match_tokens=16_000 * 64), 1600, 0)
    short = plan_report(plan)["sources"]
    for name in sources:
        assert short[name]["repeats"] == pytest.approx(long[name]["repeats"], rel=0.1)
        assert short[name]["documents"] == pytest.approx(len(sources[name]) / 10, rel=0.1)
    assert plan.notes[0] == (
        "raw: 10.00% of its documents are used, so that it repeats as in a run of 1,024,000 tokens"
    )
    # a match with a shorter run uses all there is
    shorter = make_plan(sources, _config(match_tokens=16), 1600, 0)
    assert shorter.notes == []
    one = plan_report(make_plan(sources, _config(subsample={"instruction": 0.5}), 160, 0))[
        "sources"
    ]
    assert one["raw"]["documents"] == 20_000
    assert one["instruction"]["documents"] == pytest.approx(2000, rel=0.1)


def test_shares_of_documents_become_shares_of_tokens():
    sources = {"raw": Lengths([30] * 500), "instruction": Lengths([10] * 500)}
    plan = make_plan(
        sources,
        _config(ratios={"raw": 0.5, "instruction": 0.5}, unit="documents", seq_len=60),
        100,
        0,
    )
    rows = plan_report(plan)["sources"]
    assert rows["raw"]["realised"] == pytest.approx(0.75)
    assert rows["raw"]["requested"] == pytest.approx(0.75)
    assert (
        rows["raw"]["requested_of_documents"]
        == rows["raw"]["realised_of_documents"]
        == pytest.approx(0.5)
    )
    pieces = plan.block(0).pieces
    begun = pieces[pieces[:, 2] == 0, 0]
    assert (begun == 0).sum() == pytest.approx((begun == 1).sum(), abs=1)


def test_the_table_says_what_the_report_says():
    points = [SchedulePoint(0.0, {"raw": 1.0}), SchedulePoint(1.0, {"instruction": 1.0})]
    sources = {"raw": log_normal(3000, 100), "instruction": log_normal(300, 100, seed=1)}
    config = _config(
        schedule=points,
        interpolation="linear",
        packing="best_fit",
        subsample={"raw": 0.5},
        unit="documents",
    )
    report = plan_report(make_plan(sources, config, 1000, 0))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(mixture_table(report))
    text = console.export_text()
    assert f"{report['padding']:,} tokens of padding" in text
    assert "raw: 50.00% of its documents are used" in text
    assert "to 100%" in text and "of documents requested" in text
    for row in report["sources"].values():
        assert f"{row['tokens']:,}" in text and f"{row['unique_tokens']:,}" in text


def test_cuts_of_a_long_run_are_estimated_and_said_to_be():
    sources = {"raw": log_normal(3000, 100)}
    config = MixtureConfig(ratios={"raw": 1.0}, seq_len=64)
    counted = plan_report(make_plan(sources, config, 256 * 80, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipt.mixture.report.COUNTED", 70)
        estimated = plan_report(make_plan(sources, config, 256 * 80, 0))
    assert counted["exact_cuts"] and not estimated["exact_cuts"]
    assert estimated["sources"]["raw"]["truncated"] == pytest.approx(
        counted["sources"]["raw"]["truncated"], rel=0.02
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(mixture_table(estimated))
    assert f"≈{estimated['sources']['raw']['truncated']:,}" in console.export_text()


def test_memory_does_not_grow_with_the_run():
    sources = {"raw": log_normal(3000, 500), "instruction": log_normal(500, 900, seed=1)}
    peaks = []
    for sequences in (10_000, 10**9):
        tracemalloc.start()
        plan = make_plan(sources, _config(seq_len=2048), sequences, 0)
        for index in (0, sequences // 2, sequences - 1):
            plan.sequence(index)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_source_without_tokens_is_told():
    with pytest.raises(
        ValueError, match="source a has no tokens, but the mixture gives it a share"
    ):
        make_plan({"a": Lengths([0])}, MixtureConfig(ratios={"a": 1.0}, seq_len=8), 1, 0)
    with pytest.raises(
        ValueError, match=r"source a has no tokens in the 0.01% of its documents that are used"
    ):
        make_plan(
            {"a": Lengths([5])},
            MixtureConfig(ratios={"a": 1.0}, seq_len=8, subsample={"a": 0.0001}),
            1,
            0,
        )
