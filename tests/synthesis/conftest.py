import pytest

from ipt.models import load_tokenizer
from ipt.synthesis.formats.base import Vocabulary


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("embedded:tiny")


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer)
