import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens_cases import write

from ipt.tokens import folders as folders_module
from ipt.tokens import store as store_module
from ipt.tokens.shards import EncodedDocument, Origin, ShardWriter
from ipt.tokens.store import TokenStore, write_store
from tests.examples import examples

DOCUMENTS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20), max_size=12)


@examples(30)
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 40))
def test_every_document_comes_back_from_any_number_of_shards(
    tmp_path_factory, documents, shard_tokens
):
    store = TokenStore(write(tmp_path_factory.mktemp("store"), documents, shard_tokens))
    assert len(store) == len(documents)
    assert store.n_tokens == sum(map(len, documents))
    for number, tokens in enumerate(documents):
        assert store.tokens(number).tolist() == tokens
        assert store.tokens(number, 1, 4).tolist() == tokens[1:4]
        assert store.tokens(number, 0, 99).tolist() == tokens
        assert store.tokens(number, 30).tolist() == []
    for absent in (-1, len(documents)):
        with pytest.raises(IndexError, match="there is no document"):
            store.tokens(absent)


@examples(30)
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 40), data=st.data())
def test_positions_are_the_sums_of_lengths(tmp_path_factory, documents, shard_tokens, data):
    store = TokenStore(write(tmp_path_factory.mktemp("store"), documents, shard_tokens))
    begins = np.array([0, *np.cumsum([len(tokens) for tokens in documents])], np.int64)
    assert store.positions(np.arange(len(documents) + 1)).tolist() == begins.tolist()
    asked = np.array(data.draw(st.lists(st.integers(0, len(documents)), max_size=30)), np.int64)
    found = store.positions(asked)
    assert found.dtype == np.int64 and found.tolist() == begins[asked].tolist()
    for outside in (-1, len(documents) + 1):
        with pytest.raises(IndexError):
            store.positions(np.array([outside]))


def test_a_store_with_an_empty_shard_in_it(tmp_path):
    for number, lengths in enumerate([[2], [], [0, 3], []]):
        with ShardWriter(tmp_path / f"shard-{number:05d}", Origin("f")) as shard:
            for length in lengths:
                shard.write(EncodedDocument(np.full(length, number, np.uint32)))
    store = TokenStore(tmp_path)
    assert [store.tokens(document).tolist() for document in range(3)] == [[0, 0], [], [2, 2, 2]]
    assert store.positions(np.arange(4)).tolist() == [0, 2, 2, 5]


def test_the_loss_mask_covers_documents_with_and_without_one(tmp_path):
    plain, masked = (
        EncodedDocument(np.array([4, 5], np.uint32)),
        EncodedDocument(np.array([1, 2, 3], np.uint32), np.array([0, 0, 1])),
    )
    write_store(tmp_path, [plain, masked, plain, plain], "f", 7)
    store = TokenStore(tmp_path)
    assert [index.has_loss_mask for index in store.indices] == [True, False]
    assert store.is_target(0).tolist() == store.is_target(2).tolist() == [True, True]
    assert store.is_target(1).tolist() == [False, False, True]
    assert store.is_target(1, 1, 3).tolist() == [False, True]
    assert store.is_target(3) is None


def test_few_files_are_open_at_a_time_and_all_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_FILES", 4)
    documents = [[i] * (i % 3 + 1) for i in range(40)]
    store = TokenStore(write(tmp_path, documents, 2))
    assert len(store.indices) > 10
    for number in np.random.default_rng(0).permutation(40):
        assert store.tokens(int(number)).tolist() == documents[number]
        assert len(store._maps._arrays) <= 4


def test_shards_are_read_by_number_when_their_names_grow_longer(tmp_path, monkeypatch):
    for module in (store_module, folders_module):
        monkeypatch.setattr(module, "shard_name", "shard-{}".format)
    documents = [[i] for i in range(12)]
    store = TokenStore(write(tmp_path, documents, 1))
    assert (
        store.indices[-1].shard == "shard-11"
        and [store.tokens(i).tolist() for i in range(12)] == documents
    )


def test_another_process_gets_a_store_without_its_tokens(tmp_path):
    store = TokenStore(write(tmp_path, [list(range(100_000))], 10))
    store.tokens(0)
    sent = pickle.dumps(store)
    assert len(sent) < 10_000
    assert pickle.loads(sent).tokens(0, 5, 7).tolist() == [5, 6]


def test_the_digest_says_what_is_in_the_store(tmp_path):
    one, same, other = (
        TokenStore(write(tmp_path / str(i), [[1, 2], [3, tail]], 2))
        for i, tail in enumerate((4, 4, 5))
    )
    assert one.digest == same.digest != other.digest


# Damage
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store", [[i] * 5 for i in range(3)], 5, "mine")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def said_of(folder) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TokenStore(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_a_shard_cut_short_is_named(folder, name):
    path = folder / "shard-00001" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    assert f"shard-00001/{name} has {size - 4} bytes, not {size}" in said_of(folder)
    path.unlink()
    assert f"shard-00001/{name} is missing" in said_of(folder)


def test_a_shard_of_another_tokenizer_is_named(folder):
    change(folder / "shard-00002/index.json", tokenizer="other")
    assert "shard-00002 was made with another tokenizer (other) than the store (mine)" in said_of(
        folder
    )


def test_a_shard_of_another_bos_rule_is_named(folder):
    change(folder / "shard-00002/index.json", bos=1)
    assert "shard-00002 has documents between 1 and None" in said_of(folder)


def test_a_swapped_index_is_named(folder):
    one, other = folder / "shard-00001/index.json", folder / "shard-00002/index.json"
    text = one.read_text()
    one.write_text(other.read_text())
    other.write_text(text)
    assert "shard-00001/index.json is the index of shard-00002" in said_of(folder)


def test_a_missing_shard_is_named(folder):
    shutil.rmtree(folder / "shard-00001")
    assert "holds shard-00002 but no shard-00001" in said_of(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "{", "\x00\xff"])
def test_a_broken_index_is_named(folder, text):
    (folder / "shard-00001/index.json").write_text(text)
    assert "shard-00001/index.json" in said_of(folder)


def test_an_index_that_contradicts_itself_is_named(folder):
    change(folder / "shard-00001/index.json", n_tokens=4)
    assert "shard-00001/index.json contradicts itself" in said_of(folder)


def test_offsets_of_another_shard_are_named(tmp_path):
    folder = write(tmp_path, [[1], [2, 2, 2], [3, 3], [4, 4, 4]], 4)
    assert len(TokenStore(folder).indices) == 2
    shutil.copy(folder / "shard-00000/offsets.npy", folder / "shard-00001/offsets.npy")
    with pytest.raises(ValueError, match=r"shard-00001/offsets\.npy is not that of its shard"):
        TokenStore(folder).tokens(3)


def test_what_is_no_store_is_named(tmp_path):
    assert "is not a token store" in said_of(tmp_path)
    assert "is not a token store" in said_of(tmp_path / "nowhere")


def test_verify_finds_what_sizes_do_not_tell(folder):
    TokenStore(folder).verify()
    path = folder / "shard-00001/tokens.bin"
    path.write_bytes((folder / "shard-00000/tokens.bin").read_bytes())
    with pytest.raises(ValueError, match=r"not what was written: shard-00001/tokens\.bin;"):
        TokenStore(folder).verify()
