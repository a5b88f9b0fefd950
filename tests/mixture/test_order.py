import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.mixture import order
from ipt.mixture.order import Stream
from tests.examples import examples
from tests.mixture.lengths import Lengths

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any)


def _positions(pieces):
    """Every token that the pieces hold, as (document, position)."""
    return [
        (document, place)
        for document, start, end, _ in pieces.tolist()
        for place in range(start, end)
    ]


@examples(100)
@given(
    lengths=LENGTHS,
    start=st.integers(0, 700),
    size=st.integers(0, 700),
    chunk=st.integers(1, 8),
    window=st.integers(1, 4),
)
def test_any_part_of_the_stream_is_what_reading_from_the_start_gives(
    lengths, start, size, chunk, window
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "CHUNK", chunk)
        patch.setattr(order, "WINDOW", window)
        stream = Stream(Lengths(lengths), "s", 0)
        everything = stream.read(0, start + size)
        part = Stream(Lengths(lengths), "s", 0).read(start, start + size)
    assert _positions(part) == _positions(everything)[start:]
    assert all(
        0 <= begin < end <= length == lengths[document]
        for document, begin, end, length in part.tolist()
    )
    for first in range(0, start + size - sum(lengths) + 1, sum(lengths)):
        # each epoch has every token once
        epoch = _positions(everything)[first : first + sum(lengths)]
        assert sorted(epoch) == [
            (document, place) for document, length in enumerate(lengths) for place in range(length)
        ]


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    def documents(name="s", seed=0, epoch=0):
        return (
            Stream(Lengths(np.ones(200)), name, seed)
            .read(200 * epoch, 200 * (epoch + 1))[:, 0]
            .tolist()
        )

    orders = [documents(), documents(name="t"), documents(seed=1), documents(epoch=1)]
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert documents() == orders[0]
    assert documents()[:5] == [153, 170, 147, 60, 64]  # the order of a seed stays what it is


def test_a_store_of_many_chunks_is_read_in_windows_of_random_chunks():
    count = order.CHUNK * order.WINDOW * 2 + 100
    stream = Stream(Lengths(np.ones(count)), "s", 0)
    documents = stream.read(0, count)[:, 0]
    assert (np.sort(documents) == np.arange(count)).all()
    chunks = documents[: order.CHUNK * order.WINDOW - order.CHUNK] // order.CHUNK
    assert len(np.unique(chunks)) == order.WINDOW
    # neighbours come from different places
    assert np.abs(np.diff(chunks)).mean() > order.WINDOW / 4


def test_a_share_of_the_documents_is_kept_at_random_and_stays_the_same():
    lengths = np.random.default_rng(0).integers(1, 100, 20_000)
    stream, other = Stream(Lengths(lengths), "s", 0, 0.25), Stream(Lengths(lengths), "s", 1, 0.25)
    kept = stream.read(0, stream.n_tokens)[:, 0]
    assert stream.n_documents == len(kept) == len(set(kept.tolist()))
    assert stream.n_tokens == lengths[kept].sum()
    assert stream.n_documents / 20_000 == pytest.approx(0.25, abs=0.01)
    assert set(stream.read(stream.n_tokens, 2 * stream.n_tokens)[:, 0].tolist()) == set(
        kept.tolist()
    )
    assert set(other.read(0, other.n_tokens)[:, 0].tolist()) != set(kept.tolist())
    more = Stream(Lengths(lengths), "s", 0, 0.5)
    # a larger share adds to a smaller one
    assert set(kept.tolist()) < set(more.read(0, more.n_tokens)[:, 0].tolist())
