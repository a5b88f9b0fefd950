"""Closed-book questions: those made from an ontology, and those that a user lays beside a corpus.

One question is {"id", "task", "split", "prompt", "options", "gold", "meta"}; what is scored is the prompt followed by an option.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipt.corpus.definitions import MASK, mask
from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology import IS_A, KNOWN, Ontology, Term
from ipt.corpus.pages import Page, home_terms

RECALL, GENERALISATION = "recall", "generalisation"
DEFINITION_TO_TERM, IS_A_TASK = "definition_to_term", "is_a"
LONGEST_DESCRIPTION = 500  # characters of a definition that a question quotes, in whole sentences
FEWEST_WORDS, SMALLEST_SHARE = 8, 0.6  # what must be left of a definition when its name is masked: words, and share of its words
FARTHEST = 3  # steps up to the ancestor that a wrong option shares with the right one
_OVERALL = 0.2  # a parent of a larger share of the ontology is no question: it is everything's
_EVERYWHERE = {"cell", "cells", "disease", "disorder", "syndrome", "type", "form", "familial", "hereditary", "system"}

Question = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """An ontology with the terms that questions of one split may ask about and offer as options."""

    ontology: Ontology
    pool: frozenset[str]
    preferred: frozenset[str]  # asked about first


class Relations:
    """Who is near whom among the terms of one family."""

    def __init__(self, family: Family) -> None:
        self.terms = family.ontology.terms
        self.homes = home_terms(family.ontology)
        self.descendants: dict[str, set[str]] = defaultdict(set)
        self.near: dict[tuple[str, int], list[str]] = defaultdict(list)
        for term in self.terms.values():
            for ancestor, steps in term.distances.items():
                self.descendants[ancestor].add(term.term_id)
                if steps <= FARTHEST and term.term_id in family.pool:
                    self.near[ancestor, steps].append(term.term_id)

    def relatives(self, term: Term) -> Iterator[list[str]]:
        """Terms of the pool that share a parent with `term`, then those that share a grandparent, and so on; each once."""
        seen = {term.term_id}
        for level in range(1, FARTHEST + 1):
            ancestors = sorted(ancestor for ancestor, steps in term.distances.items() if steps <= level)
            found = {other for ancestor in ancestors for steps in range(1, level + 1) for other in self.near[ancestor, steps]} - seen
            seen |= found
            yield sorted(found)

    def may_overlap(self, one: str, other: str) -> bool:
        """Whether a term could be a kind of both: one is beneath the other, or something is beneath both."""
        below, others = self.descendants[one] | {one}, self.descendants[other] | {other}
        return not below.isdisjoint(others)


def ontology_questions(families: Mapping[str, list[Family]], count: int, seed: int, passed_over: Counter[str]) -> list[Question]:
    """`count` questions of each task and split, fewer where the terms do not give as many.

    `families` maps a split to its families. Terms that give no good question are counted in `passed_over` by reason, as far
    as they were looked at.
    """
    questions = []
    for split, members in families.items():
        relations = [(family, Relations(family)) for family in members]
        candidates = [(family, relation, term) for family, relation in relations for term in _in_order(family, seed)]
        candidates.sort(key=lambda candidate: _rank(candidate[0], candidate[2], seed))
        questions += _take(DEFINITION_TO_TERM, split, candidates, count, seed, passed_over, _definition_to_term)
        kinds = [candidate for candidate in candidates if candidate[0].ontology.name in IS_A]
        questions += _take(IS_A_TASK, split, kinds, count, seed, passed_over, _is_a)
    return questions
