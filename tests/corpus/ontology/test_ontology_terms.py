import pytest
from ontology_cases import entries

from ipt.corpus.ontology import terms
from ipt.corpus.ontology.terms import (
    check_ontologies,
    held_out_terms,
    load_ontology,
    parse_ontology,
)


def entry(label, description="", ancestors=(), **others):
    return {
        "label": label,
        "description": description,
        "ancestors": dict(ancestors),
        "deprecated": False,
        **others,
    }


def test_what_is_left_out_is_counted():
    parsed = parse_ontology(
        "CL",
        "v1",
        {
            "X:9": entry("old", deprecated=True),
            "X:8": entry("older", "OBSOLETE. Use another."),
            "X:7": entry("its nucleus", "A part.", {"X:1": 2}),
            "X:1": entry("cell", "What lives and has a membrane."),
            "X:2": entry(
                "round cell",
                "A cell that is round [Automatically generated definition].",
                {"X:1": 1, "X:9": 1},
            ),
            "X:3": entry(
                "red cell.", "The red cell.", {"X:1": 2, "X:2": 1}, synonyms=["b  c", "a"]
            ),
            "X:4": entry("flat cell", ancestors={"X:1": 1}),
            "X:5": entry("far cell", "A cancer that involves the UBERON:0035289.", {"X:1": 1}),
        },
    )
    assert list(parsed.terms) == ["X:1", "X:2", "X:3", "X:4", "X:5"]
    assert parsed.left_out == {
        "deprecated": 1,
        "definition says obsolete": 1,
        "part of a term of another ontology": 1,
    }
    assert parsed.definitions_left_out == {
        "marked automatically generated": 1,
        "says no more than the name": 1,
        "none given": 1,
        "names a term by its number": 1,
    }
    red = parsed.terms["X:3"]
    assert (red.name, red.synonyms, red.parents, dict(red.distances)) == (
        "red cell",
        ("a", "b c"),
        ("X:2",),
        {"X:1": 2, "X:2": 1},
    )
    assert parsed.children["X:1"] == ["X:2", "X:4", "X:5"]
    assert parsed.homes["X:3"] == "X:2" and parsed.homes["X:1"] is None
    assert parsed.descendants["X:1"] == set(parsed.terms)


def test_home_is_the_most_specific_parent():
    children = {f"X:{i}": entry(f"a{i}", ancestors={"X:90": 1}) for i in range(3)}
    both = entry("both", ancestors={"X:90": 1, "X:91": 1})
    parents = {"X:90": entry("many"), "X:91": entry("few")}
    parsed = parse_ontology("CL", "v1", {**children, **parents, "X:5": both})
    assert parsed.nearest_parents("X:5") == ["X:91", "X:90"]


def test_only_terms_without_more_specific_ones_are_held_out():
    parsed = parse_ontology("MONDO", "v1", entries())
    held_out = held_out_terms(parsed, 0.3, seed=1)
    leaves = {term_id for term_id, below in parsed.children.items() if not below}
    assert held_out < leaves and 0.15 < len(held_out) / len(leaves) < 0.45
    assert held_out_terms(parsed, 0.3, seed=1) == held_out != held_out_terms(parsed, 0.3, seed=2)
    assert held_out < held_out_terms(parsed, 0.5, seed=1)
    assert not held_out_terms(parsed, 0, seed=1)


def test_the_newest_release_counts_as_numbers():
    info = {
        release: {"ontologies": {"CL": {"version": f"v{release}"}}}
        for release in ("5.9.0", "5.10.0", "5.2.11")
    }
    assert terms._newest_version(info, "CL") == "v5.10.0"


def test_real_terms(cells):
    assert cells.source == "CL v2024-04-05" and len(cells.terms) == 2738
    neuron = cells.terms["CL:0000540"]
    assert (
        neuron.name == "neuron"
        and neuron.definition is not None
        and "nervous tissue" in neuron.definition
    )
    # is-a steps only: what is reached by single steps is what the package lists at any distance
    reached = {term_id: set(term.parents) for term_id, term in cells.terms.items()}
    for term_id in sorted(cells.terms, key=lambda term_id: len(cells.terms[term_id].distances)):
        reached[term_id] |= {
            above for parent in reached[term_id] for above in cells.terms[parent].distances
        }
    assert all(reached[term_id] == set(term.distances) for term_id, term in cells.terms.items())


@pytest.mark.parametrize("names", [["MONDO", "GO"], [], ["CL", "CL"]])
def test_unknown_names(names):
    with pytest.raises(
        ValueError, match=r"corpus\.ontologies=.*expected one or more of MONDO, UBERON, CL"
    ):
        check_ontologies(names)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(terms, "PACKAGE", "no-such-package-here")
    with pytest.raises(
        FileNotFoundError, match=r"needs the package no-such-package-here: run `make install`"
    ):
        load_ontology("CL")
