"""What the pairs are like: counts and rates over the finished parts of a synthesis stage, and examples to look at."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ipt.stage import hash_json, read_parts
from ipt.synthesis.format import parse
from ipt.synthesis.shards import read_account

# A word is a run of letters and digits; in scripts that put no spaces between words each character counts as one.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
GROUNDED = 0.8  # share of an answer's words that occur in its document
FRAMES = 10  # how many of the most frequent question frames count as stock questions
# Words that stay in a question's frame even where the document has them too.
FRAME_WORDS = frozenset(
    WORD.findall(
        "a an and are as at be been by can could did do does for from had has have how if in into is it its kind main many may much of "
        "on or should that the their there these they this those to type was were what when where which who whom whose why will with "
        "would you"
    )
)


def statistics(pairs_folder: Path) -> dict[str, Any]:
    """Statistics of `pairs_folder/part-*.parquet`. Rates are shares from 0 to 1; None where there is nothing to divide by.

    - documents = documents_with_pairs + documents_without_pairs + those in `dropped` (by reason). A document in pieces has pairs
      if one of its pieces has. `long_documents`: documents that were split (into so many pieces) or truncated.
    - rows: generations asked for, one per document or piece. `joined`: rows that continue the text of the row before them.
    - well_formed_rate: of all rows, those whose generation was not cut (finish_reason "stop" or "repetition"), gave at
      least one pair, and of which the parser rejected nothing but repeated questions. `rejected`: pieces by reason.
    - distinct_question_rate: different questions of all documents' pairs, upper and lower case alike, by all of them.
    - repeated_question_rate: of all questions written, those that the parser rejected because their document had them before.
    - what_is_share: questions that begin with "What is" or "What are".
    - stock_question_share: questions with one of the ten most frequent frames. A frame is the question in lower case with each run
      of words that also occur in its document, function words aside, replaced by "_"; `frames` lists the ten with their counts.
    - grounded_rate: answers of which at least four fifths of the words, in lower case, occur in their document.
    - question_words, answer_words: mean lengths. Token counts are sums; cached_tokens is the part of prompt_tokens that the engine
      had in its prefix cache.
    """
    tally = Tally()
    for row in read_parts(
        pairs_folder, ["text", "pairs", "inherits_previous", "finish_reason", "prompt_tokens", "output_tokens", "raw_output"]
    ):
        tally.add(row)
    accounts = [read_account(path) for path in sorted(pairs_folder.glob("part-*.parquet"))]
    return {**_accounts(accounts), **tally.result()}


def examples(pairs_folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` random documents (or pieces) that have pairs, or all if there are fewer, in the order of the corpus.

    Each is {"doc_id", "text", "pairs": [{"question", "answer"}]}. One pass, in bounded memory; the choice depends on `seed` only.
    """
    choice = random.Random(seed)
    chosen: list[tuple[int, dict[str, Any]]] = []
    with_pairs = (row for row in read_parts(pairs_folder, ["doc_id", "text", "pairs"]) if row["pairs"])
    for number, row in enumerate(with_pairs):
        if number < n:
            chosen.append((number, row))
        elif (place := choice.randrange(number + 1)) < n:
            chosen[place] = (number, row)
    return [row for _, row in sorted(chosen, key=lambda item: item[0])]


class Tally:
    """Running counts over rows."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()
        self._frames: Counter[str] = Counter()
        self._questions: set[int] = set()

    def add(self, row: dict[str, Any]) -> None:
        rejected = parse(row["raw_output"]).rejected
        self._rejected.update(rejected)
        self._finish_reasons[row["finish_reason"]] += 1
        self._counts.update(
            rows=1,
            joined=row["inherits_previous"],
            pairs=len(row["pairs"]),
            well_formed=row["finish_reason"] in ("stop", "repetition") and bool(row["pairs"]) and set(rejected) <= {"repeated_question"},
            prompt_tokens=row["prompt_tokens"],
            generated_tokens=row["output_tokens"],
        )
        if row["pairs"]:
            document_words = frozenset(words(row["text"]))
            for pair in row["pairs"]:
                self._add_pair(pair["question"], pair["answer"], document_words)

    def _add_pair(self, question: str, answer: str, document_words: frozenset[str]) -> None:
        question_words, answer_words = words(question), words(answer)
        self._counts.update(
            what_is=question_words[:2] in (["what", "is"], ["what", "are"]),
            grounded=is_grounded(answer_words, document_words),
            question_words=len(question_words),
            answer_words=len(answer_words),
        )
        self._questions.add(int(hash_json(question.lower())[:16], 16))  # a number takes less memory than a sentence
        self._frames[frame(question_words, document_words)] += 1

    def result(self) -> dict[str, Any]:
        counts, pairs = self._counts, self._counts["pairs"]
        frames = self._frames.most_common(FRAMES)
        return {
            "rows": counts["rows"],
            "joined": counts["joined"],
            "pairs": pairs,
            "pairs_per_row": _share(pairs, counts["rows"]),
            "well_formed_rate": _share(counts["well_formed"], counts["rows"]),
            "distinct_question_rate": _share(len(self._questions), pairs),
            "repeated_question_rate": _share(self._rejected["repeated_question"], pairs + self._rejected["repeated_question"]),
            "grounded_rate": _share(counts["grounded"], pairs),
            "what_is_share": _share(counts["what_is"], pairs),
            "stock_question_share": _share(sum(count for _, count in frames), pairs),
            "frames": dict(frames),
            "question_words": _share(counts["question_words"], pairs),
            "answer_words": _share(counts["answer_words"], pairs),
            "prompt_tokens": counts["prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "rejected": dict(self._rejected),
            "finish_reasons": dict(self._finish_reasons),
        }


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def is_grounded(answer_words: list[str], document_words: frozenset[str]) -> bool:
    """Whether at least four fifths of an answer's words occur in the document; an answer without words is not grounded."""
    return bool(answer_words) and sum(word in document_words for word in answer_words) >= GROUNDED * len(answer_words)


def frame(question_words: list[str], document_words: frozenset[str]) -> str:
    """What is left of a question when the words it took from its document are replaced by "_"."""
    kept = ["_" if word in document_words and word not in FRAME_WORDS else word for word in question_words]
    return " ".join(word for index, word in enumerate(kept) if word != "_" or kept[index - 1 : index] != ["_"])


def _accounts(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The shards' own records, added up."""
    dropped: Counter[str] = Counter()
    long_documents: Counter[str] = Counter()
    for account in accounts:
        dropped.update(account["dropped"])
        long_documents.update(account["long_documents"])
    documents = sum(account["documents"] for account in accounts)
    with_pairs = sum(account["documents_with_pairs"] for account in accounts)
    return {
        "documents": documents,
        "documents_with_pairs": with_pairs,
        "documents_without_pairs": documents - with_pairs - dropped.total(),
        "dropped": dict(dropped),
        "long_documents": dict(long_documents),
        "cached_tokens": sum(account["cached_tokens"] for account in accounts),
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
