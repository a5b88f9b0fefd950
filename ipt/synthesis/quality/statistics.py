"""Statistics of the pairs of a synthesis stage, measures of single pairs, and example rows.

One pass over the rows in bounded memory.
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

GROUNDED = 0.8  # fraction of an answer's words that must occur in the document
FRAMES = 10  # the most frequent question frames, which count as stock questions
# Diversity is measured on samples of fixed size, because it depends on the size.
SAMPLED_PAIRS, COMPARED_QUESTIONS = 1000, 100
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
# Words that stay in a question's frame even if they occur in the document.
FRAME_WORDS = frozenset(
    words_of(
        "a an and are as at be been by can could did do does for from had has have how if in into "
        "is it its kind main many may much of on or should that the their there these they this "
        "those to type was were what when where which who whom whose why will with would you"
    )
)


def statistics(
    pairs_folder: Path, *, max_new_tokens: int | None = None, parameters: int | None = None
) -> dict[str, Any]:
    """Statistics of `pairs_folder/part-*.parquet`. Rates are fractions from 0 to 1, or None if
    their denominator is 0.

    - documents = documents_with_pairs + documents_without_pairs + the sum of `dropped` (by reason).
      A document in pieces has pairs if one of its pieces has. `long_documents`: documents that were
      split (and the number of pieces) or truncated.
    - rows: generations, one per document or piece. `joined`: rows that continue the text of the
      previous row.
    - well_formed_rate: rows whose generation was not cut, is not empty, and of which nothing but
      repeated questions was rejected. `rejected`: pieces by reason. `filtered`: pairs removed by
      filters, by reason. `refused`: prompts rejected by the engine or server, by its message; their
      rows have finish_reason error.
    - rewrites: rows with a text instead of pairs; rewrite_words: their mean length.
    - distinct_question_rate: distinct questions (ignoring case) among all questions. Exact up to a
      million distinct questions, then an estimate (DistinctCount).
    - repeated_question_rate: generated questions that the parser rejected because an earlier
      question of their document was the same.
    - what_is_share: questions that begin with "What is" or "What are".
    - stock_question_share: questions with one of the ten most frequent frames. A frame is the
      question in lower case, with "_" for each run of words that also occur in its document,
      except function words; `frames` lists the ten with their counts. Exact up to 200,000 distinct
      frames, then lower bounds (FrequentCount).
    - grounded_rate: answers with at least four fifths of their words in the document, in any order;
      verbatim_rate: answers that occur in the document word for word.
    - kinds: pairs by kind of task (`ipt.synthesis.quality.task_types`).
    - diversity, of a fixed sample: self_bleu (fraction of a question's 1- to 4-grams in the other
      questions, 0 to 1) of `questions_compared`, distinct_4grams of `pairs_sampled`. Comparable
      only between samples of the same size.
    - question_words, answer_words: mean lengths; `histograms` has the distributions of lengths and
      of pairs per row, in bins [edge, next edge).
    - Token counts are sums; cached_tokens is the part of prompt_tokens that was in the engine's
      prefix cache. tokens_not_generated: an upper bound of what stop_at_repetition saved, with
      `max_new_tokens` as the length of each generation that it stopped.
    - generator_flops: 2 x `parameters` x (prompt tokens that were not cached + generated tokens),
      without attention. None if `parameters` is None.
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
    counts = tally.counts
    repeated = accounts["rejected"].get("repeated_question", 0)
    questions = counts["pairs"] + sum(accounts["filtered"].values()) + repeated
    computed = counts["prompt_tokens"] - accounts["cached_tokens"] + counts["generated_tokens"]
    return {
        **accounts,
        **tally.result(),
        "well_formed_rate": share(accounts["well_formed"], counts["rows"]),
        "repeated_question_rate": share(repeated, questions),
        "generator_flops": None if parameters is None else 2 * parameters * computed,
    }


def examples(pairs_folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` random documents (or pieces) with pairs or a rewrite, or all if there are fewer, in the
    order of the corpus.

    Each is {"doc_id", "text", "pairs": [{"question", "answer"}], "rewrite"}. One pass in bounded
    memory; the selection depends only on `seed`.
    """
    sample: ReservoirSample[tuple[int, dict[str, Any]]] = ReservoirSample(n, seed)
    for number, row in enumerate(read_parts(pairs_folder, ["doc_id", "text", "pairs", "rewrite"])):
        if row["pairs"] or row["rewrite"]:
            sample.add((number, row))
    return [row for _, row in sorted(sample.items, key=lambda item: item[0])]


# Measures of one pair
# ----------------------------------------------------------------------------------------------


class DocumentWords(NamedTuple):
    """The words of a document: their number, their set, and all of them in one line, with a space
    before and after each.
    """

    length: int
    known: frozenset[str]
    line: str


class PairWords(NamedTuple):
    """The words of a pair, and how they occur in the document."""

    question: list[str]
    answer: list[str]
    grounded: float  # fraction of the answer's words that occur in the document
    verbatim: bool  # the document contains the answer word for word


def read_document(text: str) -> DocumentWords:
    words = words_of(text)
    return DocumentWords(len(words), frozenset(words), f" {' '.join(words)} ")


def read_pair(question: str, answer: str, document: DocumentWords) -> PairWords:
    words = words_of(answer)
    grounded = sum(word in document.known for word in words) / max(1, len(words))
    verbatim = grounded == 1 and f" {' '.join(words)} " in document.line
    return PairWords(words_of(question), words, grounded, verbatim)


def frame(question_words: list[str], document_words: frozenset[str]) -> str:
    """A question with "_" for each run of words that it takes from its document."""
    kept: list[str] = []
    for word in question_words:
        if word not in document_words or word in FRAME_WORDS:
            kept.append(word)
        elif kept[-1:] != ["_"]:
            kept.append("_")
    return " ".join(kept)


# Measures of a pair for `filters.thresholds`, from its words and its row.
PAIR_MEASURES: dict[str, Callable[[PairWords, Mapping[str, Any]], float]] = {
    "question_words": lambda words, row: len(words.question),
    "answer_words": lambda words, row: len(words.answer),
    "grounded": lambda words, row: words.grounded,
    "verbatim": lambda words, row: words.verbatim,
    "finished": lambda words, row: row["finish_reason"] != "length",
}


# Statistics of many pairs
# ----------------------------------------------------------------------------------------------


class Tally:
    """Running counts over rows."""

    def __init__(self, max_new_tokens: int | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._max_new_tokens = max_new_tokens
        self._finish_reasons: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._histograms = {name: Histogram(edges) for name, edges in EDGES.items()}
        self._questions = DistinctCount()
        self._frames = FrequentCount()
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
        frames = dict(self._frames.most_common(FRAMES))
        not_generated = counts["tokens_not_generated"]
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
            "stock_question_share": share(sum(frames.values()), pairs),
            "frames": frames,
            "kinds": dict(self._kinds.most_common()),
            "diversity": diversity(self._sample.items),
            "question_words": share(counts["question_words"], pairs),
            "answer_words": share(counts["answer_words"], pairs),
            "histograms": {name: bins.result() for name, bins in self._histograms.items()},
            "prompt_tokens": counts["prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "tokens_not_generated": None if self._max_new_tokens is None else not_generated,
            "finish_reasons": dict(self._finish_reasons),
        }


def diversity(pairs: list[tuple[list[str], list[str]]]) -> dict[str, Any]:
    """Self-BLEU of the first questions, and the fraction of distinct 4-grams in all questions and
    answers, which are given as words.
    """
    questions = [" ".join(question) for question, _ in pairs[:COMPARED_QUESTIONS]]
    ngrams: list[tuple[str, ...]] = []
    for pair in pairs:
        for words in pair:
            ngrams += zip(*(words[start:] for start in range(NGRAM)), strict=False)
    return {
        "pairs_sampled": len(pairs),
        "questions_compared": len(questions),
        "self_bleu": self_bleu(questions),
        "distinct_4grams": share(len(set(ngrams)), len(ngrams)),
    }


def self_bleu(texts: list[str]) -> float | None:
    """Mean BLEU-4 of each text against all others, 0 to 1: 1 if all are the same (Zhu et al. 2018).
    None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    total = 0.0
    for place, text in enumerate(texts):
        total += bleu.sentence_score(text, texts[:place] + texts[place + 1 :]).score
    return round(total / len(texts) / 100, 4)


def add_accounts(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of the counts in the shards' metadata."""
    total: Counter[str] = Counter()
    by_reason: dict[str, Counter[str]] = {
        name: Counter() for name in ("dropped", "long_documents", "rejected", "filtered", "refused")
    }
    for account in accounts:
        for name in ("documents", "documents_with_pairs", "well_formed", "cached_tokens"):
            total[name] += account[name]
        for name, counts in by_reason.items():
            counts.update(account.get(name, {}))
    dropped, refused = by_reason["dropped"], by_reason.pop("refused")
    without_pairs = total["documents"] - total["documents_with_pairs"] - dropped.total()
    return {
        "documents": total["documents"],
        "documents_with_pairs": total["documents_with_pairs"],
        "documents_without_pairs": without_pairs,
        **{name: dict(counts) for name, counts in by_reason.items()},
        "well_formed": total["well_formed"],
        "cached_tokens": total["cached_tokens"],
        "refused": most_frequent(refused),
    }
