"""The terms of the embedded corpus: MONDO diseases, UBERON anatomy and CL cell types.

The package `cellxgene-ontology-guide` ships them as data (the package is MIT; MONDO and CL are CC
BY 4.0, UBERON CC BY 3.0). Its `ancestors` include both is-a and part-of links. In MONDO every link
is an is-a link, and so are those in CL except for eight cell parts ("reniform nucleus"). UBERON
mixes both, so pages about it do not call a parent a kind.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology.definitions import clean_definition, says_more_than
from ipt.errors import MissingFileError, UserError

PACKAGE = "cellxgene-ontology-guide"
# name -> what its terms are
KNOWN = {"MONDO": "disease", "UBERON": "anatomical structure", "CL": "cell type"}
IS_A = ("MONDO", "CL")  # ontologies whose parents are kinds
PLACEHOLDER = "Missing definition"  # start of a note in place of a definition
GENERATED = "[Automatically generated definition]"


@dataclass(frozen=True)
class Term:
    """One entry of an ontology that is not deprecated."""

    term_id: str
    name: str
    definition: str | None  # cleaned; None unless it says more than the name
    synonyms: tuple[str, ...]  # exact synonyms, unchanged
    distances: Mapping[str, int]  # ancestor's id -> steps to it

    @cached_property
    def parents(self) -> tuple[str, ...]:
        return tuple(sorted(ancestor for ancestor, steps in self.distances.items() if steps == 1))


@dataclass(frozen=True)
class Ontology:
    """The terms of one ontology by id, in the order of the ids."""

    name: str
    version: str
    terms: Mapping[str, Term]
    left_out: Counter[str]  # terms that are not in `terms`, by reason
    definitions_left_out: Counter[str]

    @property
    def source(self) -> str:
        return f"{self.name} {self.version}"

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Term -> the terms one step below it."""
        children: dict[str, list[str]] = {term_id: [] for term_id in self.terms}
        for term in self.terms.values():
            for parent in term.parents:
                children[parent].append(term.term_id)
        return children

    @cached_property
    def homes(self) -> dict[str, str | None]:
        """Term -> its most specific parent, or None."""
        return {term_id: next(iter(self.nearest_parents(term_id)), None) for term_id in self.terms}

    def nearest_parents(self, term_id: str) -> list[str]:
        """The term's two parents with the fewest children, the most specific one first."""
        return sorted(
            self.terms[term_id].parents, key=lambda parent: (len(self.children[parent]), parent)
        )[:2]

    @cached_property
    def descendants(self) -> dict[str, set[str]]:
        """Term -> itself and all terms below it."""
        descendants = {term_id: {term_id} for term_id in self.terms}
        for term in self.terms.values():
            for ancestor in term.distances:
                descendants[ancestor].add(term.term_id)
        return descendants


def load_ontology(name: str) -> Ontology:
    """The newest version of an ontology in the installed package, without deprecated terms.

    Raises UserError for an unknown name, MissingFileError if the package is not installed.
    """
    check_ontologies([name])
    folder = _data_folder()
    version = _newest_version(
        json.loads((folder / "ontology_info.json").read_text(encoding="utf-8")), name
    )
    with gzip.open(folder / f"{name}-ontology-{version}.json.gz", "rt", encoding="utf-8") as file:
        return parse_ontology(name, version, json.load(file))


def check_ontologies(names: Iterable[str]) -> None:
    """Raises UserError unless `names` are ontologies of the installed package."""
    names = list(names)
    unknown = [name for name in names if name not in KNOWN]
    if unknown or not names or len(set(names)) < len(names):
        raise UserError(
            f"corpus.ontologies={names}: expected one or more of {', '.join(KNOWN)}, each once"
        )
    _data_folder()


def parse_ontology(name: str, version: str, entries: Mapping[str, Mapping[str, Any]]) -> Ontology:
    """Parse the package's format: id -> label, description, synonyms, ancestors (id -> distance),
    deprecated.

    Raises UserError if the entries have another format.
    """
    try:
        return _parse(name, version, entries)
    except (LookupError, TypeError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{name} {version} does not have the format of {PACKAGE} ({cause}): install the pinned "
            "version"
        ) from None


def _parse(name: str, version: str, entries: Mapping[str, Mapping[str, Any]]) -> Ontology:
    left_out: Counter[str] = Counter()
    definitions_left_out: Counter[str] = Counter()
    reasons = {term_id: _reason_to_leave_out(entry) for term_id, entry in entries.items()}
    left_out.update(reason for reason in reasons.values() if reason)
    terms: dict[str, Term] = {}
    for term_id in sorted(term_id for term_id, reason in reasons.items() if not reason):
        entry = entries[term_id]
        distances = {
            ancestor: steps
            for ancestor, steps in sorted(entry["ancestors"].items())
            if not reasons[ancestor]
        }
        if distances and 1 not in distances.values():
            left_out["part of a term of another ontology"] += 1
            continue
        synonyms = tuple(
            sorted({" ".join(synonym.split()) for synonym in entry.get("synonyms", ())})
        )
        definition, reason = _definition(entry)
        definitions_left_out.update([reason] if reason else [])
        terms[term_id] = Term(term_id, _name(entry), definition, synonyms, distances)
    if lost := {ancestor for term in terms.values() for ancestor in term.distances} - terms.keys():
        raise LookupError(f"{min(lost)} is left out, but has terms below it")
    return Ontology(name, version, terms, left_out, definitions_left_out)


def held_out_terms(ontology: Ontology, share: float, seed: int) -> set[str]:
    """The terms that no training page names or defines: the fraction `share` of the terms without
    children, chosen by a seeded hash.

    A term with children cannot be held out, because their names contain its name ("familial X type
    3").
    """
    return {
        term_id
        for term_id in ontology.terms
        if not ontology.children[term_id] and unit_hash(seed, "held out term", term_id) < share
    }


# The package's files
# ----------------------------------------------------------------------------------------------


def _data_folder() -> Path:
    """The package's data folder. The package is not imported: its dependencies are missing."""
    try:
        folder = Path(str(distribution(PACKAGE).locate_file(PACKAGE.replace("-", "_")))) / "data"
    except PackageNotFoundError:
        raise MissingFileError(
            f"corpus.kind=ontology needs the package {PACKAGE}: run `make install` (or pip install "
            f"--no-deps {PACKAGE})"
        ) from None
    return folder


def _newest_version(info: Mapping[str, Any], name: str) -> str:
    listed = {
        release: entry["ontologies"][name]["version"]
        for release, entry in info.items()
        if name in entry["ontologies"]
    }
    return listed[max(listed, key=lambda release: tuple(map(int, release.split("."))))]


# One entry
# ----------------------------------------------------------------------------------------------


def _reason_to_leave_out(entry: Mapping[str, Any]) -> str | None:
    if entry["deprecated"]:
        return "deprecated"
    if entry.get("description", "").startswith("OBSOLETE"):
        return "definition says obsolete"
    return None if _name(entry) else "no name"


def _name(entry: Mapping[str, Any]) -> str:
    return " ".join(entry["label"].split()).rstrip(".")


def _definition(entry: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The cleaned definition, or the reason why there is none."""
    raw = entry.get("description", "")
    if not raw.strip() or raw.startswith(PLACEHOLDER):
        return None, "none given"
    if GENERATED in raw:
        return None, "marked automatically generated"
    definition = clean_definition(raw)
    if re.search(r"\b[A-Z]{2,}:\d{7}\b", definition):
        return None, "names a term by its number"
    if not says_more_than(_name(entry), definition):
        return None, "says no more than the name"
    return definition, None
