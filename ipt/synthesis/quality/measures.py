"""Measures of one pair and of one document: pure functions, for statistics and for filters alike."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ipt.corpus.words import words_of

GROUNDED = 0.8  # an answer is close to its document when so large a share of its words occurs there
# Words that stay in a question's frame even where the document has them too.
FRAME_WORDS = frozenset(
    words_of(
        "a an and are as at be been by can could did do does for from had has have how if in into "
        "is it its kind main many may much of "
        "on or should that the their there these they this those to type was were what when where "
        "which who whom whose why will with "
        "would you"
    )
)


class DocumentWords(NamedTuple):
    """The words of a document: how many, which ones, and all of them in a line with a space on
    either side of each.
    """

    length: int
    known: frozenset[str]
    line: str


class PairWords(NamedTuple):
    """The words of a pair, and how they lie in the document."""

    question: list[str]
    answer: list[str]
    grounded: float  # share of the answer's words that occur in the document
    verbatim: bool  # the answer's words stand in the document just so, in a row


def read_document(text: str) -> DocumentWords:
    words = words_of(text)
    return DocumentWords(len(words), frozenset(words), f" {' '.join(words)} ")


def read_pair(question: str, answer: str, document: DocumentWords) -> PairWords:
    answer_words = words_of(answer)
    if not answer_words:
        return PairWords(words_of(question), [], 0.0, verbatim=False)
    known, line = document.known, document.line
    grounded = sum(word in known for word in answer_words) / len(answer_words)
    return PairWords(
        words_of(question),
        answer_words,
        grounded,
        grounded == 1 and f" {' '.join(answer_words)} " in line,
    )


def frame(question_words: list[str], document_words: frozenset[str]) -> str:
    """What is left of a question when each run of words that it took from its document is replaced
    by "_".
    """
    kept: list[str] = []
    for word in question_words:
        if word not in document_words or word in FRAME_WORDS:
            kept.append(word)
        elif kept[-1:] != ["_"]:
            kept.append("_")
    return " ".join(kept)


# Measures of a pair that can have limits: figures of the pair's words and of its row of the
# synthesis stage.
PAIR_MEASURES: dict[str, Callable[[PairWords, Mapping[str, Any]], float]] = {
    "question_words": lambda words, row: len(words.question),
    "answer_words": lambda words, row: len(words.answer),
    "grounded": lambda words, row: words.grounded,
    "verbatim": lambda words, row: words.verbatim,
    "finished": lambda words, row: row["finish_reason"] != "length",
}
