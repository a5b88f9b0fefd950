import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.corpus.ontology.definitions import (
    MASK,
    aliases,
    clean_definition,
    define,
    define_it,
    join_names,
    mask,
    says_more_than,
    sentence_case,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Carries blood [WP,unvetted].", "Carries blood."),
        ("A nerve. [Orphanet:1055]", "A nerve."),
        ("A cyst of the jaw (Dorland, 27th ed)", "A cyst of the jaw."),
        ("It is benign. (From Smith et al., J Bone 1996 Oct;46(2):73-9)", "It is benign."),
        (
            "It is short (summary by {2:Piard et al., 2018}).nnFor a discussion of heterogeneity, "
            "see X1 (OMIM:149400).",
            "It is short.",
        ),
        (
            "A fold [1] that lies deep (Wietzman 1962). It is paired (UBERON:6001741).",
            "A fold that lies deep. It is paired.",
        ),
        ("seeds of <i>Ricinus communis</i> &amp; others", "Seeds of Ricinus communis & others."),
        ("A(n) cell that is part of a(n) venule", "A cell that is part of a venule."),
        (
            "A infiltrating tumor of a ovary, not of a euploid cell",
            "An infiltrating tumor of an ovary, not of a euploid cell.",
        ),
        ("Hepatitis A infection of a one-year-old", "Hepatitis A infection of a one-year-old."),
        ("An organ that develops_from a bud.", "An organ that develops from a bud."),
        (
            "The infection has symptom fever, has symptom rash, and has symptom pain.",
            "The infection shows fever, rash, and pain.",
        ),
        ("Small ; round ,firm  (  )..", "Small; round, firm."),
        (
            "mRNA loss in Group A [4Fe-4S] protein (GAS)",
            "mRNA loss in Group A [4Fe-4S] protein (GAS).",
        ),
        (" [FMA]. ", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_definition(raw) == clean
    assert clean_definition(clean) == clean


def test_sentences_by_the_way_a_definition_begins():
    assert define("bone cyst", "Bone cyst is a hole.") == "Bone cyst is a hole."
    assert define("bone cyst", "Holes in bones.") == "Bone cyst: Holes in bones."
    assert define("bone cyst", "A hole is what it is.") == "Bone cyst: A hole is what it is."
    framed = {define(f"cyst {number}", "A hole that is in a bone.") for number in range(40)}
    assert all("a hole that is in a bone." in sentence for sentence in framed)
    assert len({re.sub(r"\d+", "", sentence) for sentence in framed}) >= 4
    assert "any cyst in the jaw." in define("jaw cyst", "Any cyst in the jaw.")
    assert define_it("A hole that is in a bone.") == "It is a hole that is in a bone."
    assert define_it("The hole is deep.") == "The hole is deep."


def test_names():
    assert sentence_case("von Willebrand disease") == "Von Willebrand disease"
    assert [sentence_case(name) for name in ("mRNA loss", "p53 loss", "a cell")] == [
        "mRNA loss",
        "p53 loss",
        "A cell",
    ]
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"], "or") == "a, b or c"
    assert join_names(["a, mild", "b", "c"]) == "a, mild; b; and c"


def test_aliases_are_really_other_names():
    synonyms = [
        "colon neoplasm",
        "neoplasm of the colon",
        "colonic tumour",
        "large bowel growth",
        "CN",
        "colonic neoplasm (disease)",
        "odd [note]",
    ]
    assert aliases("colonic neoplasm", synonyms) == ["CN", "large bowel growth"]


def test_says_more_than():
    assert not says_more_than("prostate epithelium", "The prostate epithelium.")
    assert says_more_than("prostate epithelium", "An epithelium that lines the prostate.")


def test_masking():
    masked = mask(
        "Colon cancer, or cancer of the colon (CC), is a malignant colonic growth; CC is common.",
        ("colon cancer", "CC"),
    )
    assert masked == (
        f"{MASK}, or {MASK} of the {MASK} ({MASK}), is a malignant {MASK} growth; {MASK} is common."
    )
    assert (
        mask("It affects the CD14 type 2 cell.", ("CD14-positive cell type 2",))
        == f"It affects the {MASK}."
    )
    assert mask("Nothing to hide here.", ("osteoma",)) == "Nothing to hide here."


name_words, other_words = (
    st.text(letters, min_size=1, max_size=9) for letters in ("abcdefghij", "klmnopqrst")
)


@given(
    st.lists(name_words, min_size=1, max_size=4),
    st.lists(other_words, min_size=1, max_size=20),
    name_words,
)
def test_all_of_the_name_and_nothing_else_is_masked(name, definition, synonym):
    said = [
        *definition,
        *name,
        synonym.upper(),
        *definition,
        *(word + "al" for word in name),
        *definition,
    ]
    masked = mask(" ".join(said) + ".", (" ".join(name), synonym))
    left = re.findall(r"[a-z]+", masked.lower())
    assert not [word for word in name if len(word) > 3 and (word in left or word + "al" in left)]
    assert synonym not in left and f" {' '.join(name)} " not in f" {masked} "
    assert [word for word in left if set(word) <= set("klmnopqrst")] == [*definition] * 3
