"""Texts to tokenize, and the SmolLM2 tokenizer with its first few thousand tokens."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokens_cases import WORDS

from ipt.config import TokensConfig
from ipt.models import load_tokenizer
from ipt.tokens.encode import Encoding, encoding_of

MERGES = 2000


@pytest.fixture(scope="session")
def tiny_model(tiny_model, made_once) -> str:
    """The tiny model with a smaller vocabulary: most tests load the tokenizer anew, and its size is
    most of the work.
    """

    def make(folder: Path) -> None:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = tokenizer["model"]
        # tokens of merges come last, in the merges' order
        size = len(model["vocab"]) - len(model["merges"]) + MERGES
        model["vocab"] = {
            token: number for token, number in model["vocab"].items() if number < size
        }
        model["merges"] = model["merges"][:MERGES]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    return str(made_once("small_vocabulary", make))


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def encoding(tokenizer) -> Encoding:
    return encoding_of(tokenizer, TokensConfig(bos=True))


@pytest.fixture(scope="session")
def make_texts(tmp_path_factory) -> Callable[..., Path]:
    """A folder of two Parquet files with so many random texts, in small row groups."""

    def make(documents: int, words: int = 60, row_group: int = 16, seed: int = 0) -> Path:
        folder, random_ = tmp_path_factory.mktemp("texts"), random.Random(seed)
        rows = [
            {"id": str(i), "text": " ".join(random_.choices(WORDS, k=random_.randint(0, words)))}
            for i in range(documents)
        ]
        for part, some in enumerate((rows[: documents // 3], rows[documents // 3 :])):
            pq.write_table(
                pa.Table.from_pylist(some),
                folder / f"part-{part:05d}.parquet",
                row_group_size=row_group,
            )
        return folder

    return make
