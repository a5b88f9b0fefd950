"""Makes closed-book questions from an ontology. See `ipt.corpus.questions` for the format."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property

from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology.definitions import MASK, mask
from ipt.corpus.ontology.terms import IS_A, KNOWN, Ontology, Term
from ipt.corpus.questions import Question

# maximum length in characters of a definition that a question quotes, in complete sentences
LONGEST_DESCRIPTION = 500
# minimum that is left of a definition after masking: words, and fraction of its words
FEWEST_WORDS = 8
SMALLEST_FRACTION = 0.6
# maximum number of steps to the common ancestor of a wrong and the right option
FARTHEST = 5
# fraction of common words from which two definitions count as the same
SAME_DEFINITION = 0.6
# maximum ratio of the sizes of the right and the wrong kind
SIMILAR_SIZE = 3
# kinds with more descendants are too general for a question
LARGEST_KIND = 300
COMMON = "cell disease disorder syndrome type form familial hereditary system"
COMMON_WORDS = frozenset(COMMON.split())

_ONLY_GENE = re.compile(
    r"cause of the disease is an? \w+(?: and/or \w+)? in the \S+ gene|material basis in"
)


class Asker:
    """Makes the questions of one split about one ontology.

    Questions and options use only terms in `pool`, so that no option can be recognized by whether
    it occurs in the training text. Terms in `preferred` come first.
    """

    def __init__(self, ontology: Ontology, pool: set[str], preferred: set[str], seed: int) -> None:
        self.ontology = ontology
        self.terms = ontology.terms
        self.pool = pool
        self.preferred = preferred
        self.seed = seed

    def definition_to_term(self, term: Term, number: int) -> Question | str:
        """Asks which of four related terms has this definition. The gold option is at index
        `number % 4`. Returns the reason if the term gives no question.
        """
        assert term.definition is not None
        description = _beginning(term.definition)
        if _ONLY_GENE.search(description):
            return "the definition tells no more than a gene"
        masked = mask(description, (term.name, *term.synonyms))
        left = masked.replace(MASK, " ").split()
        telling = {word.lower() for word in left if len(word) > 4}
        if (
            len(left) < FEWEST_WORDS
            or len(telling) < FEWEST_WORDS / 2
            or len(left) < SMALLEST_FRACTION * len(description.split())
        ):
            return "too little is left of the definition without the name"
        others = self._distractors(term, masked, 3)
        if len(others) < 3:
            return "too few related terms"
        gold = number % 4
        names = [
            self.terms[other].name
            for other in sorted(others, key=lambda other: unit_hash(self.seed, term.term_id, other))
        ]
        names.insert(gold, term.name)
        prompt = f"Which {KNOWN[self.ontology.name]} is described here?\n{masked}\nAnswer:"
        return {"prompt": prompt, "options": [f" {name}" for name in names], "gold": gold}

    def is_a(self, term: Term, number: int) -> Question | str:
        """Asks whether the term is a kind of its parent (even `number`) or of a relative's parent
        (odd `number`). Returns the reason if the term gives no question.

        Both questions are possible for each term that is used. The two kinds have similar sizes and
        share equally many words with the term's name, so neither the name nor the kind reveals the
        answer.
        """
        parents = [
            parent
            for parent in self.ontology.nearest_parents(term.term_id)
            if self._size(parent) <= LARGEST_KIND
        ]
        if not parents:
            return "its parents are too general"
        parents = [parent for parent in parents if not self._is_named(term, parent)]
        if not parents:
            return "its name names its parent"
        right = min(parents, key=lambda parent: self._shared_words(term, parent))
        wrong = self._wrong_kind(term, right)
        if wrong is None:
            return "no kind near it is surely wrong and as likely by name and size"
        kind = right if number % 2 == 0 else wrong
        prompt = f"Question: Is {term.name} a kind of {self.terms[kind].name}?\nAnswer:"
        return {
            "prompt": prompt,
            "options": [" yes", " no"],
            "gold": number % 2,
            "meta": {"kind": kind},
        }

    def rank(self, task: str, term_id: str) -> tuple[bool, float]:
        return term_id not in self.preferred, unit_hash(self.seed, task, term_id)

    @cached_property
    def near_terms(self) -> dict[tuple[str, int], list[str]]:
        return self._near(self.pool)

    @cached_property
    def near_kinds(self) -> dict[tuple[str, int], list[str]]:
        kinds = {
            parent for term_id in self.pool for parent in self.ontology.nearest_parents(term_id)
        }
        return self._near({kind for kind in kinds if self._size(kind) <= LARGEST_KIND})

    def _near(self, term_ids: Iterable[str]) -> dict[tuple[str, int], list[str]]:
        """(Ancestor, steps) -> those of `term_ids` that are that many steps below it."""
        near: dict[tuple[str, int], list[str]] = defaultdict(list)
        for term_id in sorted(term_ids):
            for ancestor, steps in self.terms[term_id].distances.items():
                if steps <= FARTHEST:
                    near[ancestor, steps].append(term_id)
        return near

    def _relatives(
        self, term: Term, near: Mapping[tuple[str, int], list[str]]
    ) -> Iterator[list[str]]:
        """Terms of `near` that share a parent with `term`, then those that share a grandparent, and
        so on. Each term occurs once.
        """
        seen = {term.term_id}
        for level in range(1, FARTHEST + 1):
            ancestors = [ancestor for ancestor, steps in term.distances.items() if steps <= level]
            found = {
                other
                for ancestor in ancestors
                for steps in range(1, level + 1)
                for other in near.get((ancestor, steps), ())
            } - seen
            seen |= found
            yield sorted(found)

    def _distractors(self, term: Term, masked: str, count: int) -> list[str]:
        """The nearest relatives with names of similar length that differ in more than a number."""
        taken = {_bare(name) for name in (term.name, *term.synonyms)}
        chosen: list[str] = []
        for relatives in self._relatives(term, self.near_terms):
            for other in sorted(relatives, key=lambda other: self._likeness(term, other)):
                if len(chosen) == count:
                    return chosen
                bare = _bare(self.terms[other].name)
                if bare not in taken and self._is_rival(term, self.terms[other], masked):
                    chosen.append(other)
                    taken.add(bare)
        return chosen

    def _is_rival(self, term: Term, other: Term, masked: str) -> bool:
        """Whether `other` is a wrong answer: neither ancestor nor descendant, not named in the
        definition, and with a different definition.
        """
        if (
            other.term_id in term.distances
            or term.term_id in other.distances
            or other.name.lower() in masked.lower()
        ):
            return False
        beginning = _beginning(other.definition or "")
        words = set(masked.split())
        other_words = set(mask(beginning, (other.name, *other.synonyms)).split())
        return len(words & other_words) < SAME_DEFINITION * len(words | other_words)

    def _likeness(self, term: Term, other: str) -> tuple[int, float]:
        return abs(len(term.name) - len(self.terms[other].name)) // 5, unit_hash(
            self.seed, "option", term.term_id, other
        )

    def _wrong_kind(self, term: Term, right: str) -> str | None:
        """A nearby kind that certainly excludes the term, with a size and a name as plausible as
        those of the right one.
        """
        size, words = self._size(right), self._shared_words(term, right)
        for kinds in self._relatives(term, self.near_kinds):
            alike = [
                kind
                for kind in kinds
                if size / SIMILAR_SIZE <= self._size(kind) <= size * SIMILAR_SIZE
            ]
            likely = [
                kind
                for kind in alike
                if self._shared_words(term, kind) == words and not self._is_named(term, kind)
            ]
            fitting = [kind for kind in likely if self._surely_not(term, kind)]
            if fitting:
                return min(fitting, key=lambda kind: unit_hash(self.seed, "no", term.term_id, kind))
        return None

    def _surely_not(self, term: Term, kind: str) -> bool:
        """Whether no term belongs both to this kind and to one of the term's parents."""
        below = self.ontology.descendants[kind]
        return all(below.isdisjoint(self.ontology.descendants[parent]) for parent in term.parents)

    def _size(self, kind: str) -> int:
        return len(self.ontology.descendants[kind])

    def _is_named(self, term: Term, kind: str) -> bool:
        """Whether the term's name contains its kind, as in "plexiform schwannoma"."""
        return _content(self.terms[kind].name) <= _content(term.name)

    def _shared_words(self, term: Term, kind: str) -> int:
        return len(_content(term.name) & _content(self.terms[kind].name))


def ask(askers: Mapping[str, list[Asker]], count: int, passed_over: Counter[str]) -> list[Question]:
    """Up to `count` questions per task and split.

    `askers` maps a split to its askers. Terms that were tried but give no good question are counted
    in `passed_over` by reason. Only ontologies whose parents are kinds get `is_a` questions.
    """
    questions: list[Question] = []
    for split, members in askers.items():
        questions += _take(
            "definition_to_term", split, members, count, Asker.definition_to_term, passed_over
        )
        kinds = [asker for asker in members if asker.ontology.name in IS_A]
        questions += _take("is_a", split, kinds, count, Asker.is_a, passed_over)
    return questions


# One question
# ----------------------------------------------------------------------------------------------


def _take(
    task: str,
    split: str,
    askers: list[Asker],
    count: int,
    make: Callable[[Asker, Term, int], Question | str],
    passed_over: Counter[str],
) -> list[Question]:
    """The first `count` questions, with the terms in order of rank."""
    candidates = [
        (asker.rank(task, term_id), term_id, asker) for asker in askers for term_id in asker.pool
    ]
    questions: list[Question] = []
    for _, term_id, asker in sorted(candidates, key=lambda candidate: candidate[:2]):
        if len(questions) == count:
            break
        made = make(asker, asker.terms[term_id], len(questions))
        if isinstance(made, str):
            passed_over[f"{task}: {made}"] += 1
            continue
        identity = {"id": f"{task}/{split}/{term_id}", "task": task, "split": split}
        meta = {"term": term_id, "source": asker.ontology.source, **made.get("meta", {})}
        questions.append({**identity, **made, "meta": meta})
    return questions


def _beginning(definition: str) -> str:
    """The first sentences of a definition up to LONGEST_DESCRIPTION, at least one."""
    first, *others = re.split(r"(?<=[a-z)\]][.;])\s+(?=[A-Z])", definition)
    for sentence in others:
        if len(first) + len(sentence) > LONGEST_DESCRIPTION:
            break
        first = f"{first} {sentence}"
    return first


def _bare(name: str) -> frozenset[str]:
    """The words of a name without numbers, single letters, Roman numerals and the word "type"."""
    words = re.findall(r"[^\W_]+", name.lower())
    return frozenset(word for word in words if not re.fullmatch(r".|[ivx]+|\w*\d\w*|type", word))


@cache
def _content(name: str) -> frozenset[str]:
    """First four letters of the words with meaning, to find names that contain each other."""
    words = re.findall(r"[^\W_]+", name.lower())
    return frozenset(
        word[:4]
        for word in words
        if len(word) > 3 and COMMON_WORDS.isdisjoint((word, word.removesuffix("s")))
    )
