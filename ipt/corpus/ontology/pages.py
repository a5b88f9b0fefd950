"""Writes pages about ontology terms: a term, its definition, and the more specific terms below it.

Each term with a definition is defined on exactly one page. Pages are found bottom-up: if a term's
text and everything collected below it fill a page, the term gets a page; otherwise everything moves
up to its most specific parent. The wording depends on a hash of the term, so it is the same in
every run.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ipt.corpus.hashing import pick
from ipt.corpus.ontology.definitions import (
    aliases,
    define,
    define_it,
    join_names,
    sentence_case,
    starts_with_name,
)
from ipt.corpus.ontology.terms import IS_A, Ontology, Term

# minimum of characters for a page
FULL_PAGE = 600
# longer text continues on another page; the text of one term is never split
LONGEST_PAGE = 2000
# maximum number of terms without definition, and of terms with their own page, that a page names
LISTED_NAMES = 10


@dataclass(frozen=True)
class Page:
    """One page and its terms."""

    page_id: str
    title: str
    text: str  # the title included
    head: str  # id of the term that the page is about
    defined: tuple[str, ...]  # ids of the terms that the page defines
    named: tuple[str, ...]  # ids of the terms without definition that the page names


@dataclass
class _Collected:
    """Terms below one term that have no page yet."""

    # terms with definitions, those of one subgroup together
    blocks: list[list[str]] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)
    with_pages: list[str] = field(default_factory=list)


def make_pages(
    ontology: Ontology, held_out: set[str], left_out: Counter[str]
) -> tuple[list[Page], list[Page]]:
    """The training pages, which do not mention the terms in `held_out`, and the held-out pages.

    Both are sorted by id. Held-out terms must have no children. Terms on no page are counted in
    `left_out` by reason.
    """
    training = _PageWriter(ontology, held_out, ontology.terms.keys() - held_out, "").pages()
    reserved = _PageWriter(ontology, held_out, held_out, "held-out/").pages()
    standing = {
        term_id for page in (*training, *reserved) for term_id in (*page.defined, *page.named)
    }
    left_out["no definition, and no room among the names on a page"] += len(
        ontology.terms.keys() - standing
    )
    return training, reserved


class _PageWriter:
    """Writes the pages that define the terms of one `side` of the split.

    Terms of the other side occur only as heads of pages.
    """

    def __init__(
        self, ontology: Ontology, held_out: set[str], side: Iterable[str], prefix: str
    ) -> None:
        self.ontology, self.terms, self.homes = ontology, ontology.terms, ontology.homes
        self.side, self.prefix = set(side), prefix
        self.phrases = _IS_A_PHRASES if ontology.name in IS_A else _NEUTRAL_PHRASES
        held_out_names = {
            name.lower()
            for term_id in held_out
            for name in (self.terms[term_id].name, *self.terms[term_id].synonyms)
        }
        self.secret = held_out_names if not self.side & held_out else set()

    def pages(self) -> list[Page]:
        collected = {term_id: _Collected() for term_id in self.terms}
        pages = []
        for term_id in sorted(self.terms, key=lambda term_id: (-self._depth(term_id), term_id)):
            here, home = collected.pop(term_id), self.homes[term_id]
            own = [term_id] if term_id in self.side and self.terms[term_id].definition else []
            length = sum(self._length(entry) for block in [own, *here.blocks] for entry in block)
            if length >= FULL_PAGE or (length and home is None):
                pages += self._write(term_id, here)
                if home is not None and term_id in self.side:
                    collected[home].with_pages.append(term_id)
            elif home is not None:
                above = collected[home]
                block = own + [entry for block in self._sorted(here.blocks) for entry in block]
                above.blocks += [block] if block else []
                above.undefined += here.undefined + (
                    [term_id] if term_id in self.side and not own else []
                )
                above.with_pages += here.with_pages
        return sorted(pages, key=lambda page: page.page_id)

    def _depth(self, term_id: str) -> int:
        home = self.homes[term_id]
        return 0 if home is None else 1 + self._depth(home)

    def _length(self, term_id: str) -> int:
        """Approximate number of characters of a term's text on a page."""
        term = self.terms[term_id]
        return len(term.name) + len(term.definition or "") + 30 * (2 + bool(term.synonyms))

    def _sorted(self, blocks: list[list[str]]) -> list[list[str]]:
        return sorted(blocks, key=lambda block: _natural(self.terms[block[0]].name))

    # One term's pages
    # ----------------------------------------------------------------------------------------------

    def _write(self, head: str, here: _Collected) -> list[Page]:
        """The page of `head` and its continuation pages."""
        own = head in self.side
        listed = pick((True, False), "listed", head)
        entries = [entry for block in self._sorted(here.blocks) for entry in block]
        lead = self._lead(self.terms[head]) if own else ""
        parts = _divide(entries, [self._length(entry) for entry in entries], len(lead))
        undefined = sorted(here.undefined, key=lambda term_id: _natural(self.terms[term_id].name))
        pages = []
        for part, defined in enumerate(parts):
            named = undefined[part * LISTED_NAMES : (part + 1) * LISTED_NAMES]
            others = named + (sorted(here.with_pages)[:LISTED_NAMES] if not part else [])
            title = self._title(head, part)
            paragraphs = [
                title,
                lead if not part else "",
                self._list(head, part, defined, listed),
                self._others(head, others),
            ]
            text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
            first = [head] if own and not part else []
            if self.terms[head].definition:
                defined = first + defined
            else:
                named = first + named
            page_id = f"{self.prefix}{head}" + (f"/{part + 1}" if part else "")
            pages.append(Page(page_id, title, text, head, tuple(defined), tuple(named)))
        return pages

    def _title(self, head: str, part: int) -> str:
        name = self.terms[head].name
        title = sentence_case(name) if head in self.side else self.phrases.title.format(name)
        return f"{title} (continued)" if part else title

    def _lead(self, term: Term) -> str:
        """Introduces the head: name, definition, parents and synonyms, in one of several orders."""
        name, place = sentence_case(term.name), self._place(self._parents(term))
        if term.definition is None:
            return _spaced(f"{name} {place}." if place else "", self._also_called(term))
        if place and pick((True, False), "place first", name):
            return _spaced(f"{name} {place}.", define_it(term.definition), self._also_called(term))
        return _spaced(
            define(term.name, term.definition),
            f"It {place}." if place else "",
            self._also_called(term),
        )

    def _list(self, head: str, part: int, defined: list[str], listed: bool) -> str:
        """The terms below the head, as paragraphs or as a list."""
        if not defined:
            return ""
        name = self.terms[head].name
        intro = []
        if part:
            first = self.terms[defined[0]].name
            last = self.terms[defined[-1]].name
            intro = [pick(self.phrases.more, "more", head, part).format(name, first, last)]
        elif head in self.side:
            frames = self.phrases.one if len(defined) == 1 else self.phrases.several
            intro = [pick(frames, "intro", head).format(name, sentence_case(name))]
        entries = [self._entry(entry, head, listed) for entry in defined]
        return ("\n" if listed else "\n\n").join(intro + entries)

    def _entry(self, term_id: str, head: str | None, listed: bool) -> str:
        """A term on the page of `head`: its definition, its parents other than the head, and its
        synonyms.
        """
        term = self.terms[term_id]
        assert term.definition is not None
        definition = term.definition.lower()
        place = self._place(
            [
                parent
                for parent in self._parents(term, besides=head)
                if parent.lower() not in definition
            ]
        )
        place = f"It {place}." if place else ""
        if not listed:
            return _spaced(define(term.name, term.definition), place, self._also_called(term))
        if starts_with_name(term.definition, term.name):
            return _spaced(f"- {term.definition}", place, self._also_called(term))
        also = self._aliases(term)
        name = sentence_case(term.name) + (f" (also {join_names(also, 'or')})" if also else "")
        return _spaced(f"- {name}: {term.definition}", place)

    def _others(self, head: str, others: list[str]) -> str:
        names = [
            self.terms[term_id].name
            for term_id in sorted(others, key=lambda term_id: _natural(self.terms[term_id].name))
        ]
        frames = self.phrases.other if len(names) == 1 else self.phrases.others
        return (
            pick(frames, "others", head).format(self.terms[head].name, join_names(names))
            if names
            else ""
        )

    def _parents(self, term: Term, besides: str | None = None) -> list[str]:
        """Names of the nearest parents other than `besides`: at most one if `besides` is given and
        the links of the ontology are mixed, else two.
        """
        nearest = self.ontology.nearest_parents(term.term_id)
        most = 1 if besides and self.phrases is _NEUTRAL_PHRASES else 2
        return [self.terms[parent].name for parent in nearest[:most] if parent != besides]

    def _place(self, parents: list[str]) -> str:
        return (
            self.phrases.place.format(join_names(parents, self.phrases.conjunction))
            if parents
            else ""
        )

    def _aliases(self, term: Term) -> list[str]:
        return aliases(
            term.name, [synonym for synonym in term.synonyms if synonym.lower() not in self.secret]
        )

    def _also_called(self, term: Term) -> str:
        names = self._aliases(term)
        frame = pick(
            ("It is also called {0}.", "It is also known as {0}.", "Another name for it is {0}."),
            "also called",
            term.name,
        )
        if len(names) > 1 and frame.startswith("Another"):
            return f"Other names for it are {join_names(names)}."
        return frame.format(join_names(names, "or")) if names else ""


@dataclass(frozen=True)
class _Phrases:
    """Sentence frames. {0} is the name of the head unless a comment says otherwise."""

    place: str  # {0}: the parents
    conjunction: str  # before the last of them
    title: str  # of a page that does not define its head
    one: tuple[str, ...]  # {1}: the name with a capital
    several: tuple[str, ...]
    more: tuple[str, ...]  # {1}, {2}: the first and the last name
    other: tuple[str, ...]  # {1}: the only name
    others: tuple[str, ...]  # {1}: the names


_IS_A_PHRASES = _Phrases(
    place="is a kind of {0}",
    conjunction="and of",
    title="Kinds of {0}",
    one=("One kind of {0} is described here.", "A more specific kind:"),
    several=(
        "Kinds of {0}:",
        "{1} takes several forms.",
        "Several kinds of {0} are told apart.",
        "More specific terms:",
    ),
    more=("More kinds of {0}, from {1} to {2}:", "Further kinds of {0} follow, from {1} to {2}."),
    other=("Another kind of {0} is {1}.",),
    others=(
        "Other kinds of {0} include {1}.",
        "Also classed as kinds of {0}: {1}.",
        "Among the other kinds of {0} are {1}.",
    ),
)
_NEUTRAL_PHRASES = _Phrases(
    place="is classed under {0}",
    conjunction="and",
    title="Terms related to {0}",
    one=("A related, more specific term:",),
    several=(
        "Related, more specific terms:",
        "Classed under {0} are the following.",
        "More specific terms under {0}:",
    ),
    more=(
        "More terms classed under {0}, from {1} to {2}:",
        "Further related, more specific terms, from {1} to {2}:",
    ),
    other=("Also classed under {0}: {1}.",),
    others=("Also classed under {0}: {1}.", "Other terms under {0} include {1}."),
)


def _divide(entries: list[str], lengths: list[int], lead: int) -> list[list[str]]:
    """Split `entries` into runs of about equal length, at least one.

    A run is longer than a page only if a single entry is.
    """
    total = lead + sum(lengths)
    target = total / -(-total // LONGEST_PAGE) if total else 0
    parts: list[list[str]] = [[]]
    length: float = lead
    for entry, entry_length in zip(entries, lengths, strict=True):
        if length and length + entry_length / 2 > target:
            parts.append([])
            length = 0
        parts[-1].append(entry)
        length += entry_length
    return parts


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that orders type 2 before type 10."""
    return [
        (int(digits or 0), text.lower()) for text, digits in re.findall(r"([^\d]*)(\d{0,9})", name)
    ]


def _spaced(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
