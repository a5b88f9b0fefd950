"""What the pairs are like: counts and rates over the finished parts of a synthesis stage, and
examples to look at.

One pass over the rows in bounded memory; what is exact only up to a size says so.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from ipt.console import progress
from ipt.corpus.words import words_of
from ipt.files import read_parts
from ipt.synthesis.quality.streaming import (
    DistinctCount,
    FrequentCount,
    Histogram,
    ReservoirSample,
    share,
)
from ipt.synthesis.quality.task_types import kind_of
from ipt.synthesis.shards import most_frequent, read_account

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

FRAMES = 10  # how many of the most frequent question frames count as stock questions
SAMPLED_PAIRS, COMPARED_QUESTIONS = (
    1000,
    100,
)  # for diversity, which depends on how many are compared
NGRAM = 4
EDGES = {
    "pairs_per_row": range(13),
    "question_words": (0, 5, 10, 15, 20, 30, 40, 60, 100, 200),
    "answer_words": (0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
    "document_words": (0, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400),
}
COLUMNS = [
    "text",
    "pairs",
    "inherits_previous",
    "finish_reason",
    "prompt_tokens",
    "output_tokens",
    "rewrite",
]


def statistics(
    pairs_folder: Path, *, max_new_tokens: int | None = None, parameters: int | None = None
) -> dict[str, Any]:
    """Statistics of `pairs_folder/part-*.parquet`. Rates are shares from 0 to 1; None where there
    is nothing to divide by.

    - documents = documents_with_pairs + documents_without_pairs + those in `dropped` (by reason). A
      document in pieces has pairs if one of its pieces has. `long_documents`: documents that were
      split (into so many pieces) or truncated.
    - rows: generations asked for, one per document or piece. `joined`: rows that continue the text
      of the row before them.
    - well_formed_rate: of all rows, those whose generation was not cut, gave something, and of
      which the parser rejected nothing but repeated questions. `rejected`: pieces by reason.
      `filtered`: pairs that filters took away, by reason. `refused`: prompts that the engine or
      server refused, by its words; their rows have finish_reason error.
    - rewrites: rows with a text that the model wrote in place of pairs; rewrite_words: their mean
      length.
    - distinct_question_rate: different questions of all documents' pairs, upper and lower case
      alike, by all of them; exact up to a million different ones, an estimate beyond
      (DistinctCount).
    - repeated_question_rate: of all questions written, those that the parser rejected because their
      document had them before.
    - what_is_share: questions that begin with "What is" or "What are".
    - stock_question_share: questions with one of the ten most frequent frames. A frame is the
      question in lower case with each run of words that also occur in its document, function words
      aside, replaced by "_"; `frames` lists the ten with their counts. Exact up to 200,000
      different frames, lower bounds beyond (FrequentCount).
    - grounded_rate: answers of which at least four fifths of the words occur in their document, in
      any order; verbatim_rate: answers that stand there word for word.
    - kinds: pairs by kind of task, told by the rules of ipt.synthesis.quality.task_types.
    - diversity, of a sample that is the same in each run: self_bleu (how much of a question's 1- to
      4-grams stands in the other questions, 0 to 1) of `questions_compared`, distinct_4grams of
      `pairs_sampled`. Comparable between samples of one size only.
    - question_words, answer_words: mean lengths; `histograms` has the lengths, and pairs per row,
      by bins [edge, next edge).
    - Token counts are sums; cached_tokens is the part of prompt_tokens that the engine had in its
      prefix cache. tokens_not_generated: what stopping at a repetition saved at most, each such
      generation taken to go on to `max_new_tokens`.
    - generator_flops: 2 x `parameters` x (prompt tokens that were not cached + generated tokens): a
      multiplication and an addition for each parameter and token, attention left out. None where
      `parameters` is None.
    """
    tally = Tally(max_new_tokens)
    parts = sorted(pairs_folder.glob("part-*.parquet"))
    with progress("quality", sum(pq.read_metadata(part).num_rows for part in parts)) as bar:
        for number, row in enumerate(read_parts(pairs_folder, COLUMNS), start=1):
            tally.add(row)
            if number % 1000 == 0:
                bar.advance(1000)
        bar.advance(tally.counts["rows"] % 1000)
    accounts = add_accounts([read_account(part) for part in parts])
    return {**accounts, **tally.result(), **_rates(accounts, tally.counts, parameters)}


def examples(pairs_folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` random documents (or pieces) that have pairs or a rewrite, or all if there are fewer, in
    the order of the corpus.

    Each is {"doc_id", "text", "pairs": [{"question", "answer"}], "rewrite"}. One pass, in bounded
    memory; the choice depends on `seed` only.
    """
    sample: ReservoirSample[tuple[int, dict[str, Any]]] = ReservoirSample(n, seed)
    for number, row in enumerate(read_parts(pairs_folder, ["doc_id", "text", "pairs", "rewrite"])):
        if row["pairs"] or row["rewrite"]:
            sample.add((number, row))
    return [row for _, row in sorted(sample.items, key=lambda item: item[0])]


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


class Tally:
    """Running counts over rows."""

    def __init__(self, max_new_tokens: int | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._max_new_tokens = max_new_tokens
        self._finish_reasons: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._histograms = {name: Histogram(edges) for name, edges in EDGES.items()}
        self._questions, self._frames = DistinctCount(), FrequentCount()
        self._sample: ReservoirSample[tuple[list[str], list[str]]] = ReservoirSample(SAMPLED_PAIRS)

    def add(self, row: dict[str, Any]) -> None:
        counts, pairs = self.counts, row["pairs"]
        counts["rows"] += 1
        counts["joined"] += row["inherits_previous"]
        counts["pairs"] += len(pairs)
        counts["prompt_tokens"] += row["prompt_tokens"]
        counts["generated_tokens"] += row["output_tokens"]
        if row["finish_reason"] == "repetition" and self._max_new_tokens is not None:
            counts["tokens_not_generated"] += self._max_new_tokens - row["output_tokens"]
        if row["rewrite"]:
            counts["rewrites"] += 1
            counts["rewrite_words"] += len(words_of(row["rewrite"]))
        self._finish_reasons[row["finish_reason"]] += 1
        document = read_document(row["text"])
        self._histograms["document_words"].add(document.length)
        self._histograms["pairs_per_row"].add(len(pairs))
        for pair in pairs:
            self._add_pair(pair["question"], pair["answer"], document)

    def _add_pair(self, question: str, answer: str, document: DocumentWords) -> None:
        counts, words = self.counts, read_pair(question, answer, document)
        counts["what_is"] += words.question[:2] in (["what", "is"], ["what", "are"])
        counts["grounded"] += words.grounded >= GROUNDED
        counts["verbatim"] += words.verbatim
        counts["question_words"] += len(words.question)
        counts["answer_words"] += len(words.answer)
        self._histograms["question_words"].add(len(words.question))
        self._histograms["answer_words"].add(len(words.answer))
        self._kinds[kind_of(question, answer, words.question, words.answer)] += 1
        self._questions.add(question.lower())
        self._frames.add(frame(words.question, document.known))
        self._sample.add((words.question, words.answer))

    def result(self) -> dict[str, Any]:
        counts, pairs = self.counts, self.counts["pairs"]
        frames = self._frames.most_common(FRAMES)
        return {
            "rows": counts["rows"],
            "joined": counts["joined"],
            "pairs": pairs,
            "pairs_per_row": share(pairs, counts["rows"]),
            "rewrites": counts["rewrites"],
            "rewrite_words": share(counts["rewrite_words"], counts["rewrites"]),
            "distinct_question_rate": share(min(self._questions.result(), pairs), pairs),
            "grounded_rate": share(counts["grounded"], pairs),
            "verbatim_rate": share(counts["verbatim"], pairs),
            "what_is_share": share(counts["what_is"], pairs),
            "stock_question_share": share(sum(count for _, count in frames), pairs),
            "frames": dict(frames),
            "kinds": dict(self._kinds.most_common()),
            "diversity": diversity(self._sample.items),
            "question_words": share(counts["question_words"], pairs),
            "answer_words": share(counts["answer_words"], pairs),
            "histograms": {
                name: histogram.result() for name, histogram in self._histograms.items()
            },
            "prompt_tokens": counts["prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "tokens_not_generated": None
            if self._max_new_tokens is None
            else counts["tokens_not_generated"],
            "finish_reasons": dict(self._finish_reasons),
        }


def diversity(pairs: list[tuple[list[str], list[str]]]) -> dict[str, Any]:
    """Self-BLEU of the first questions, and the share of distinct 4-grams in all questions and
    answers; words of (question, answer).
    """
    questions = [" ".join(question) for question, _ in pairs[:COMPARED_QUESTIONS]]
    texts = [text for pair in pairs for text in pair]
    ngrams = [
        tuple(text[start : start + NGRAM])
        for text in texts
        for start in range(len(text) - NGRAM + 1)
    ]
    return {
        "pairs_sampled": len(pairs),
        "questions_compared": len(questions),
        "self_bleu": self_bleu(questions),
        "distinct_4grams": share(len(set(ngrams)), len(ngrams)),
    }


def self_bleu(texts: list[str]) -> float | None:
    """Mean BLEU-4 of each text against all the others, 0 to 1: 1 if all say the same (Zhu et al.
    2018). None for fewer than two.
    """
    if len(texts) < 2:
        return None
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    scores = [
        bleu.sentence_score(text, texts[:place] + texts[place + 1 :]).score
        for place, text in enumerate(texts)
    ]
    return round(sum(scores) / len(scores) / 100, 4)


def add_accounts(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The shards' own records, added up."""
    dropped, long_documents, rejected, filtered, refused = (
        sum((Counter(account.get(name, {})) for account in accounts), Counter())
        for name in ("dropped", "long_documents", "rejected", "filtered", "refused")
    )
    documents, with_pairs, well_formed, cached_tokens = (
        sum(account[name] for account in accounts)
        for name in ("documents", "documents_with_pairs", "well_formed", "cached_tokens")
    )
    return {
        "documents": documents,
        "documents_with_pairs": with_pairs,
        "documents_without_pairs": documents - with_pairs - dropped.total(),
        "dropped": dict(dropped),
        "long_documents": dict(long_documents),
        "well_formed": well_formed,
        "cached_tokens": cached_tokens,
        "rejected": dict(rejected),
        "filtered": dict(filtered),
        "refused": most_frequent(refused),
    }


def _rates(
    accounts: dict[str, Any], counts: Counter[str], parameters: int | None
) -> dict[str, Any]:
    """Figures of rows and accounts together."""
    repeated, filtered = (
        accounts["rejected"].get("repeated_question", 0),
        sum(accounts["filtered"].values()),
    )
    computed = counts["prompt_tokens"] - accounts["cached_tokens"] + counts["generated_tokens"]
    return {
        "well_formed_rate": share(accounts["well_formed"], counts["rows"]),
        "repeated_question_rate": share(repeated, counts["pairs"] + filtered + repeated),
        "generator_flops": None if parameters is None else 2 * parameters * computed,
    }


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
