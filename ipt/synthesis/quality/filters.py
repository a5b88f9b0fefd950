"""Filters: which pairs of a synthesis stage are used for rendering. All documents are kept, with
their remaining pairs.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ipt.config import FilterConfig, check_choices, key_settings
from ipt.console import Progress, progress
from ipt.corpus.decontaminate import Overlap, OverlapCount
from ipt.errors import UserError
from ipt.files import read_parts, write_parquet
from ipt.synthesis.quality.judge import check_judge, judge_pairs
from ipt.synthesis.quality.statistics import (
    PAIR_MEASURES,
    DocumentWords,
    PairWords,
    frame,
    read_document,
    read_pair,
    statistics,
)
from ipt.synthesis.quality.streaming import BloomFilter, FrequentCount
from ipt.synthesis.shards import ACCOUNT, read_account

STREAM_MEASURES = ("duplicate_question", "question_template_count")  # depend on earlier pairs
DOCUMENT_MEASURES = ("document_words", "pairs")
JUDGE_MEASURES = ("judge_accuracy", "judge_relevance")

PairRow = dict[str, Any]
Pair = dict[str, str]
# Returns the pairs of a row that are kept, and the number of removed pairs by reason.
Keep = Callable[[PairRow], tuple[list[Pair], Counter[str]]]


def filter_pairs(
    config: FilterConfig, pairs: Path, output: Path, seed: int, overlap: Overlap | None
) -> dict[str, Any]:
    """Write `pairs/part-*.parquet` to `output/pairs` without the pairs that `config` excludes, and
    return the statistics.

    Files, rows and columns are those of the synthesis stage. Only `pairs` gets shorter, and
    `inherits_previous` becomes false where this row or the previous one is empty. `filtered` counts
    the removed pairs by the first reason that applies: a threshold by its measure, "overlap" or
    "judge_failed". The judge rates the pairs that pass the other filters. Returns the statistics of
    the remaining pairs (`ipt.synthesis.quality.statistics.statistics`) with `pairs_before`, the
    judge's results and, per evaluation task, the overlap. Memory does not grow with the corpus,
    except by 4 bytes per pair for the measure duplicate_question. Raises as `check_filters` does.
    """
    check_filters(config)
    if config.overlap and overlap is None:
        raise UserError(
            f"filters.overlap={config.overlap}: no evaluation tasks to compare with: set tasks"
        )
    folder = output / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    before = sum(len(row["pairs"]) for row in read_parts(pairs, ["pairs"]))
    rules = Rules(config, before, overlap)
    _rewrite(pairs, folder, rules.keep, "filters")
    results: dict[str, Any] = {"pairs_before": before}
    if config.judge.model is not None:
        results["judge"] = judge_pairs(config.judge, folder, output, seed)
        limits = _limits(config, JUDGE_MEASURES)
        if limits:
            verdicts = Verdicts(limits, output / "judgements")
            _rewrite(folder, folder, verdicts.keep, "judge's filters")
    if rules.overlaps is not None:
        results["overlap"] = rules.overlaps.report()
    stats = statistics(folder)
    for name in ("tokens_not_generated", "generator_flops"):  # belong to the synthesis stage
        del stats[name]
    return stats | results


def check_filters(config: FilterConfig) -> None:
    """Raise UserError for filters that `filter_pairs` rejects. Reads no data."""
    check_choices(config, "filters.")
    for name, bounds in asdict(config.thresholds).items():
        key = f"filters.thresholds.{name}={bounds}"
        if bounds is None:
            continue
        if len(bounds) != 2:
            raise UserError(f"{key}: must be [minimum, maximum], with null for no limit")
        if None not in bounds and bounds[0] > bounds[1]:
            raise UserError(f"{key}: the minimum is greater than the maximum")
    check_judge(config.judge)
    measures = ", ".join(_limits(config, JUDGE_MEASURES))
    if measures and config.judge.model is None:
        raise UserError(f"filters.thresholds: {measures} needs a judge: set filters.judge.model")
    if measures and config.judge.sample is not None:
        raise UserError(
            f"filters.thresholds: {measures} needs a verdict on every pair: set "
            "filters.judge.sample=null"
        )


def filter_settings(config: FilterConfig) -> dict[str, Any]:
    """The settings that affect the output of the stage."""
    settings = key_settings(config)
    thresholds = settings["thresholds"]
    settings["thresholds"] = {name: bounds for name, bounds in thresholds.items() if bounds}
    return settings


def is_active(config: FilterConfig) -> bool:
    """Whether any filter is set."""
    return bool(any(asdict(config.thresholds).values()) or config.overlap or config.judge.model)


# Rules
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    low: float | None
    high: float | None

    def allows(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _limits(config: FilterConfig, names: Iterable[str]) -> dict[str, Limit]:
    limits = {}
    for name in names:
        bounds = getattr(config.thresholds, name)
        if bounds is not None:
            limits[name] = Limit(*bounds)
    return limits


class Rules:
    """The limits of pairs and documents, and the overlap with evaluation tasks. Remembers the pairs
    that were kept.
    """

    def __init__(self, config: FilterConfig, pairs: int, overlap: Overlap | None) -> None:
        self._pair_limits = _limits(config, PAIR_MEASURES)
        self._stream_limits = _limits(config, STREAM_MEASURES)
        self._document_limits = _limits(config, DOCUMENT_MEASURES)
        self._overlap = overlap if config.overlap else None
        self._removes_overlap = config.overlap == "remove"
        self.overlaps = OverlapCount(self._overlap) if self._overlap is not None else None
        self._asked = BloomFilter(pairs if "duplicate_question" in self._stream_limits else 0)
        self._frames = FrequentCount()

    def keep(self, row: PairRow) -> tuple[list[Pair], Counter[str]]:
        """The pairs of a row that are kept, and the number of removed pairs by reason."""
        document = read_document(row["text"])
        if row["pairs"] and not self._allows("document_words", document.length):
            return [], Counter(document_words=len(row["pairs"]))
        kept, removed = _partition(row["pairs"], lambda pair: self._reason(pair, document, row))
        if kept and not self._allows("pairs", len(kept)):
            removed["pairs"] += len(kept)
            kept = []
        return kept, removed

    def _allows(self, measure: str, value: float) -> bool:
        limit = self._document_limits.get(measure)
        return limit is None or limit.allows(value)

    def _reason(self, pair: Pair, document: DocumentWords, row: PairRow) -> str:
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

    def _stream_reason(self, pair: Pair, words: PairWords, document: DocumentWords) -> str:
        """Checked last, so that only pairs that pass everything else count as earlier pairs."""
        asked = self._stream_limits.get("duplicate_question")
        if asked is not None and not asked.allows(self._asked.add(pair["question"].lower())):
            return "duplicate_question"
        frames = self._stream_limits.get("question_template_count")
        if frames is not None:
            earlier = self._frames.add(frame(words.question, document.known))
            if not frames.allows(earlier):
                return "question_template_count"
        return ""


class Verdicts:
    """The limits of the judge's verdicts. Rows must come in the order in which they were judged."""

    def __init__(self, limits: dict[str, Limit], judgements: Path) -> None:
        self._limits = limits
        self._judgements = read_parts(judgements)

    def keep(self, row: PairRow) -> tuple[list[Pair], Counter[str]]:
        """See `Rules.keep`."""
        return _partition(row["pairs"], self._reason)

    def _reason(self, pair: Pair) -> str:
        judgement = next(self._judgements)
        assert judgement["question"] == pair["question"], "verdicts are in the order of the pairs"
        if judgement["failure"]:
            return "judge_failed"
        values = {
            "judge_accuracy": judgement["answer_is_right"],
            "judge_relevance": judgement["about_document"],
        }
        for name, limit in self._limits.items():
            if not limit.allows(values[name]):
                return name
        return ""


def _partition(
    pairs: list[Pair], reason_of: Callable[[Pair], str]
) -> tuple[list[Pair], Counter[str]]:
    kept, removed = [], Counter[str]()
    for pair in pairs:
        reason = reason_of(pair)
        if reason:
            removed[reason] += 1
        else:
            kept.append(pair)
    return kept, removed


# Files
# ----------------------------------------------------------------------------------------------


def _rewrite(source: Path, target: Path, keep: Keep, label: str) -> None:
    """Write each part of `source` to `target`, with the pairs that `keep` returns."""
    for temporary in target.glob(".part-*"):  # of an interrupted run
        temporary.unlink()
    parts = sorted(source.glob("part-*.parquet"))
    with progress(label, sum(pq.read_metadata(part).num_rows for part in parts)) as bar:
        for part in parts:
            _rewrite_part(part, target / part.name, keep, bar)


def _rewrite_part(source: Path, target: Path, keep: Keep, bar: Progress) -> None:
    account = read_account(source)
    is_split = account["long_documents"].get("split", 0) > 0
    table = pq.read_table(source)
    removed: Counter[str] = Counter(account.get("filtered", {}))
    with_pairs: set[str] = set()
    rows = []
    previous = False
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            row["pairs"], reasons = keep(row)
            removed.update(reasons)
            # two rows are one text only if neither is empty
            found = bool(row["pairs"] or row["rewrite"])
            row["inherits_previous"] = row["inherits_previous"] and previous and found
            previous = found
            if row["pairs"]:  # pieces of a split document are called id#0, id#1 and so on
                with_pairs.add(re.sub(r"#\d+$", "", row["doc_id"]) if is_split else row["doc_id"])
            rows.append(row)
    bar.advance(len(rows))
    account |= {"documents_with_pairs": len(with_pairs), "filtered": dict(removed)}
    metadata = {ACCOUNT: json.dumps(account, sort_keys=True).encode()}
    write_parquet(target, rows, table.schema.with_metadata(metadata))
