"""Filters: which pairs of a synthesis stage go on to rendering. Documents all stay, with the pairs
that are left to them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ipt.config import FilterConfig, key_settings
from ipt.console import Progress, progress
from ipt.corpus.overlap import Overlap, OverlapCount
from ipt.errors import UserError
from ipt.files import read_parts, write_parquet
from ipt.synthesis.quality.judge import check_judge, judge_pairs
from ipt.synthesis.quality.measures import (
    PAIR_MEASURES,
    DocumentWords,
    PairWords,
    frame,
    read_document,
    read_pair,
)
from ipt.synthesis.quality.statistics import statistics
from ipt.synthesis.quality.streaming import BloomFilter, FrequentCount
from ipt.synthesis.shards import ACCOUNT, read_account

STREAM_MEASURES = ("duplicate_question", "question_template_count")  # they need the pairs before
DOCUMENT_MEASURES = ("document_words", "pairs")
JUDGE_MEASURES = ("judge_accuracy", "judge_relevance")

PairRow = dict[str, Any]
Pairs = list[dict[str, str]]


def filter_pairs(
    config: FilterConfig, pairs: Path, output: Path, seed: int, overlap: Overlap | None
) -> dict[str, Any]:
    """Write `pairs/part-*.parquet` to `output/pairs` without the pairs that `config` rules out, and
    return the statistics.

    Files, rows and columns are those of the synthesis stage; only `pairs` gets shorter, and
    `inherits_previous` is false where this row or the one before has nothing left. What is removed
    is counted by reason, the first that applies, in `filtered`: a limit by its measure, "overlap",
    "judge_failed". The judge sees what the other filters leave. The statistics are those of what is
    left (`ipt.synthesis.quality.statistics.statistics`), with `pairs_before`, the judge's figures
    and, for each evaluation task, the overlap. Memory does not grow with the corpus beyond 4 bytes
    a pair, and those only for the measure duplicate_question. Raises as `check_filters` does.
    """
    check_filters(config)
    if config.overlap and overlap is None:
        raise UserError(
            f"filters.overlap={config.overlap}: there is no evaluation task to compare with: name "
            "some in tasks"
        )
    folder = output / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    before = sum(len(row["pairs"]) for row in read_parts(pairs, ["pairs"]))
    rules = Rules(config, before, overlap)
    _rewrite(pairs, folder, rules.keep, "filters")
    judged: dict[str, Any] = {}
    if config.judge.model is not None:
        judged["judge"] = judge_pairs(config.judge, folder, output, seed)
        if limits := _limits(config, JUDGE_MEASURES):
            _rewrite(
                folder, folder, Verdicts(limits, output / "judgements").keep, "judge's filters"
            )
    if rules.overlaps is not None:
        judged["overlap"] = rules.overlaps.report()
    of_generation = ("tokens_not_generated", "generator_flops")
    figures = {
        name: value for name, value in statistics(folder).items() if name not in of_generation
    }
    return {**figures, "pairs_before": before, **judged}


def check_filters(config: FilterConfig) -> None:
    """Raise a one-line UserError for filters that `filter_pairs` would refuse. Reads nothing."""
    for name, bounds in asdict(config.thresholds).items():
        if bounds is None:
            continue
        if len(bounds) != 2:
            raise UserError(
                f"filters.thresholds.{name}={bounds}: must be [at least, at most], with null for no "
                "limit"
            )
        if None not in bounds and bounds[0] > bounds[1]:
            raise UserError(
                f"filters.thresholds.{name}={bounds}: no value is at least {bounds[0]} and at most "
                f"{bounds[1]}"
            )
    check_judge(config.judge)
    judge_limits = ", ".join(_limits(config, JUDGE_MEASURES))
    if judge_limits and config.judge.model is None:
        raise UserError(
            f"filters.thresholds: {judge_limits} needs a judge: set filters.judge.model"
        )
    if judge_limits and config.judge.sample is not None:
        raise UserError(
            f"filters.thresholds: {judge_limits} needs every pair judged: set filters.judge.sample=null"
        )


def filter_settings(config: FilterConfig) -> dict[str, Any]:
    """The settings that decide what the stage gives."""
    settings = key_settings(config)
    settings["thresholds"] = {
        name: bounds for name, bounds in settings["thresholds"].items() if bounds is not None
    }
    return settings


def is_active(config: FilterConfig) -> bool:
    """Whether the filters have anything to do."""
    return bool(any(asdict(config.thresholds).values()) or config.overlap or config.judge.model)


# What stays
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    low: float | None
    high: float | None

    def allows(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _limits(config: FilterConfig, names: Iterable[str]) -> dict[str, Limit]:
    bounds = {name: getattr(config.thresholds, name) for name in names}
    return {name: Limit(*pair) for name, pair in bounds.items() if pair is not None}


class Rules:
    """The limits on pairs and documents, and the overlap with evaluation tasks; remembers what
    passed.
    """

    def __init__(self, config: FilterConfig, pairs: int, overlap: Overlap | None) -> None:
        self._pair_limits = _limits(config, PAIR_MEASURES)
        self._stream_limits = _limits(config, STREAM_MEASURES)
        self._document_limits = _limits(config, DOCUMENT_MEASURES)
        self._overlap, self._removes_overlap = (
            overlap if config.overlap else None,
            config.overlap == "remove",
        )
        self.overlaps = OverlapCount(self._overlap) if self._overlap is not None else None
        self._asked = BloomFilter(pairs if "duplicate_question" in self._stream_limits else 0)
        self._frames = FrequentCount()

    def keep(self, row: PairRow) -> tuple[Pairs, Counter[str]]:
        """The pairs of a row that stay, and why the others do not."""
        document = read_document(row["text"])
        removed: Counter[str] = Counter()
        if row["pairs"] and not self._allows("document_words", document.length):
            return [], Counter(document_words=len(row["pairs"]))
        kept = []
        for pair in row["pairs"]:
            reason = self._reason(pair, document, row)
            if reason:
                removed[reason] += 1
            else:
                kept.append(pair)
        if kept and not self._allows("pairs", len(kept)):
            removed["pairs"] += len(kept)
            kept = []
        return kept, removed

    def _allows(self, measure: str, value: float) -> bool:
        limit = self._document_limits.get(measure)
        return limit is None or limit.allows(value)

    def _reason(self, pair: dict[str, str], document: DocumentWords, row: PairRow) -> str:
        words = read_pair(pair["question"], pair["answer"], document)
        for name, limit in self._pair_limits.items():
            if not limit.allows(PAIR_MEASURES[name](words, row)):
                return name
        if self._overlap is not None and self.overlaps is not None:
            found = self._overlap.find(f"{pair['question']}\n{pair['answer']}")
            self.overlaps.add(found)
            if found and self._removes_overlap:
                return "overlap"
        return self._stream_reason(pair, words, document)

    def _stream_reason(
        self, pair: dict[str, str], words: PairWords, document: DocumentWords
    ) -> str:
        """These come last: a pair that something else rules out is no reason to leave out another
        one.
        """
        asked, frames = (
            self._stream_limits.get("duplicate_question"),
            self._stream_limits.get("question_template_count"),
        )
        if asked is not None and not asked.allows(self._asked.add(pair["question"].lower())):
            return "duplicate_question"
        if frames is not None and not frames.allows(
            self._frames.add(frame(words.question, document.known))
        ):
            return "question_template_count"
        return ""


class Verdicts:
    """The limits on what the judge says; takes the rows in the order in which their pairs were
    judged.
    """

    def __init__(self, limits: dict[str, Limit], judgements: Path) -> None:
        self._limits = limits
        self._judgements = read_parts(judgements)

    def keep(self, row: PairRow) -> tuple[Pairs, Counter[str]]:
        kept, removed = [], Counter[str]()
        for pair in row["pairs"]:
            reason = self._reason(next(self._judgements), pair)
            if reason:
                removed[reason] += 1
            else:
                kept.append(pair)
        return kept, removed

    def _reason(self, judgement: PairRow, pair: dict[str, str]) -> str:
        assert judgement["question"] == pair["question"], "verdicts are in the order of the pairs"
        if judgement["failure"]:
            return "judge_failed"
        values = {
            "judge_accuracy": judgement["answer_is_right"],
            "judge_relevance": judgement["about_document"],
        }
        return next(
            (name for name, limit in self._limits.items() if not limit.allows(values[name])), ""
        )


# Files
# ----------------------------------------------------------------------------------------------


def _rewrite(
    source: Path, target: Path, keep: Callable[[PairRow], tuple[Pairs, Counter[str]]], label: str
) -> None:
    """Write each part of `source` to `target`, with the pairs that `keep` keeps."""
    for torn in target.glob(".part-*"):  # a kill while a part was being written
        torn.unlink()
    parts = sorted(source.glob("part-*.parquet"))
    with progress(label, sum(pq.read_metadata(part).num_rows for part in parts)) as bar:
        for part in parts:
            _rewrite_part(part, target / part.name, keep, bar)


def _rewrite_part(
    source: Path, target: Path, keep: Callable[[PairRow], tuple[Pairs, Counter[str]]], bar: Progress
) -> None:
    account = read_account(source)
    table = pq.read_table(source)
    removed: Counter[str] = Counter(account.get("filtered", {}))
    rows = []
    for row in _rows(table):
        row["pairs"], reasons = keep(row)
        removed.update(reasons)
        rows.append(row)
    _part_company(rows)
    bar.advance(len(rows))
    split = account["long_documents"].get("split", 0) > 0
    with_pairs = {_document(row["doc_id"], split) for row in rows if row["pairs"]}
    account |= {"documents_with_pairs": len(with_pairs), "filtered": dict(removed)}
    write_parquet(
        target,
        rows,
        table.schema.with_metadata({ACCOUNT: json.dumps(account, sort_keys=True).encode()}),
    )


def _rows(table: Any) -> Iterator[PairRow]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _part_company(rows: list[PairRow]) -> None:
    """Two rows are one text only if both have something to show."""
    previous = False
    for row in rows:
        found = bool(row["pairs"] or row["rewrite"])
        row["inherits_previous"] = row["inherits_previous"] and previous and found
        previous = found


def _document(doc_id: str, split: bool) -> str:
    """The document that a row is of: pieces of a split one are called id#0, id#1 and so on."""
    return re.sub(r"#\d+$", "", doc_id) if split else doc_id
