import random

from hypothesis import given
from hypothesis import strategies as st

from ipt.corpus.filters import near_duplicates
from ipt.corpus.filters.near_duplicates import NearDuplicates, _FirstDocument


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 9), st.integers(0, 2**32 - 2)))
)
def test_the_table_remembers_what_a_dictionary_does(entries):
    table, oracle = _FirstDocument(), {}
    for key, document in entries:
        table.put(key, document)
        oracle.setdefault(key, document)
    assert {key: table.get(key) for key in oracle} == oracle
    assert all(table.get(key) is None for key in range(20) if key not in oracle)


def test_the_table_grows():
    table, keys = _FirstDocument(), random.Random(0).sample(range(2**32), 5000)
    for document, key in enumerate(keys):
        table.put(key, document)
    assert [table.get(key) for key in keys] == list(range(5000))


def test_among_many_documents_the_like_ones_are_found():
    choose, documents = random.Random(0), NearDuplicates(0.8)
    # more than a chunk of sketches
    sets = [[f"{number} {choose.random()}" for _ in range(100)] for number in range(5000)]
    assert all(documents.add(tokens) for tokens in sets) and documents.documents == 5000
    changed = [[*tokens[4:], "a", "b", "c", "d"] for tokens in sets[::50]]  # 96 of 104
    assert sum(documents.add(tokens) for tokens in changed) <= 0.01 * len(changed)
    other = [[*tokens[30:], *map(str, range(30))] for tokens in sets[::50]]  # 70 of 130
    assert sum(documents.add(tokens) for tokens in other) > 0.98 * len(other)


def test_a_document_takes_few_bytes():
    sets = [[f"{number} {place}" for place in range(20)] for number in range(4000)]
    documents = NearDuplicates(0.8)
    assert all(documents.add(tokens) for tokens in sets)
    table = documents._first._table
    taken = sum(sketches.nbytes for sketches in documents._sketches) + len(table) * table.itemsize
    assert 128 < taken / len(sets) < 500


def test_a_document_is_compared_with_few_others(monkeypatch):
    """In a corpus of forms, where each document is a little like every other."""
    compared = []
    monkeypatch.setattr(
        near_duplicates, "_similarity", lambda *sketches: compared.append(sketches) or 0.0
    )
    form, documents = [f"line {number}" for number in range(80)], NearDuplicates(0.8)
    for number in range(300):
        documents.add([*form, *(f"{number} {place}" for place in range(30))])
    assert 300 < len(compared) < 300 * 16
