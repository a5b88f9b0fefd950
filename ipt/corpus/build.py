"""The corpus stage: from where documents come from to `documents/`, `held_out/` and, where there
are any, questions.
"""

import json
import posixpath
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.config import CorpusConfig, check_choices
from ipt.console import console, progress
from ipt.corpus.decontaminate import Overlap, OverlapCount
from ipt.corpus.documents import SCHEMA, Document, RowText, read_documents
from ipt.corpus.filters.build import build_filters
from ipt.corpus.hashing import unit_hash
from ipt.corpus.ontology.pages import Page, make_pages
from ipt.corpus.ontology.questions import (
    GENERALISATION,
    RECALL,
    Asker,
    Question,
    ask,
    count_questions,
    read_questions,
)
from ipt.corpus.ontology.terms import Ontology, check_ontologies, held_out_terms, load_ontology
from ipt.corpus.readers.files import QUESTIONS, CorpusFile
from ipt.corpus.readers.find import describe_unread, find_files
from ipt.errors import UserError
from ipt.files import atomic

OVERLAPS = "overlaps with an evaluation task"
PART_DOCUMENTS, PART_CHARACTERS = 50_000, 32_000_000  # one output file holds at most about so much
GROUP_DOCUMENTS, GROUP_CHARACTERS = 1_000, 4_000_000  # and so much of it is written at a time


def build_corpus(
    config: CorpusConfig,
    seed: int,
    output: Path,
    overlap: Overlap | None = None,
    remove: bool = False,
    row_text: RowText | None = None,
) -> dict[str, Any]:
    """Write `documents/part-*.parquet`, `held_out/part-*.parquet` and perhaps `questions.jsonl` to
    `output`; return statistics.

    files and hub: what `build_filters` names is left out, of training and held-out documents alike,
    so that no held-out one has a duplicate in training. A seeded hash of its id, or of what it has
    in the field `held_out_by`, holds a document out; `limit` stops reading at so many training
    documents; a questions.jsonl beside the user's files is checked and taken over. What was read is
    what was written and what was dropped. ontology: a seeded hash holds terms out before pages are
    made; `limit` keeps the first pages of a seeded shuffle of all. Training documents that share an
    n-gram with an item of `overlap` are counted and, with `remove`, dropped. Raises what
    `check_corpus` and `read_documents` raise.
    """
    _check_values(config)
    for folder in ("documents", "held_out"):
        shutil.rmtree(output / folder, ignore_errors=True)  # parts of an interrupted run
    (output / QUESTIONS).unlink(missing_ok=True)
    decontamination = _Decontamination(overlap, remove)
    if config.kind == "ontology":
        return _build_ontology(config, seed, output, decontamination)
    return _build_documents(config, seed, output, decontamination, row_text)


def check_corpus(
    config: CorpusConfig, row_text: RowText | None = None, section: str = "corpus"
) -> None:
    """Raise a one-line error for a corpus that cannot be read, before anything expensive happens.

    Looks at the settings, at the first document of files, and at a questions.jsonl beside them;
    reaches no hub. `section` is where the config has these settings, for messages.
    """
    _check_values(config)
    if config.kind == "ontology":
        check_ontologies(config.ontologies)
    elif config.kind == "hub":
        if not config.dataset:
            raise UserError(
                f"{section}.dataset is not set: name a data set, such as "
                f"{section}.dataset=owner/name"
            )
        if find_spec("datasets") is None:
            raise UserError("corpus=hub needs the package datasets: run `make install`")
    else:
        next(read_documents(config, row_text=row_text, section=section))
        for _ in _user_questions(config):
            pass


def input_digests(config: CorpusConfig) -> dict[str, str]:
    """A digest of every file of the user's that the stage reads, by a name that does not depend on
    where the corpus is kept.

    None of an ontology's pages and a hub's data set. See `CorpusFile.digest` for what it says about
    a remote file.
    """
    if config.kind != "files" or not config.path:
        return {}
    questions = _questions_file(config)
    return {
        file.name: file.digest()
        for file in [*find_files(config.path), *([questions] if questions else [])]
    }


def _check_values(config: CorpusConfig) -> None:
    check_choices(config, "corpus.")
    if not 0 <= config.held_out_fraction < 1:
        raise UserError(
            f"corpus.held_out_fraction={config.held_out_fraction}: expected a share of at least 0 and less than 1"
        )
    if config.max_documents is not None and config.max_documents < 1:
        raise UserError(
            f"corpus.max_documents={config.max_documents}: expected null or a number of documents, 1 or more"
        )
    if config.questions < 0:
        raise UserError(f"corpus.questions={config.questions}: expected 0 or more")
    build_filters(config)


class _Decontamination:
    """Counts the texts that overlap with evaluation tasks, and says which to drop."""

    def __init__(self, overlap: Overlap | None, remove: bool) -> None:
        self._overlap, self._remove, self._count = (
            overlap,
            remove,
            OverlapCount(overlap) if overlap else None,
        )

    def drops(self, text: str) -> bool:
        if self._overlap is None or self._count is None:
            return False
        found = self._overlap.find(text)
        self._count.add(found)
        return bool(found) and self._remove

    def report(self) -> dict[str, Any]:
        if self._overlap is None or self._count is None:
            return {}
        return {
            "overlap": {
                "ngram": self._overlap.ngram,
                "removed": self._remove,
                "tasks": self._count.report(),
            }
        }


# Files and hub
# ----------------------------------------------------------------------------------------------


def _build_documents(
    config: CorpusConfig,
    seed: int,
    output: Path,
    decontamination: _Decontamination,
    row_text: RowText | None,
) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    filters, groups = build_filters(config), _Groups(config, seed)
    unread = _unread_files(config)
    with (
        _Parts(output / "documents") as training,
        _Parts(output / "held_out") as held_out,
        progress("corpus", config.max_documents) as bar,
    ):
        for document in read_documents(config, dropped, row_text):
            reason = next(filter(None, (reason_for(document.text) for reason_for in filters)), None)
            if reason:
                dropped[reason] += 1
                continue
            if groups.hold_out(document):
                held_out.add(document)
                continue
            if decontamination.drops(document.text):
                dropped[OVERLAPS] += 1
                continue
            training.add(document)
            bar.advance()
            if training.documents == config.max_documents:
                break
        if not training.documents:
            raise UserError(_nothing_left(config, held_out.documents, dropped))
    groups.check()
    questions = _write_questions(output, _user_questions(config))
    return {
        "kind": config.kind,
        "read": training.documents + held_out.documents + sum(dropped.values()),
        **_sizes(training, held_out),
        "dropped": dict(dropped),
        "stopped_at_limit": training.documents == config.max_documents,
        "questions": questions,
        "unread_files": dict(unread),
        **groups.report(),
        **decontamination.report(),
    }


def _unread_files(config: CorpusConfig) -> Counter[str]:
    """Files that `corpus.path` leads to and that were not read, by ending or reason; says so in the
    log.
    """
    unread: Counter[str] = Counter()
    if config.kind == "files" and config.path:
        files = find_files(config.path, unread)
        if unread:
            line = (
                f"corpus: {len(files)} files read, {unread.total()} left unread: "
                f"{describe_unread(unread)}"
            )
            console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    return unread


class _Groups:
    """Says which documents are held out: each by itself, or all of one value of a field together."""

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        self._field, self._share, self._seed = config.held_out_by, config.held_out_fraction, seed
        self._held_out, self._training, self._without = set[str](), set[str](), 0

    def hold_out(self, document: Document) -> bool:
        if self._field is None:
            return unit_hash(self._seed, "held out document", document.doc_id) < self._share
        if self._field not in document.meta:
            self._without += 1
            return False
        group = document.meta[self._field]
        held_out = unit_hash(self._seed, "held out group", group) < self._share
        (self._held_out if held_out else self._training).add(group)
        return held_out

    def check(self) -> None:
        if self._field and self._share and not self._held_out | self._training:
            raise UserError(
                f"corpus.held_out_by={self._field}: no document has such a field, so none can be "
                "held out: name another"
            )

    def report(self) -> dict[str, Any]:
        if self._field is None:
            return {}
        groups = {
            "by": self._field,
            "training": len(self._training),
            "held_out": sorted(self._held_out),
        }
        return {"held_out_groups": {**groups, "documents_without": self._without}}


def _nothing_left(config: CorpusConfig, held_out: int, dropped: Counter[str]) -> str:
    if not dropped:
        return f"corpus.held_out_fraction={config.held_out_fraction} holds out all {held_out} documents: make it smaller"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    return (
        f"no document of the corpus is left to train on ({reasons}; held out: {held_out}): relax "
        "what leaves them out"
    )


def _user_questions(config: CorpusConfig) -> Iterator[Question]:
    file = _questions_file(config)
    if file is None:
        return
    with file.open() as lines:
        yield from read_questions(lines, file.path)


def _questions_file(config: CorpusConfig) -> CorpusFile | None:
    """A questions.jsonl in the folder that `corpus.path` names, or beside the first of the user's
    files.
    """
    if config.kind != "files" or not config.path:
        return None
    first = find_files(config.path)[0]
    folders = (first.path.removesuffix(first.name), posixpath.dirname(first.path))
    files = (
        CorpusFile(posixpath.join(folder, QUESTIONS), QUESTIONS, first.system) for folder in folders
    )
    return next((file for file in files if file.exists()), None)


# Ontology
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Book:
    """One ontology as pages."""

    ontology: Ontology
    held_out: set[str]
    pages: list[Page]
    held_out_pages: list[Page]
    left_out: Counter[str]


def _build_ontology(
    config: CorpusConfig, seed: int, output: Path, decontamination: _Decontamination
) -> dict[str, Any]:
    check_ontologies(config.ontologies)
    books = []
    with progress("corpus", len(config.ontologies)) as bar:
        for name in sorted(config.ontologies):
            books.append(_make_book(name, config.held_out_fraction, seed))
            bar.advance(note=name)
    first = _shuffled(((book, page) for book in books for page in book.pages), seed)[
        : config.max_documents
    ]
    kept = [(book, page) for book, page in first if not decontamination.drops(page.text)]
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
        "ontologies": {
            book.ontology.source: _account(
                book, *(_pages_of(book, pages) for pages in (first, kept))
            )
            for book in books
        },
        "held_out_in_training_text": {
            "terms_by_name": len(by_name),
            "mentions_by_name": sum(by_name.values()),
            "terms_by_synonym": len(by_synonym),
            "mentions_by_synonym": sum(by_synonym.values()),
        },
        "dropped": {OVERLAPS: len(first) - len(kept)} if len(kept) < len(first) else {},
        **decontamination.report(),
    }


def _make_book(name: str, share: float, seed: int) -> _Book:
    ontology = load_ontology(name)
    held_out, left_out = held_out_terms(ontology, share, seed), Counter(ontology.left_out)
    return _Book(ontology, held_out, *make_pages(ontology, held_out, left_out), left_out)


def _shuffled(pages: Iterable[tuple[_Book, Page]], seed: int) -> list[tuple[_Book, Page]]:
    return sorted(
        pages, key=lambda owned: (unit_hash(seed, "page", owned[1].page_id), owned[1].page_id)
    )


def _document(ontology: Ontology, page: Page) -> Document:
    return Document(
        page.page_id,
        page.text,
        ontology.source,
        {"title": page.title, "head": page.head, "terms": page.defined},
    )


def _askers(
    books: list[_Book], kept: list[tuple[_Book, Page]], leaked: set[str], seed: int
) -> dict[str, list[Asker]]:
    """Recall asks about terms that stand on a kept training page; generalisation about held-out
    terms that no such page names, first about those whose parent heads a kept page.
    """
    askers: dict[str, list[Asker]] = {RECALL: [], GENERALISATION: []}
    for book in books:
        pages = _pages_of(book, kept)
        heads, terms = {page.head for page in pages}, book.ontology.terms
        known = {term_id for page in pages for term_id in page.defined}
        unseen = {term_id for page in book.held_out_pages for term_id in page.defined} - leaked
        near = {term_id for term_id in unseen if heads.intersection(terms[term_id].parents)}
        askers[RECALL].append(Asker(book.ontology, known, set(), seed))
        askers[GENERALISATION].append(Asker(book.ontology, unseen, near, seed))
    return askers


def _pages_of(book: _Book, pages: list[tuple[_Book, Page]]) -> list[Page]:
    return [page for owner, page in pages if owner is book]


def _account(book: _Book, first: list[Page], kept: list[Page]) -> dict[str, Any]:
    """Where each of an ontology's terms went."""
    ontology = book.ontology

    def count(pages: list[Page]) -> dict[str, int]:
        return {
            "pages": len(pages),
            "defined": sum(len(page.defined) for page in pages),
            "named_only": sum(len(page.named) for page in pages),
        }

    def terms(pages: list[Page]) -> int:
        return sum(len(page.defined) + len(page.named) for page in pages)

    account = {"training": count(kept), "held_out": count(book.held_out_pages)}
    left_out = dict(book.left_out)
    left_out["on a page beyond corpus.max_documents"] = terms(book.pages) - terms(first)
    if len(kept) < len(first):
        left_out[f"on a page that {OVERLAPS}"] = terms(first) - terms(kept)
    read = len(ontology.terms) + sum(ontology.left_out.values())
    assert read == sum(left_out.values()) + terms(kept) + terms(book.held_out_pages)
    return {
        "terms": read,
        **account,
        "left_out": left_out,
        "definitions_left_out": dict(ontology.definitions_left_out),
    }


def _held_out_names(books: list[_Book]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Held-out term -> its name, and -> its synonyms, but for short single ones ("LN"), which mean
    anything as words of a text.
    """
    terms = [book.ontology.terms[term_id] for book in books for term_id in sorted(book.held_out)]
    names = {term.term_id: [term.name] for term in terms}
    synonyms = {
        term.term_id: [synonym for synonym in term.synonyms if " " in synonym or len(synonym) > 5]
        for term in terms
    }
    return names, synonyms


def _mentions(names: Mapping[str, list[str]], texts: list[str]) -> Counter[str]:
    """Term -> how many of `texts` hold one of its names word for word, as they may inside the
    definition of another term.
    """
    by_first_word: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
    for term_id, spellings in names.items():
        for words in filter(None, map(_words, spellings)):
            by_first_word[words[0]].append((words, term_id))
    mentions: Counter[str] = Counter()
    for text in texts:
        words = _words(text)
        starts = [
            (place, known) for place, word in enumerate(words) if (known := by_first_word.get(word))
        ]
        mentions.update(
            {
                term_id
                for place, known in starts
                for name, term_id in known
                if words[place : place + len(name)] == name
            }
        )
    return mentions


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


# Output
# ----------------------------------------------------------------------------------------------


class _Parts:
    """Writes documents as `part-00000.parquet` and so on. Held in memory is no more than one row
    group of a part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.documents, self.characters = folder, 0, 0, 0
        self._rows: list[dict[str, str]] = []
        self._waiting = 0  # characters in `_rows`
        self._part = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._left = (PART_DOCUMENTS, PART_CHARACTERS)  # what the part has room for

    def add(self, document: Document) -> None:
        self._rows.append(document.row())
        self._waiting += len(document.text)
        self.documents += 1
        self.characters += len(document.text)
        documents, characters = self._left
        if len(self._rows) >= min(GROUP_DOCUMENTS, documents) or self._waiting >= min(
            GROUP_CHARACTERS, characters
        ):
            self._write_group()

    def _write_group(self) -> None:
        if self._writer is None:
            temporary = self._part.enter_context(
                atomic(self.folder / f"part-{self.parts:05d}.parquet")
            )
            self._writer = self._part.enter_context(pq.ParquetWriter(temporary, SCHEMA))
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._left = (self._left[0] - len(self._rows), self._left[1] - self._waiting)
        self._rows, self._waiting = [], 0
        if min(self._left) <= 0:
            self._part.close()
            self.parts, self._writer, self._left = (
                self.parts + 1,
                None,
                (PART_DOCUMENTS, PART_CHARACTERS),
            )

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._part:  # ends the part: it becomes a file, or goes if there was an error
            if error is not None:
                raise error
            if self._rows or not self.documents:  # a side without documents is an empty table
                self._write_group()


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
            temporary.write_text(
                "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions),
                encoding="utf-8",
            )
    return count_questions(questions)
