"""Builds the embedded corpus: pages and closed-book questions from ontologies."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ipt.config import CorpusConfig
from ipt.console import progress
from ipt.corpus.decontaminate import OVERLAPS, Decontamination
from ipt.corpus.documents import Document
from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology.pages import Page, make_pages
from ipt.corpus.ontology.questions import Asker, ask
from ipt.corpus.ontology.terms import Ontology, check_ontologies, held_out_terms, load_ontology
from ipt.corpus.questions import GENERALISATION, RECALL
from ipt.corpus.writer import DocumentWriter, sizes, write_questions

Key = TypeVar("Key")


@dataclass(frozen=True)
class Book:
    """One ontology as pages."""

    ontology: Ontology
    held_out: set[str]  # ids of terms
    pages: list[Page]
    held_out_pages: list[Page]
    left_out: Counter[str]  # terms on no page, by reason


# a page with the book that contains it
BookPage = tuple[Book, Page]


def build_ontology(
    config: CorpusConfig, seed: int, output: Path, decontamination: Decontamination
) -> dict[str, Any]:
    """Write pages and questions to `output`; return statistics."""
    check_ontologies(config.ontologies)
    books = []
    with progress("corpus", len(config.ontologies)) as bar:
        for name in sorted(config.ontologies):
            books.append(make_book(load_ontology(name), config.held_out_fraction, seed))
            bar.advance(note=name)
    pages = shuffled(((book, page) for book in books for page in book.pages), seed)
    first = pages[: config.max_documents]
    kept = [owned for owned in first if not decontamination.drops(owned[1].text)]
    held_out = shuffled(((book, page) for book in books for page in book.held_out_pages), seed)
    with (
        DocumentWriter(output / "documents") as training_writer,
        DocumentWriter(output / "held_out") as held_out_writer,
    ):
        for writer, side in ((training_writer, kept), (held_out_writer, held_out)):
            for book, page in side:
                writer.add(_document(book.ontology, page))
    mentions = count_mentions(_held_out_names(books), [page.text for _, page in kept])
    by_name = [count for (_, kind), count in mentions.items() if kind == "name"]
    by_synonym = [count for (_, kind), count in mentions.items() if kind == "synonyms"]
    mentioned = {term_id for term_id, _ in mentions}
    passed_over: Counter[str] = Counter()
    askers = make_askers(books, kept, mentioned, seed)
    questions = ask(askers, config.questions, passed_over)
    return {
        "kind": "ontology",
        **sizes(training_writer, held_out_writer),
        "questions": write_questions(output, questions),
        "questions_passed_over": dict(passed_over),
        "ontologies": {book.ontology.source: _account(book, first, kept) for book in books},
        "held_out_in_training_text": {
            "terms_by_name": len(by_name),
            "mentions_by_name": sum(by_name),
            "terms_by_synonym": len(by_synonym),
            "mentions_by_synonym": sum(by_synonym),
        },
        "dropped": {OVERLAPS: len(first) - len(kept)} if len(kept) < len(first) else {},
        **decontamination.report(),
    }


def make_book(ontology: Ontology, held_out_fraction: float, seed: int) -> Book:
    held_out = held_out_terms(ontology, held_out_fraction, seed)
    left_out = Counter(ontology.left_out)
    pages, held_out_pages = make_pages(ontology, held_out, left_out)
    return Book(ontology, held_out, pages, held_out_pages, left_out)


def shuffled(pages: Iterable[BookPage], seed: int) -> list[BookPage]:
    """`pages` in an order that depends only on their ids and the seed."""

    def rank(owned: BookPage) -> tuple[float, str]:
        page_id = owned[1].page_id
        return unit_hash(seed, "page", page_id), page_id

    return sorted(pages, key=rank)


def make_askers(
    books: list[Book], kept: list[BookPage], mentioned: set[str], seed: int
) -> dict[str, list[Asker]]:
    """Split -> one asker per book.

    Recall covers the terms defined on a kept training page. Generalisation covers held-out terms
    except those in `mentioned`, which a training page names; it prefers terms with a parent that
    heads a kept page.
    """
    askers: dict[str, list[Asker]] = {RECALL: [], GENERALISATION: []}
    for book in books:
        pages = _pages_of(book, kept)
        heads = {page.head for page in pages}
        known = _defined(pages)
        unseen = _defined(book.held_out_pages) - mentioned
        terms = book.ontology.terms
        near = {term_id for term_id in unseen if heads.intersection(terms[term_id].parents)}
        askers[RECALL].append(Asker(book.ontology, known, set(), seed))
        askers[GENERALISATION].append(Asker(book.ontology, unseen, near, seed))
    return askers


def count_mentions(names: Mapping[Key, list[str]], texts: list[str]) -> Counter[Key]:
    """Key -> number of `texts` that contain one of its names word for word, for example in the
    definition of another term.
    """
    by_first_word: dict[str, list[tuple[list[str], Key]]] = defaultdict(list)
    for key, spellings in names.items():
        for spelling in spellings:
            words = _words(spelling)
            if words:
                by_first_word[words[0]].append((words, key))
    mentions: Counter[Key] = Counter()
    for text in texts:
        words = _words(text)
        found: set[Key] = set()
        for place, word in enumerate(words):
            for name, key in by_first_word.get(word, ()):
                if words[place : place + len(name)] == name:
                    found.add(key)
        mentions.update(found)
    return mentions


def _held_out_names(books: list[Book]) -> dict[tuple[str, str], list[str]]:
    """(Id of a held-out term, "name" or "synonyms") -> the spellings to search for.

    Leaves out short synonyms of one word ("LN"), which mean anything in a text.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for book in books:
        for term_id in sorted(book.held_out):
            term = book.ontology.terms[term_id]
            long = [synonym for synonym in term.synonyms if " " in synonym or len(synonym) > 5]
            names[term_id, "name"] = [term.name]
            names[term_id, "synonyms"] = long
    return names


def _document(ontology: Ontology, page: Page) -> Document:
    meta = {"title": page.title, "head": page.head, "terms": page.defined}
    return Document(page.page_id, page.text, ontology.source, meta)


def _pages_of(book: Book, pages: list[BookPage]) -> list[Page]:
    return [page for owner, page in pages if owner is book]


def _defined(pages: list[Page]) -> set[str]:
    return {term_id for page in pages for term_id in page.defined}


def _account(book: Book, first: list[BookPage], kept: list[BookPage]) -> dict[str, Any]:
    """Counts that cover each term of an ontology once.

    `first`: the pages up to corpus.max_documents; `kept`: those of them that are written.
    """
    ontology = book.ontology
    first_pages = _pages_of(book, first)
    kept_pages = _pages_of(book, kept)
    left_out = dict(book.left_out)
    left_out["on a page beyond corpus.max_documents"] = _terms(book.pages) - _terms(first_pages)
    if len(kept_pages) < len(first_pages):
        left_out[f"on a page that {OVERLAPS}"] = _terms(first_pages) - _terms(kept_pages)
    read = len(ontology.terms) + sum(ontology.left_out.values())
    assert read == sum(left_out.values()) + _terms(kept_pages) + _terms(book.held_out_pages)
    return {
        "terms": read,
        "training": _page_counts(kept_pages),
        "held_out": _page_counts(book.held_out_pages),
        "left_out": left_out,
        "definitions_left_out": dict(ontology.definitions_left_out),
    }


def _page_counts(pages: list[Page]) -> dict[str, int]:
    return {
        "pages": len(pages),
        "defined": sum(len(page.defined) for page in pages),
        "named_only": sum(len(page.named) for page in pages),
    }


def _terms(pages: list[Page]) -> int:
    return sum(len(page.defined) + len(page.named) for page in pages)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
