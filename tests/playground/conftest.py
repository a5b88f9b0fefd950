import pytest

from ipt.models import load_tokenizer
from ipt.synthesis.formats.base import Vocabulary


@pytest.fixture(scope="session")
def vocabulary():
    return Vocabulary(load_tokenizer("embedded:tiny"))
