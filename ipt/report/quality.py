"""The table of synthesis statistics: names and meanings for readers, values as text."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ipt.report.formatting import count_of, finite, plain, scientific, spaced, task_label

# Statistic of the synthesis stage -> its name and meaning, in the order of the table.
QUALITY = {
    "documents": ("documents", "input of the synthesis"),
    "documents_with_pairs": ("documents with pairs", "at least one pair"),
    "documents_without_pairs": ("documents without pairs", "generated, but no pair was parsed"),
    "dropped": ("dropped documents", "not sent to the synthesizer, by reason"),
    "long_documents": ("long documents", "split or truncated to fit the context window"),
    "rows": ("generations", "one per document, or per piece of a long document"),
    "joined": ("joined generations", "continued a multi-shot chain"),
    "pairs": ("pairs", ""),
    "pairs_before": ("pairs before filtering", ""),
    "refused": ("rejected prompts", "error message of the engine or server"),
    "filtered": ("filtered pairs", "by the first filter that removed them"),
    "rewrites": ("generations with a rewrite", "a rewritten text instead of pairs"),
    "rewrite_words": ("words per rewrite", "mean"),
    "pairs_per_row": ("pairs per generation", "mean"),
    "well_formed_rate": (
        "well-formed generations",
        "not truncated, at least one pair, nothing rejected except repeated questions",
    ),
    "distinct_question_rate": ("distinct questions", "among all questions of all documents"),
    "repeated_question_rate": (
        "repeated questions",
        "dropped because the document already had the same question",
    ),
    "grounded_rate": (
        "grounded answers",
        "at least 80% of the words of the answer occur in the document",
    ),
    "verbatim_rate": ("verbatim answers", "occur word for word in the document"),
    "what_is_share": ('questions that start with "What is" or "What are"', ""),
    "stock_question_share": ("stock questions", "use one of the ten most frequent templates"),
    "frames": (
        "most frequent question templates",
        "_ stands for words from the document",
    ),
    "self_bleu": ("self-BLEU of questions", "1 means all sampled questions are the same"),
    "distinct_4grams": ("distinct 4-grams", "among all 4-grams of the sampled pairs"),
    "question_words": ("words per question", "mean"),
    "answer_words": ("words per answer", "mean"),
    "prompt_tokens": ("prompt tokens", ""),
    "cached_tokens": ("cached prompt tokens", "found in the prefix cache"),
    "generated_tokens": ("generated tokens", ""),
    "tokens_not_generated": ("tokens saved", "upper bound, by stopping at repetitions"),
    "generator_flops": ("generator FLOPs", "2 × parameters × (uncached prompt + generated tokens)"),
    "rejected": ("rejected pieces", "parts of generations that are not pairs, by reason"),
    "finish_reasons": ("finish reasons", "why generations ended"),
    "session": ("last session", "a resumed stage has several"),
    "judge_accuracy": ("correct answers", "according to a judge model, on a random sample"),
    "judge_relevance": (
        "relevant pairs",
        "about their document, according to a judge model, on the same sample",
    ),
    "judge_kinds_of_task": ("task types", "assigned by the judge model"),
    "judge_failed": ("pairs that the judge could not rate", "by reason"),
}
IN_FIGURES = {"histograms", "kinds"}
NESTED = {"well_formed", "diversity", "judge", "overlap"}
# Left out of the table if zero or empty.
OPTIONAL = {"rewrites", "rewrite_words", "refused", "filtered", "tokens_not_generated"}
OPTIONAL |= {"generator_flops", "judge_failed"}


class QualityRow(NamedTuple):
    name: str
    value: str
    meaning: str


def quality_table(quality: Mapping[str, Any]) -> list[QualityRow]:
    """One row per statistic. Statistics that are unknown here come last, under their own key."""
    values = dict(_values(quality))
    known = [key for key in QUALITY if key in values]
    rows = []
    for key in dict.fromkeys([*known, *values]):
        if values[key] or key not in OPTIONAL:
            name, meaning = QUALITY.get(key, (spaced(key), ""))
            rows.append(QualityRow(name, _value(key, values[key]), meaning))
    for task, counts in (quality.get("overlap") or {}).items():
        rows.append(_overlap(task, counts))
    return rows


def _values(quality: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key -> value of the statistics, those of the sampled diversity and of the judge included."""
    for key, value in quality.items():
        if key not in NESTED | IN_FIGURES:
            yield key, value
    for key, value in (quality.get("diversity") or {}).items():
        if key in QUALITY:
            yield key, value
    judge = quality.get("judge") or {}
    for key in ("accuracy", "relevance"):
        if judge.get(key) is not None:
            low, high = judge[f"{key}_ci95"]
            yield (
                f"judge_{key}",
                f"{judge[key]:.1%} (95% CI: {low:.1%} to {high:.1%}; {judge['judged']:,} pairs)",
            )
    for key in ("kinds_of_task", "failed"):
        if key in judge:
            yield f"judge_{key}", judge[key]


def _value(key: str, value: Any) -> str:
    if key.endswith(("_rate", "_share", "_4grams")) and finite(value) is not None:
        return f"{value:.1%}"
    if key.endswith("_flops") and value is not None:
        return scientific(value)
    if isinstance(value, Mapping) and key != "frames":  # templates have underscores of their own
        return plain({spaced(name): inner for name, inner in value.items()})
    return plain(value)


def _overlap(task: str, counts: Mapping[str, int]) -> QualityRow:
    meaning = "items of the task that share an n-gram with a pair"
    if counts["items_too_short_to_look_for"]:
        meaning += f"; {counts['items_too_short_to_look_for']:,} were too short to check"
    value = (
        f"{counts['items_found']:,} of {counts['items']:,} items, in "
        f"{count_of(counts['texts_that_overlap'], 'pair')}"
    )
    return QualityRow(f"overlap with {task_label(task)}", value, meaning)
