"""The corpus stage: reads a source of documents and writes `documents/`, `held_out/` and, if there
are any, questions.
"""

import logging
import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ipt.config import CorpusConfig, check_choices
from ipt.console import progress
from ipt.corpus.decontaminate import OVERLAPS, Decontamination, Overlap
from ipt.corpus.documents import RowText, read_documents
from ipt.corpus.filters.build import build_filters, reason_to_drop
from ipt.corpus.ontology.build import build_ontology
from ipt.corpus.ontology.terms import check_ontologies
from ipt.corpus.questions import Question, read_questions
from ipt.corpus.readers.files import QUESTIONS, CorpusFile
from ipt.corpus.readers.find import describe_unread, find_files
from ipt.corpus.split import Split
from ipt.corpus.writer import DocumentWriter, sizes, write_questions
from ipt.errors import UserError

log = logging.getLogger(__name__)


def build_corpus(
    config: CorpusConfig,
    seed: int,
    output: Path,
    overlap: Overlap | None = None,
    remove: bool = False,
    row_text: RowText | None = None,
) -> dict[str, Any]:
    """Write `documents/part-*.parquet`, `held_out/part-*.parquet` and perhaps `questions.jsonl` to
    `output`. Returns statistics, which account for each document or term that was read.

    - Kinds `files` and `hub`: the filters apply before the split, so that no held-out document has
      a duplicate in training. `Split` chooses the held-out documents. Reading stops after
      `max_documents` training documents. A questions.jsonl next to the files is checked and copied.
    - Kind `ontology`: a seeded hash chooses held-out terms before pages are made. `max_documents`
      keeps the first pages of a seeded shuffle.

    Training documents that share an n-gram with an item of `overlap` are counted and, with
    `remove`, dropped. Raises what `check_corpus` and `read_documents` raise.
    """
    _check_values(config)
    for folder in ("documents", "held_out"):
        shutil.rmtree(output / folder, ignore_errors=True)  # parts of an interrupted run
    (output / QUESTIONS).unlink(missing_ok=True)
    decontamination = Decontamination(overlap, remove)
    if config.kind == "ontology":
        return build_ontology(config, seed, output, decontamination)
    return _build_documents(config, seed, output, decontamination, row_text)


def check_corpus(
    config: CorpusConfig, row_text: RowText | None = None, section: str = "corpus"
) -> None:
    """Raises UserError for a corpus that cannot be read, before any expensive work.

    Checks the settings and, for files, the first document and questions.jsonl. Does not contact a
    hub. `section` is the name of the config's section, for messages.
    """
    _check_values(config)
    if config.kind == "ontology":
        check_ontologies(config.ontologies)
    elif config.kind == "hub":
        if not config.dataset:
            raise UserError(f"{section}.dataset is not set: set {section}.dataset=owner/name")
        if find_spec("datasets") is None:
            raise UserError("corpus=hub needs the package datasets: run `make install`")
    else:
        next(read_documents(config, row_text=row_text, section=section))
        for _ in _user_questions(config):
            pass


def input_digests(config: CorpusConfig) -> dict[str, str]:
    """Name -> digest of each user file that the stage reads. Names do not depend on the folder.

    Empty for ontologies and hub datasets. See `CorpusFile.digest` for remote files.
    """
    if config.kind != "files" or not config.path:
        return {}
    files = find_files(config.path)
    questions = _questions_file(config)
    if questions:
        files.append(questions)
    return {file.name: file.digest() for file in files}


def _check_values(config: CorpusConfig) -> None:
    check_choices(config, "corpus.")
    if not 0 <= config.held_out_fraction < 1:
        raise UserError(
            f"corpus.held_out_fraction={config.held_out_fraction}: expected at least 0 and less "
            "than 1"
        )
    if config.max_documents is not None and config.max_documents < 1:
        raise UserError(
            f"corpus.max_documents={config.max_documents}: expected null or a whole number of at "
            "least 1"
        )
    if config.questions < 0:
        raise UserError(f"corpus.questions={config.questions}: expected 0 or more")
    build_filters(config)


def _build_documents(
    config: CorpusConfig,
    seed: int,
    output: Path,
    decontamination: Decontamination,
    row_text: RowText | None,
) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    filters = build_filters(config)
    split = Split(config, seed)
    unread = _unread_files(config)
    with (
        DocumentWriter(output / "documents") as training,
        DocumentWriter(output / "held_out") as held_out,
        progress("corpus", config.max_documents) as bar,
    ):
        for document in read_documents(config, dropped, row_text):
            reason = reason_to_drop(document.text, filters)
            if reason:
                dropped[reason] += 1
            elif split.hold_out(document):
                held_out.add(document)
            elif decontamination.drops(document.text):
                dropped[OVERLAPS] += 1
            else:
                training.add(document)
                bar.advance()
                if training.documents == config.max_documents:
                    break
        if not training.documents:
            raise UserError(_nothing_left(config, held_out.documents, dropped))
    split.check()
    return {
        "kind": config.kind,
        "read": training.documents + held_out.documents + sum(dropped.values()),
        **sizes(training, held_out),
        "dropped": dict(dropped),
        "stopped_at_limit": training.documents == config.max_documents,
        "questions": write_questions(output, _user_questions(config)),
        "unread_files": dict(unread),
        **split.report(),
        **decontamination.report(),
    }


def _unread_files(config: CorpusConfig) -> Counter[str]:
    """Counts the files of `corpus.path` that are not read, by ending or reason, and logs them."""
    unread: Counter[str] = Counter()
    if config.kind == "files" and config.path:
        files = find_files(config.path, unread)
        if unread:
            log.info(
                "corpus: %d files read, %d left unread: %s",
                len(files),
                unread.total(),
                describe_unread(unread),
                extra={"style": "dim"},
            )
    return unread


def _nothing_left(config: CorpusConfig, held_out: int, dropped: Counter[str]) -> str:
    if not dropped:
        return (
            f"corpus.held_out_fraction={config.held_out_fraction} holds out all {held_out} "
            "documents: make it smaller"
        )
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    return (
        f"no document of the corpus is left to train on ({reasons}; held out: {held_out}): relax "
        "the filters"
    )


def _user_questions(config: CorpusConfig) -> Iterator[Question]:
    file = _questions_file(config)
    if file is not None:
        with file.open() as lines:
            yield from read_questions(lines, file.path)


def _questions_file(config: CorpusConfig) -> CorpusFile | None:
    """A questions.jsonl in the folder `corpus.path`, or next to the first of the user's files."""
    if config.kind != "files" or not config.path:
        return None
    first = find_files(config.path)[0]
    for folder in (first.path.removesuffix(first.name), posixpath.dirname(first.path)):
        file = CorpusFile(posixpath.join(folder, QUESTIONS), QUESTIONS, first.system)
        if file.exists():
            return file
    return None
