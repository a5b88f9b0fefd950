import re
from collections import Counter

import pytest
from ontology_cases import entries

from ipt.corpus.ontology.pages import FULL_PAGE, LONGEST_PAGE, make_pages
from ipt.corpus.ontology.terms import held_out_terms, parse_ontology


@pytest.fixture(scope="module", params=["made up", "cells"])
def book(request, cells):
    """An ontology, its held-out terms, what was left out, its training pages and its held-out
    pages.
    """
    source = cells if request.param == "cells" else parse_ontology("MONDO", "v1", entries())
    held_out, left_out = held_out_terms(source, 0.2, seed=3), Counter(source.left_out)
    return source, held_out, left_out, *make_pages(source, held_out, left_out)


def test_every_definition_stands_once_on_its_own_side(book):
    source, held_out, _, training, reserved = book
    defined = {term_id for term_id, term in source.terms.items() if term.definition}
    for pages, side in ((training, defined - held_out), (reserved, defined & held_out)):
        standing = Counter(term_id for page in pages for term_id in page.defined)
        assert set(standing) == side and set(standing.values()) == {1}
        for page in pages:
            assert all(
                _statement(source.terms[term_id].definition) in page.text
                for term_id in page.defined
            )


def test_every_term_is_accounted_for(book):
    source, _, left_out, training, reserved = book
    named = [term_id for page in (*training, *reserved) for term_id in (*page.defined, *page.named)]
    assert len(named) == len(set(named))
    assert len(named) + left_out["no definition, and no room among the names on a page"] == len(
        source.terms
    )


def test_held_out_terms_stand_on_no_training_page(book):
    source, held_out, _, training, _ = book
    assert len(held_out) > 20
    secret = {
        name.lower()
        for term_id in held_out
        for name in (source.terms[term_id].name, *source.terms[term_id].synonyms)
    }
    for page in training:
        assert not held_out.intersection((page.head, *page.defined, *page.named))
        for line in page.text.lower().splitlines():
            entry = re.match(r"- (.+?)(?: \(also (.+?)\))?:", line)
            names = [entry[1], *re.split(r", | or ", entry[2] or "")] if entry else []
            assert not secret.intersection(names)
        for sentence in re.findall(
            r"(?:also called|also known as|name for it is|names for it are) (.+?)\.",
            page.text.lower(),
        ):
            assert not secret.intersection(re.split(r", | or | and ", sentence))


def test_made_up_held_out_names_occur_nowhere():
    source = parse_ontology("MONDO", "v1", entries())
    held_out = held_out_terms(source, 0.2, seed=3)
    training, reserved = make_pages(source, held_out, Counter())
    text, other = (
        "\n".join(page.text for page in training).lower(),
        "\n".join(page.text for page in reserved).lower(),
    )
    for term in (source.terms[term_id] for term_id in held_out):
        for name in (term.name, *term.synonyms):
            assert name.lower() not in text and name.lower() in other


def test_pages_have_a_reasonable_length(book):
    source, _, _, training, _ = book
    lengths = sorted(len(page.text) for page in training)
    assert FULL_PAGE < lengths[len(lengths) // 2] < LONGEST_PAGE
    too_long = [page for page in training if len(page.text) > 1.7 * LONGEST_PAGE]
    assert all(
        max(len(source.terms[term_id].definition) for term_id in page.defined) > 800
        for page in too_long
    )
    continued = [page for page in training if page.title.endswith("(continued)")]
    assert continued and all(page.page_id.endswith(tuple("23456789")) for page in continued)


def test_a_page_says_what_its_terms_are_kinds_of(book):
    source, _, _, training, _ = book
    for page in training:
        for term_id in page.defined:
            home = source.homes[term_id]
            assert home is None or source.terms[home].name.lower() in page.text.lower()


def test_pages_do_not_depend_on_the_order_of_entries():
    forward = entries()
    backward = {
        term_id: {**entry, "ancestors": dict(reversed(entry["ancestors"].items()))}
        for term_id, entry in reversed(forward.items())
    }
    books = []
    for given in (forward, backward):
        source = parse_ontology("MONDO", "v1", given)
        books.append(make_pages(source, held_out_terms(source, 0.2, seed=3), Counter()))
    assert books[0] == books[1]


def test_wording_varies(cells):
    training, _ = make_pages(cells, set(), Counter())
    frames = Counter(
        re.sub(re.escape(cells.terms[page.head].name), "_", page.text, flags=re.IGNORECASE).split(
            "\n\n"
        )[1][:12]
        for page in training
    )
    assert len([frame for frame, count in frames.items() if count > 10]) >= 4
    assert 0.3 < sum("\n- " in page.text for page in training) / len(training) < 0.7


def test_mixed_ancestors_are_not_called_kinds():
    training, reserved = make_pages(parse_ontology("UBERON", "v1", entries()), set(), Counter())
    assert training and not reserved
    assert not any(
        re.search(r"kinds? of (?!\w*\.)", page.text.replace("all others are kinds of", ""))
        for page in training
    )
    assert all(
        "classed under" in page.text
        for page in training
        if page.head != "X:0" and "/" not in page.page_id
    )


def _statement(definition: str) -> str:
    """The definition without its first letter, whose case depends on where it stands."""
    return definition[1:]
