import numpy as np
import pytest
import torch

from ipt.mixture.batches import IGNORE, PackedLoader, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.tokens.store import EncodedDocument, TokenStore, write_store


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources of numbered tokens: source 0 has tokens below 10,000, half of source 1's tokens are masked."""
    random = np.random.default_rng(0)
    stores = []
    for source in range(2):
        folder = tmp_path_factory.mktemp(f"store{source}")
        documents, first = [], 10_000 * source
        for size in random.integers(5, 60, 40):
            target = None if source == 0 else (np.arange(size) % 2).astype(np.uint8)
            documents.append(EncodedDocument(np.arange(first, first + size, dtype=np.uint32), target))
            first += size
        write_store(folder, documents, "f", 300)
        stores.append(TokenStore(folder))
    plan = make_plan({"a": stores[0].lengths, "b": stores[1].lengths}, {"a": 0.5, "b": 0.5}, 64, 24, seed=0)
    return PackedSequences(plan, stores)


def test_labels_are_the_next_tokens_of_the_same_document(data):
    several_documents = 0
    for index in range(len(data)):
        item = data[index]
        starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
        several_documents += len(starts) > 1
        trained = item["labels"] != IGNORE
        assert trained.sum() == data.target_count(index)
        assert (item["labels"][trained] == item["input_ids"][trained] + 1).all()  # tokens are numbered through
        assert (item["input_ids"] >= 10_000).eq(item["source_ids"] == 1).all()
        for start, end in zip(starts, [*starts[1:], len(trained)], strict=True):
            assert item["position_ids"][start:end].tolist() == list(range(end - start))
    assert several_documents == len(data)


def test_each_token_but_a_documents_first_is_a_target_once_in_an_epoch(data):
    store = data.stores[0]
    plan = make_plan({"a": store.lengths}, {"a": 1.0}, store.n_tokens // 16, 16, seed=3)
    targets = torch.cat([item["labels"] for item in map(PackedSequences(plan, [store]).__getitem__, range(16))])
    targets = targets[targets != IGNORE].tolist()
    firsts = {int(store.tokens(document)[0]) for document in range(len(store))}
    read = {int(token) for piece in plan.pieces for token in store.tokens(int(piece[1]), int(piece[2]) + 1, int(piece[3]) + 1)}
    assert len(targets) == len(set(targets))
    assert set(targets) == read - firsts


def _order(data, world, workers, taken=0):
    """Input ids of each optimizer step over all ranks, as a sorted list of rows."""
    loaders = [PackedLoader(data, 1, 4 // world, rank, world, workers) for rank in range(world)]
    for loader in loaders:
        loader.load_state_dict({"taken": taken})
    batches = [list(loader) for loader in loaders]
    steps = len(batches[0]) // (4 // world)
    return [
        sorted(
            tuple(row.tolist())
            for rank in batches
            for batch in rank[step * (4 // world) : (step + 1) * (4 // world)]
            for row in batch["input_ids"]
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 1)])
def test_order_does_not_depend_on_ranks_or_workers(data, world, workers):
    assert _order(data, world, workers) == _order(data, 1, 0)


def test_resuming_at_another_number_of_ranks_goes_on_with_the_same_steps(data):
    loader = PackedLoader(data, 1, 4)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    state = loader.state_dict()
    assert state == {"taken": 8}
    assert _order(data, 2, 0, taken=8) == _order(data, 1, 0)[2:]


def test_each_batch_knows_the_targets_of_its_whole_step(data):
    batches = list(PackedLoader(data, 1, 2, rank=1, world=2))
    for number, batch in enumerate(batches):
        step = number // 2
        assert batch["step_targets"] == sum(data.target_count(index) for index in range(step * 4, step * 4 + 4))
    with pytest.raises(ValueError, match="not a multiple"):
        PackedLoader(data, 5, 1)
