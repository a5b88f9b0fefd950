import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import TokensConfig
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text
from ipt.tokens import encode as encode_module
from ipt.tokens.encode import Encoder, begins_with_bos, encoding_of, tokenizer_fingerprint
from ipt.tokens.shards import EncodedDocument
from ipt.tokens.store import TokenStore, write_store
from tests.examples import examples

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SPECIAL = [
    "",
    " ",
    "\n\n",
    "<|im_end|>",
    "a<|endoftext|>b",
    "  two  spaces",
    "e\u0301",
    "\u0000",
    "🫀" * 3,
]
TEXTS = st.lists(ANY_TEXT | st.sampled_from(SPECIAL))


def alone(tokenizer, text: str) -> list[int]:
    """The oracle: transformers' own call on this text only."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module")
def encoders(tokenizer) -> dict[tuple[bool, bool], Encoder]:
    """With and without BOS and EOS; each takes most of a second to make."""
    rules = itertools.product([False, True], repeat=2)
    return {
        (bos, eos): Encoder(encoding_of(tokenizer, TokensConfig(bos=bos, eos=eos)))
        for bos, eos in rules
    }


@examples(60)
@given(texts=TEXTS, bos=st.booleans(), eos=st.booleans(), shard_tokens=st.integers(1, 60))
def test_any_documents_are_what_each_is_alone(
    tokenizer, encoders, tmp_path_factory, texts, bos, eos, shard_tokens
):
    folder = tmp_path_factory.mktemp("store")
    write_store(
        folder, encoders[bos, eos].encode({"text": text} for text in texts), "f", shard_tokens
    )
    store = TokenStore(folder)
    begin, end = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
    assert [store.tokens(number).tolist() for number in range(len(store))] == [
        begin + alone(tokenizer, text) + end for text in texts
    ]


def test_texts_and_examples_become_the_tokens_that_generation_sees(tokenizer):
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    pairs = [Pair("What is it?", "A cell."), Pair("Where?", "In blood.")]
    examples = [{"prompt": context_text("A cell in blood."), "response": pairs_text(pairs)}] * 2
    rows = [{"text": "Plain text."}, {"examples": examples}]
    plain, example = Encoder(encoding_of(tokenizer, TokensConfig(bos=True))).encode(rows)
    assert tokenizer.decode(plain.tokens) == f"{bos}Plain text.{eos}"
    assert plain.is_target is None
    assert (
        tokenizer.decode(example.tokens)
        == f"{bos}{examples[0]['prompt']}{examples[0]['response']}{eos}" * 2
    )
    trained = tokenizer.decode(example.tokens[example.is_target.astype(bool)])
    assert trained == f"{examples[0]['response']}{eos}" * 2
    prompt = [tokenizer.bos_token_id, *alone(tokenizer, context_text("A cell in blood."))]
    assert example.tokens[: len(prompt)].tolist() == prompt


def test_examples_are_filled_up_with_tokens_that_are_not_trained_on(tokenizer):
    examples = [{"prompt": context_text("A."), "response": pairs_text([Pair("What?", "It.")])}]
    short, filled = Encoder(encoding_of(tokenizer, TokensConfig())).encode(
        [{"examples": examples, "fill_to": size} for size in (None, 100)]
    )
    assert len(short.tokens) < 100 == len(filled.tokens) == len(filled.is_target)
    assert filled.tokens[len(short.tokens) :].tolist() == [tokenizer.eos_token_id] * (
        100 - len(short.tokens)
    )
    assert filled.is_target.sum() == short.is_target.sum() > 0


def test_a_special_token_spelt_out_in_a_document_is_plain_text(tokenizer):
    (document,) = Encoder(encoding_of(tokenizer, TokensConfig())).encode(
        [{"text": f"before{tokenizer.eos_token}after"}]
    )
    assert document.tokens.tolist().count(tokenizer.eos_token_id) == 1  # its own end


def test_bos_follows_the_tokenizer_unless_told(tokenizer):
    assert begins_with_bos(tokenizer, None) is (
        tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    assert begins_with_bos(tokenizer, True)


@pytest.mark.parametrize(("token", "key"), [("bos_token", "bos"), ("eos_token", "eos")])
def test_a_tokenizer_without_the_token_is_an_error(tiny_model, token, key):
    from ipt.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    setattr(tokenizer, token, None)
    with pytest.raises(ValueError, match=rf"set tokens\.{key}=false"):
        encoding_of(tokenizer, TokensConfig(bos=True, eos=True))
    with pytest.raises(ValueError, match="need a tokenizer with BOS and EOS"):
        list(
            Encoder(encoding_of(tokenizer, TokensConfig(bos=False, eos=False))).encode(
                [{"examples": [{"prompt": "p", "response": "r"}]}]
            )
        )


def test_truncation_and_padding_of_the_tokenizer_change_nothing(tiny_model, tokenizer):
    from ipt.models import load_tokenizer

    other = load_tokenizer(tiny_model)
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=50)
    rows = [{"text": "one two three four five six"}]
    (here,), (there,) = (
        Encoder(encoding_of(tokenizer, TokensConfig())).encode(rows),
        Encoder(encoding_of(other, TokensConfig())).encode(rows),
    )
    assert here.tokens.tolist() == there.tokens.tolist() and len(here.tokens) > 3
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(("rows", "characters"), [(1, 1 << 21), (3, 1 << 21), (512, 20)])
def test_rows_are_read_no_further_than_a_batch(encoding, monkeypatch, rows, characters):
    expected = [
        document.tokens.tolist()
        for document in Encoder(encoding).encode({"text": "word " * (i % 7)} for i in range(30))
    ]
    monkeypatch.setattr(encode_module, "BATCH_ROWS", rows)
    monkeypatch.setattr(encode_module, "BATCH_CHARACTERS", characters)
    read = ahead = 0

    def counted():
        nonlocal read
        for i in range(30):
            read += 1
            yield {"text": "word " * (i % 7)}

    found: list[EncodedDocument] = []
    for document in Encoder(encoding).encode(counted()):
        found.append(document)
        ahead = max(ahead, read - len(found))
    assert [document.tokens.tolist() for document in found] == expected
    assert ahead <= min(rows, 12)
    assert all(document.tokens.dtype == np.uint32 for document in found)
