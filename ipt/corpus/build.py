"""The corpus stage: from where documents come from to `documents/`, `held_out/` and, where there are any, questions."""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from ipt.config import CorpusConfig
from ipt.console import progress
from ipt.corpus.documents import QUESTIONS, SCHEMA, Document, find_files, read_documents
from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology import Ontology, check_ontologies, held_out_terms, load_ontology
from ipt.corpus.pages import Page, make_pages
from ipt.corpus.questions import GENERALISATION, RECALL, Asker, Question, ask, count_questions, read_questions
from ipt.stage import atomic, write_parquet

KINDS = ("files", "hub", "ontology")
PART_DOCUMENTS, PART_CHARACTERS = 50_000, 32_000_000  # one output file holds at most about so much


def build_corpus(config: CorpusConfig, seed: int, output: Path) -> dict[str, Any]:
    """Write `documents/part-*.parquet`, `held_out/part-*.parquet` and perhaps `questions.jsonl` to `output`; return statistics.

    files and hub: a seeded hash of its id holds a document out; `limit` stops reading at so many training documents; a
    questions.jsonl beside the user's files is checked and taken over. What was read is what was written and what was dropped.
    ontology: a seeded hash holds terms out before pages are made; `limit` keeps the first pages of a seeded shuffle of all.
    Raises what `check_corpus` and `read_documents` raise.
    """
    _check_values(config)
    for folder in ("documents", "held_out"):
        shutil.rmtree(output / folder, ignore_errors=True)  # parts of an interrupted run
    (output / QUESTIONS).unlink(missing_ok=True)
    return _build_ontology(config, seed, output) if config.kind == "ontology" else _build_documents(config, seed, output)


def check_corpus(config: CorpusConfig) -> None:
    """Raise a one-line error for a corpus that cannot be read, before anything expensive happens.

    Looks at the settings, at the first document of files, and at a questions.jsonl beside them; reaches no hub.
    """
    _check_values(config)
    if config.kind == "ontology":
        check_ontologies(config.ontologies)
    elif config.kind == "hub":
        if not config.dataset:
            raise ValueError("corpus.dataset is not set: name a data set, such as corpus.dataset=owner/name")
        if find_spec("datasets") is None:
            raise ValueError("corpus=hub needs the package datasets: run `make install`")
    else:
        next(read_documents(config))
        for _ in _user_questions(config):
            pass


def input_files(config: CorpusConfig) -> dict[str, Path]:
    """Every file of the user's that the stage reads, by a name that does not depend on where the corpus is kept; else none."""
    if config.kind != "files" or not config.path:
        return {}
    files = {file.name: file.path for file in find_files(config.path)}
    questions = _questions_file(config)
    return {**files, QUESTIONS: questions} if questions else files


def _check_values(config: CorpusConfig) -> None:
    if config.kind not in KINDS:
        raise ValueError(f"corpus.kind={config.kind}: expected one of {', '.join(KINDS)}")
    if not 0 <= config.held_out < 1:
        raise ValueError(f"corpus.held_out={config.held_out}: expected a share of at least 0 and less than 1")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"corpus.limit={config.limit}: expected null or a number of documents, 1 or more")
    if config.questions < 0:
        raise ValueError(f"corpus.questions={config.questions}: expected 0 or more")


# Files and hub -------------------------------------------------------------------------------------------------------


def _build_documents(config: CorpusConfig, seed: int, output: Path) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    with (
        _Parts(output / "documents") as training,
        _Parts(output / "held_out") as held_out,
        progress("corpus", config.limit) as bar,
    ):
        for document in read_documents(config, dropped):
            if unit_hash(seed, "held out document", document.doc_id) < config.held_out:
                held_out.add(document)
                continue
            training.add(document)
            bar.advance()
            if training.documents == config.limit:
                break
        if not training.documents:
            raise ValueError(f"corpus.held_out={config.held_out} holds out all {held_out.documents} documents: make it smaller")
    questions = _write_questions(output, _user_questions(config))
    return {
        "kind": config.kind,
        "read": training.documents + held_out.documents + sum(dropped.values()),
        **_sizes(training, held_out),
        "dropped": dict(dropped),
        "stopped_at_limit": training.documents == config.limit,
        "questions": questions,
    }


def _user_questions(config: CorpusConfig) -> Iterator[Question]:
    path = _questions_file(config)
    return read_questions(path) if path else iter(())


def _questions_file(config: CorpusConfig) -> Path | None:
    """A questions.jsonl in the folder that `corpus.path` names, or beside the first of the user's files."""
    if config.kind != "files" or not config.path:
        return None
    folders = (Path(config.path), find_files(config.path)[0].path.parent)
    return next((folder / QUESTIONS for folder in folders if (folder / QUESTIONS).is_file()), None)


# Ontology ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Book:
    """One ontology as pages."""

    ontology: Ontology
    held_out: set[str]
    pages: list[Page]
    held_out_pages: list[Page]
    left_out: Counter[str]


def _build_ontology(config: CorpusConfig, seed: int, output: Path) -> dict[str, Any]:
    check_ontologies(config.ontologies)
    books = []
    with progress("corpus", len(config.ontologies)) as bar:
        for name in sorted(config.ontologies):
            books.append(_make_book(name, config.held_out, seed))
            bar.advance(note=name)
    kept = _shuffled(((book, page) for book in books for page in book.pages), seed)[: config.limit]
    reserved = _shuffled(((book, page) for book in books for page in book.held_out_pages), seed)
    with _Parts(output / "documents") as training, _Parts(output / "held_out") as held_out:
        for side, pages in ((training, kept), (held_out, reserved)):
            for book, page in pages:
                side.add(_document(book.ontology, page))
    texts = [page.text for _, page in kept]
    by_name, by_synonym = (_mentions(names, texts) for names in _held_out_names(books))
    passed_over: Counter[str] = Counter()
    made = ask(_askers(books, kept, {*by_name, *by_synonym}, seed), config.questions, passed_over)
    return {
        "kind": "ontology",
        **_sizes(training, held_out),
        "questions": _write_questions(output, made),
        "questions_passed_over": dict(passed_over),
        "ontologies": {book.ontology.source: _account(book, [page for owner, page in kept if owner is book]) for book in books},
        "held_out_in_training_text": {
            "terms_by_name": len(by_name),
            "mentions_by_name": sum(by_name.values()),
            "terms_by_synonym": len(by_synonym),
            "mentions_by_synonym": sum(by_synonym.values()),
        },
    }


def _make_book(name: str, share: float, seed: int) -> _Book:
    ontology = load_ontology(name)
    held_out, left_out = held_out_terms(ontology, share, seed), Counter(ontology.left_out)
    return _Book(ontology, held_out, *make_pages(ontology, held_out, left_out), left_out)


def _shuffled(pages: Iterable[tuple[_Book, Page]], seed: int) -> list[tuple[_Book, Page]]:
    return sorted(pages, key=lambda owned: (unit_hash(seed, "page", owned[1].page_id), owned[1].page_id))


def _document(ontology: Ontology, page: Page) -> Document:
    return Document(page.page_id, page.text, ontology.source, {"title": page.title, "head": page.head, "terms": page.defined})


def _askers(books: list[_Book], kept: list[tuple[_Book, Page]], leaked: set[str], seed: int) -> dict[str, list[Asker]]:
    """Recall asks about terms that stand on a kept training page; generalisation about held-out terms that no such page names,
    first about those whose parent heads a kept page."""
    askers: dict[str, list[Asker]] = {RECALL: [], GENERALISATION: []}
    for book in books:
        pages = [page for owner, page in kept if owner is book]
        heads, terms = {page.head for page in pages}, book.ontology.terms
        known = {term_id for page in pages for term_id in page.defined}
        unseen = {term_id for page in book.held_out_pages for term_id in page.defined} - leaked
        near = {term_id for term_id in unseen if heads.intersection(terms[term_id].parents)}
        askers[RECALL].append(Asker(book.ontology, known, set(), seed))
        askers[GENERALISATION].append(Asker(book.ontology, unseen, near, seed))
    return askers


def _account(book: _Book, kept: list[Page]) -> dict[str, Any]:
    """Where each of an ontology's terms went."""
    ontology = book.ontology

    def count(pages: list[Page]) -> dict[str, int]:
        return {
            "pages": len(pages),
            "defined": sum(len(page.defined) for page in pages),
            "named_only": sum(len(page.named) for page in pages),
        }

    account = {"training": count(kept), "held_out": count(book.held_out_pages)}
    everything = count(book.pages)
    left_out = dict(book.left_out)
    left_out["on a page beyond corpus.limit"] = sum(everything[what] - account["training"][what] for what in ("defined", "named_only"))
    read = len(ontology.terms) + sum(ontology.left_out.values())
    assert read == sum(left_out.values()) + sum(side[what] for side in account.values() for what in ("defined", "named_only"))
    return {"terms": read, **account, "left_out": left_out, "definitions_left_out": dict(ontology.definitions_left_out)}


def _held_out_names(books: list[_Book]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Held-out term -> its name, and -> its synonyms, but for short single ones ("LN"), which mean anything as words of a text."""
    terms = [book.ontology.terms[term_id] for book in books for term_id in sorted(book.held_out)]
    names = {term.term_id: [term.name] for term in terms}
    synonyms = {term.term_id: [synonym for synonym in term.synonyms if " " in synonym or len(synonym) > 5] for term in terms}
    return names, synonyms


def _mentions(names: Mapping[str, list[str]], texts: list[str]) -> Counter[str]:
    """Term -> how many of `texts` hold one of its names word for word, as they may inside the definition of another term."""
    by_first_word: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
    for term_id, spellings in names.items():
        for words in filter(None, map(_words, spellings)):
            by_first_word[words[0]].append((words, term_id))
    mentions: Counter[str] = Counter()
    for text in texts:
        words = _words(text)
        starts = [(place, known) for place, word in enumerate(words) if (known := by_first_word.get(word))]
        mentions.update({term_id for place, known in starts for name, term_id in known if words[place : place + len(name)] == name})
    return mentions


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


# Output --------------------------------------------------------------------------------------------------------------


class _Parts:
    """Writes documents as `part-00000.parquet` and so on, in bounded memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.documents, self.characters = folder, 0, 0, 0
        self._rows: list[dict[str, str]] = []
        self._waiting = 0

    def add(self, document: Document) -> None:
        self._rows.append(document.row())
        self._waiting += len(document.text)
        self.documents += 1
        self.characters += len(document.text)
        if len(self._rows) >= PART_DOCUMENTS or self._waiting >= PART_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        write_parquet(self.folder / f"part-{self.parts:05d}.parquet", self._rows, SCHEMA)
        self.parts, self._rows, self._waiting = self.parts + 1, [], 0

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and (self._rows or not self.parts):  # a side without documents is an empty table
            self._flush()


def _sizes(training: _Parts, held_out: _Parts) -> dict[str, int]:
    return {
        "documents": training.documents,
        "characters": training.characters,
        "held_out_documents": held_out.documents,
        "held_out_characters": held_out.characters,
    }


def _write_questions(output: Path, questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Write questions.jsonl if there are any; task -> split -> how many."""
    questions = list(questions)
    if questions:
        with atomic(output / QUESTIONS) as temporary:
            temporary.write_text("".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions), encoding="utf-8")
    return count_questions(questions)
