"""Texts to token stores. A store is made once and then shared by all runs."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipt.config import TokensConfig
from ipt.console import progress
from ipt.stage import read_parts
from ipt.tokens.store import EncodedDocument, TokenStore, tokenizer_fingerprint, write_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some tokenizers put a space before the first word of what they encode. A response continues its prompt, which ends with a line
# break, so it is encoded behind one (as Vocabulary.encode_continuation does for synthesis).
ANCHOR = "\n"


def tokenize_texts(config: TokensConfig, texts: Path, model: str, output: Path, name: str = "") -> dict[str, Any]:
    """Tokenise `texts/part-*.parquet` into a store in `output` and return its statistics.

    A row has `text`, or `examples` of (prompt, response), of which only the responses are trained on: each example is
    BOS, prompt, response, EOS, and the examples of a row follow one another as shots of one document. `fill_to` of such a
    row, where it is not null, fills the document up with EOS tokens that are read and not trained on.
    """
    from ipt.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows = _count_rows(texts)
    with progress(f"tokens {name}", rows) as bar:
        documents = encode(read_parts(texts), tokenizer, config)
        write_store(output, _counted(documents, bar.advance), tokenizer_fingerprint(tokenizer), config.shard_tokens)
    store = TokenStore(output)
    return {"documents": len(store), "tokens": store.n_tokens, "tokenizer": store.fingerprint}


def encode(rows: Iterable[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", config: TokensConfig) -> Iterator[EncodedDocument]:
    """Token ids of each row, in order. Texts are encoded in batches, which the tokenizer spreads over its threads."""
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer, config.bos) else []
    eos = [tokenizer.eos_token_id] if config.eos else []
    remaining = iter(rows)
    while batch := list(islice(remaining, 512)):
        texts = [part for row in batch for part in _texts(row)]
        # A special token that a document spells out is plain text there, not an end of the document.
        ids = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
        for row in batch:
            if row.get("examples") is None:
                yield EncodedDocument(np.array(bos + next(ids) + eos, np.uint32))
            else:
                yield _encode_examples(len(row["examples"]), ids, tokenizer, row.get("fill_to") or 0)


def begins_with_bos(tokenizer: "PreTrainedTokenizerBase", wish: bool | None) -> bool:
    """Whether documents begin with BOS: as wished, else as the tokenizer does by itself."""
    if wish is None:
        return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if wish and tokenizer.bos_token_id is None:
        raise ValueError("tokens.bos=true, but the tokenizer has no BOS token: set tokens.bos=false")
    return wish


def _encode_examples(number: int, ids: Iterator[list[int]], tokenizer: "PreTrainedTokenizerBase", fill_to: int) -> EncodedDocument:
    anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    target: list[int] = []
    for _ in range(number):
        prompt, response = [tokenizer.bos_token_id, *next(ids)], next(ids)
        assert response[: len(anchor)] == anchor, "a line break and the tag behind it became one token"
        learnt = [*response[len(anchor) :], tokenizer.eos_token_id]
        tokens += prompt + learnt
        target += [0] * len(prompt) + [1] * len(learnt)
    target += [0] * (fill_to - len(tokens))
    tokens += [tokenizer.eos_token_id] * (fill_to - len(tokens))
    return EncodedDocument(np.array(tokens, np.uint32), np.array(target, np.uint8))


def _texts(row: dict[str, Any]) -> list[str]:
    if row.get("examples") is None:
        return [row["text"]]
    return [part for example in row["examples"] for part in (example["prompt"], ANCHOR + example["response"])]


def _count_rows(folder: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(path).metadata.num_rows for path in folder.glob("part-*.parquet"))


def _counted(documents: Iterable[EncodedDocument], count: Any) -> Iterator[EncodedDocument]:
    for document in documents:
        count()
        yield document
