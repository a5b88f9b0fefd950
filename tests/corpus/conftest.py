from pathlib import Path

import pytest

from ipt.corpus.ontology.terms import Ontology, load_ontology


@pytest.fixture(scope="session")
def cells() -> Ontology:
    """The smallest of the real ontologies: 2,738 cell types."""
    return load_ontology("CL")


@pytest.fixture
def rows():
    """Reads the rows of a stage's folder of part files."""
    from ipt.files import read_parts

    def read(folder: Path) -> list[dict]:
        return list(read_parts(folder))

    return read
