import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ipt.config import MixtureConfig
from ipt.mixture.batches import IGNORE, PADDING, PackedLoader, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.mixture.stores import open_stores
from ipt.tokens.store import EncodedDocument, TokenStore, write_store

PACKINGS = ("concat", "best_fit")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two sources of numbered tokens: source a has tokens below 10,000, half of source b's tokens
    are masked.
    """
    random = np.random.default_rng(0)
    stores = {}
    for source, name in enumerate("ab"):
        folder = tmp_path_factory.mktemp(name)
        documents, first = [], 10_000 * source + 1
        for size in random.integers(5, 60, 40):
            target = None if source == 0 else (np.arange(size) % 2).astype(np.uint8)
            documents.append(
                EncodedDocument(np.arange(first, first + size, dtype=np.uint32), target)
            )
            first += size
        write_store(folder, documents, "f", 300)
        stores[name] = TokenStore(folder)
    return stores


def _data(stores, packing="concat", sequences=24, **settings):
    config = MixtureConfig(
        **{"ratios": {"a": 0.5, "b": 0.5}, "seq_len": 64, "packing": packing, **settings}
    )
    plan = make_plan(stores, config, sequences, seed=0)
    return PackedSequences(plan, [stores[name] for name in plan.sources])


@pytest.mark.parametrize("packing", PACKINGS)
def test_labels_are_the_next_tokens_of_the_same_document(stores, packing):
    data = _data(stores, packing)
    batch = data.batch(range(24))
    assert all(
        batch[name].shape == (24, 64)
        for name in ("input_ids", "labels", "position_ids", "source_ids")
    )
    trained = batch["labels"] != IGNORE
    assert trained.sum(dim=1).tolist() == [data.target_count(index) for index in range(24)]
    # tokens are numbered through
    assert (batch["labels"][trained] == batch["input_ids"][trained] + 1).all()
    padding = batch["source_ids"] == PADDING
    assert padding.any() == (packing == "best_fit")
    assert not trained[padding].any() and not batch["input_ids"][padding].any()
    assert (batch["input_ids"] > 10_000).eq(batch["source_ids"] == 1).all()
    assert (~padding).sum() == data.plan.tokens
    # several documents are really packed
    assert ((batch["position_ids"] == 0).sum(dim=1) > 1).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_bounds_say_where_positions_restart(stores, packing):
    batch = _data(stores, packing).batch([3, 17, 5])
    bounds = batch["cu_seq_lens"]
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [
        *(batch["position_ids"].flatten() == 0).nonzero().flatten().tolist(),
        3 * 64,
    ]
    assert batch["document_sizes"] == bounds.diff().tolist()
    assert batch["max_length"] == max(batch["document_sizes"])
    for start, end in pairwise(bounds.tolist()):
        assert batch["position_ids"].flatten()[start:end].tolist() == list(range(end - start))


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_token_but_a_documents_first_is_a_target_once_in_an_epoch(stores, packing):
    store = stores["a"]
    sequences = -(-store.n_tokens // 60) if packing == "best_fit" else store.n_tokens // 16
    data = _data(
        stores, packing, sequences, ratios={"a": 1.0}, seq_len=64 if packing == "best_fit" else 16
    )
    served = Counter(data.batch(range(sequences))["labels"].flatten().tolist())
    served.pop(IGNORE)
    pieces = [piece for index in range(sequences) for piece in data.plan.sequence(index)]
    epoch = {
        int(token)
        for piece in pieces
        for token in store.tokens(piece.document, piece.start + 1, piece.end + 1)
    }
    firsts = {int(store.tokens(document, 0, 1)[0]) for document in range(len(store))}
    assert set(served) == epoch - firsts
    assert len(served) >= 0.98 * (store.n_tokens - len(store))
    passes = data.plan.tokens / store.n_tokens
    assert max(served.values()) <= np.ceil(passes)


def _order(data, world, workers, taken=0):
    """Input ids of each optimizer step over all ranks, as a sorted list of rows."""
    loaders = [PackedLoader(data, 1, 4 // world, rank, world, workers) for rank in range(world)]
    for loader in loaders:
        loader.load_state_dict({"taken": taken})
    batches = [list(loader) for loader in loaders]
    steps = len(batches[0]) // (4 // world)
    return [
        sorted(
            (tuple(batch["input_ids"][0].tolist()), batch["step_targets"])
            for rank in batches
            for batch in rank[step * (4 // world) : (step + 1) * (4 // world)]
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 1), (1, 4), (2, 1)])
def test_order_does_not_depend_on_ranks_or_workers(stores, packing, world, workers):
    data = _data(stores, packing)
    order = _order(data, 1, 0)
    assert len(order) == 6 and len({row for step in order for row, _ in step}) == 24
    assert _order(data, world, workers) == order


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_with_the_same_batches_also_at_another_number_of_ranks(stores, workers):
    data = _data(stores)
    loader = PackedLoader(data, 1, 4, workers=workers)
    assert len(loader) == 24
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == {"taken": 8}  # prefetched batches are not taken
    resumed = PackedLoader(data, 1, 4, workers=workers)
    resumed.load_state_dict(state)
    for one, other in zip(batches, resumed, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert (
                torch.equal(value, other[name])
                if isinstance(value, torch.Tensor)
                else value == other[name]
            )
    whole = _order(data, 1, 0)
    assert _order(data, 2, workers, taken=8) == whole[2:]
    assert _order(data, 4, workers, taken=8) == whole[2:]
    assert loader.state_dict() == {"taken": 0}


def test_each_batch_knows_the_targets_of_its_whole_step(stores):
    data = _data(stores)
    for number, batch in enumerate(PackedLoader(data, 1, 2, rank=1, world=2)):
        step = number // 2
        assert (
            batch["step_targets"]
            == (data.batch(range(step * 4, step * 4 + 4))["labels"] != IGNORE).sum()
        )
    with pytest.raises(ValueError, match="not a multiple"):
        PackedLoader(data, 5, 1)


def test_counting_targets_reads_no_tokens(stores):
    class Unreadable(TokenStore):
        def tokens(self, document, start=0, end=None):
            raise AssertionError("tokens were read")

    data = _data(stores)
    blind = PackedSequences(
        data.plan, [Unreadable.open(stores[name].location) for name in data.plan.sources]
    )
    assert [blind.target_count(index) for index in range(24)] == [
        data.target_count(index) for index in range(24)
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_and_masked_equals_documents_run_alone(stores, packing):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=12_000, **shape, attn_implementation="sdpa")
    ).eval()
    batch = _data(stores, packing).batch(range(6, 9))
    with torch.no_grad():
        packed = model(
            batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.flatten(0, 1)
        ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        alone = torch.cat(
            [
                model(ids[None, start:end]).logits[0]
                for start, end in pairwise(batch["cu_seq_lens"].tolist())
            ]
        )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert cross_entropy(packed, labels) == pytest.approx(
        float(cross_entropy(alone, labels)), rel=1e-6
    )


def test_stores_of_different_tokenizers_are_named(stores, tmp_path):
    write_store(tmp_path / "c", [EncodedDocument(np.arange(5, dtype=np.uint32))], "other", 100)
    folders = {"a": stores["a"].location, "c": tmp_path / "c"}
    with pytest.raises(
        ValueError,
        match=(
            r"made with different tokenizers: a with f .*, c with other .*/c\); tokenise them again"
        ),
    ):
        open_stores(folders)
