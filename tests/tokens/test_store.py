import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt.config import TokensConfig
from ipt.models import load_tokenizer
from ipt.synthesis.format import Pair, context_text, pairs_text
from ipt.tokens.store import EncodedDocument, TokenStore, write_store
from ipt.tokens.tokenize import begins_with_bos, encode

DOCUMENTS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20), max_size=12)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 40))
def test_every_document_comes_back_from_any_number_of_shards(tmp_path_factory, documents, shard_tokens):
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, (EncodedDocument(np.array(tokens, np.uint32)) for tokens in documents), "f", shard_tokens)
    store = TokenStore(folder)
    assert len(store) == len(documents)
    assert store.n_tokens == sum(map(len, documents))
    for number, tokens in enumerate(documents):
        assert store.tokens(number).tolist() == tokens
        assert store.tokens(number, 1, 4).tolist() == tokens[1:4]
        assert store.tokens(number, 0, 99).tolist() == tokens


def test_the_loss_mask_covers_documents_with_and_without_one(tmp_path):
    masked = EncodedDocument(np.array([1, 2, 3], np.uint32), np.array([0, 0, 1], np.uint8))
    write_store(tmp_path, [masked, EncodedDocument(np.array([4, 5], np.uint32))], "f", 100)
    store = TokenStore(tmp_path)
    assert store.is_target(0).tolist() == [False, False, True]
    assert store.is_target(1).tolist() == [True, True]


def test_damaged_and_foreign_shards_are_named(tmp_path):
    write_store(tmp_path, [EncodedDocument(np.arange(5, dtype=np.uint32)) for _ in range(2)], "mine", 5)
    tokens = tmp_path / "shard-00001" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"shard-00001/tokens\.bin has 16 bytes, not 20"):
        TokenStore(tmp_path)
    index = tmp_path / "shard-00001" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": "other"}))
    with pytest.raises(ValueError, match="shard-00001 was made with another tokenizer"):
        TokenStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a token store"):
        TokenStore(tmp_path / "nowhere")


def test_texts_and_examples_become_the_tokens_that_generation_sees(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    pairs = [Pair("What is it?", "A cell."), Pair("Where?", "In blood.")]
    examples = [{"prompt": context_text("A cell in blood."), "response": pairs_text(pairs)}] * 2
    rows = [{"text": "Plain text."}, {"examples": examples}]
    plain, example = encode(rows, tokenizer, TokensConfig(bos=True))
    assert tokenizer.decode(plain.tokens) == f"{bos}Plain text.{eos}"
    assert plain.is_target is None
    assert tokenizer.decode(example.tokens) == f"{bos}{examples[0]['prompt']}{examples[0]['response']}{eos}" * 2
    trained = tokenizer.decode(example.tokens[example.is_target.astype(bool)])
    assert trained == f"{examples[0]['response']}{eos}" * 2
    prompt = [tokenizer.bos_token_id, *tokenizer(context_text("A cell in blood."), add_special_tokens=False)["input_ids"]]
    assert example.tokens[: len(prompt)].tolist() == prompt


def test_a_special_token_spelt_out_in_a_document_is_plain_text(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    (document,) = encode([{"text": f"before{tokenizer.eos_token}after"}], tokenizer, TokensConfig())
    assert document.tokens.tolist().count(tokenizer.eos_token_id) == 1  # its own end


def test_bos_follows_the_tokenizer_unless_told(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert begins_with_bos(tokenizer, None) is (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert begins_with_bos(tokenizer, True)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"set tokens\.bos=false"):
        begins_with_bos(tokenizer, True)
