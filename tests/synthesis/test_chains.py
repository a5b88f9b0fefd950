import asyncio
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.synthesis.chains import plan_chains, run_bounded
from ipt.synthesis.engines import EngineDied


@given(st.integers(0, 200), st.integers(1, 60))
def test_every_document_is_in_one_chain_at_its_published_place(number, shots):
    chains = plan_chains(range(number), shots)
    assert sorted(document for chain in chains for document in chain) == list(range(number))
    chunk = -(-number // shots)
    for first, chain in enumerate(chains):
        assert 1 <= len(chain) <= shots
        # round r takes the documents of slice r
        assert [document // chunk for document in chain] == list(range(len(chain)))
        assert all(document % chunk == first for document in chain)


def test_the_published_demo():
    assert plan_chains(["t0", "t1", "t2", "t3", "t4"], 3) == [["t0", "t2", "t4"], ["t1", "t3"]]


def test_the_window_is_bounded_in_order_and_without_a_barrier():
    live, most_live, begun, ended, slots = set(), 0, [], [], set()
    gate = asyncio.Event()

    async def chain(number, slot):
        nonlocal most_live
        live.add(number)
        assert slot not in slots  # no two chains share one
        slots.add(slot)
        begun.append(number)
        most_live = max(most_live, len(live))
        if number == 0:
            await gate.wait()  # the first one waits for the last one, so the others must pass it
        await asyncio.sleep(0)
        if number == 9:
            gate.set()
        live.remove(number)
        slots.remove(slot)
        ended.append(number)

    taken = []

    def tasks():
        for number in range(10):
            taken.append((number, len(live)))
            yield partial(chain, number)

    asyncio.run(asyncio.wait_for(run_bounded(tasks(), 3), 10))
    assert begun == list(range(10))
    assert set(ended) == set(begun) and ended[-1] == 0
    assert most_live == 3
    # a chain is made only when there is room for it
    assert all(waiting < 3 for _, waiting in taken)


def test_the_first_error_stops_all_and_is_raised_as_it_is():
    finished = []

    async def fail(slot):
        raise EngineDied("dead")

    async def wait(slot):
        await asyncio.sleep(60)
        finished.append(True)

    with pytest.raises(EngineDied, match="dead"):
        asyncio.run(run_bounded([wait, fail, wait], 3))
    assert not finished
