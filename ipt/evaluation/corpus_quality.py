"""Quality of an augmented corpus (the paper's Table 6): what a judge model says of sampled pairs,
and what rules say without one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ipt.config import EvaluationConfig, JudgeConfig, key_settings
from ipt.corpus.words import words_of
from ipt.errors import MissingFileError, UserError
from ipt.evaluation.metrics import statistics
from ipt.files import hash_json, read_parts, write_json, write_parquet
from ipt.models import check_model, load_tokenizer
from ipt.synthesis.quality.judge import (
    SCHEMA,
    Case,
    check_judge,
    failure,
    figures,
    judge_pairs,
    read_reply,
    sample_cases,
    spelled_out,
    verdict_row,
)
from ipt.synthesis.quality.measures import GROUNDED, read_document, read_pair
from ipt.synthesis.quality.task_types import kind_of

RESULTS = "pair_quality.json"
# of 500 pairs each, by GPT-4 (Table 6): accuracy and relevance in percent, kinds of task
PUBLISHED = {
    "general": {"accuracy": 77.5, "relevance": 92.9, "kinds_of_task": 49},
    "biomedicine": {"accuracy": 86.2, "relevance": 99.4, "kinds_of_task": 26},
    "finance": {"accuracy": 69.8, "relevance": 85.8, "kinds_of_task": 41},
}
LABELS = {
    "accuracy": "judge: answer right",
    "relevance": "judge: relevant",
    "kinds_of_task": "judge: kinds of task",
    "grounded": "rule: close to text",
    "verbatim": "rule: found in text",
    "kinds_by_rules": "rules: kinds of task",
}


def judge_corpus(
    folder: Path, judge: JudgeConfig, here: EvaluationConfig | None, seed: int, output: Path
) -> dict[str, Any]:
    """Figures of `judge.sample` pairs, drawn by `seed`, of a finished synthesis stage or a folder
    of its parts.

    They are also written to `output/pair_quality.json`:

    - `judge`, if it names a model: accuracy and relevance (value, stderr, ci95, n),
      `kinds_of_task`, the most frequent `tasks`, and `failed` by reason. The model is one behind a
      server, or with `here` one that is loaded on this machine. Every verdict is in
      `output/judgements`.
    - `rules`, which need no judge and do not know whether an answer is right: the share of answers
      of which four fifths of the words (`grounded`), or all in a row (`verbatim`), occur in their
      document; `kinds_by_rules` and the `kinds` themselves.

    Raises MissingFileError or UserError where there are no pairs, no verdict comes, or a setting is
    wrong, EngineDied if the server cannot be reached.
    """
    check_judge(judge)
    pairs = pairs_folder(folder)
    found: dict[str, Any] = {
        "folder": str(folder),
        "sample": judge.sample,
        "seed": seed,
        "rules": _by_rules(pairs, judge.sample, seed),
    }
    if judge.model is not None:
        if here is None:
            judge_pairs(judge, pairs, output, seed)
        else:
            _judge_here(judge, here, pairs, output, seed)
        found |= {"judge_model": judge.model, "judge": _by_judge(output / "judgements")}
    write_json(output / RESULTS, found)
    return found


def pairs_folder(folder: Path) -> Path:
    """Where a synthesis stage, or a folder of its files, has its pairs. Raises MissingFileError if
    there are none.
    """
    for pairs in (folder / "pairs", folder):
        if any(pairs.glob("part-*.parquet")):
            return pairs
    raise MissingFileError(
        f"{folder} holds no pairs/part-*.parquet: name the folder of a finished synthesis (or "
        "filters) stage"
    )


def default_output(
    folder: Path, judge: JudgeConfig, here: EvaluationConfig | None, seed: int
) -> Path:
    """Where the same question about the same pairs finds its verdicts again."""
    parts = [
        (part.name, part.stat().st_size, part.stat().st_mtime_ns)
        for part in sorted(pairs_folder(folder).glob("part-*.parquet"))
    ]
    settings = key_settings(judge)
    server = [here.backend, here.dtype] if here is not None else judge.base_url
    return (
        Path("outputs/judged")
        / hash_json([str(folder.resolve()), parts, settings, server, seed])[:12]
    )


def judged_table(found: dict[str, Any]) -> Table:
    """The figures beside the paper's, for the terminal."""
    caption = (
        "in percent, ± one standard error; right of it the paper's corpora, of each 500 pairs, "
        "judged by GPT-4"
    )
    view = Table(
        box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left"
    )
    view.add_column("", no_wrap=True)
    for title in ("share", "95% interval", "n"):
        view.add_column(title, justify="right", no_wrap=True)
    for corpus in PUBLISHED:
        view.add_column(corpus, justify="right", style="dim")
    entries = {**found.get("judge", {}), **found["rules"]}
    for name in (name for name in LABELS if name in entries):
        published = [str(figures.get(name, "")) for figures in PUBLISHED.values()]
        view.add_row(LABELS[name], *_cells(entries[name]), *published)
    return view


def verdict_rows(cases: list[Case], replies: list[str | None]) -> Iterator[dict[str, Any]]:
    """Rows of judgements for replies, None where a case did not fit the model. Such a case counts
    as refused, as by a server.
    """
    for case, reply in zip(cases, replies, strict=True):
        yield verdict_row(case, failure("refused") if reply is None else read_reply(reply))


def _cells(entry: Any) -> tuple[str, str, str]:
    """Value, interval and n of a share, or the number that a count is."""
    if isinstance(entry, int):
        return str(entry), "", ""
    error = "" if entry["stderr"] is None else f" ±{100 * entry['stderr']:.1f}"
    return (
        f"{100 * entry['value']:.1f}{error}",
        " to ".join(f"{100 * bound:.1f}" for bound in entry["ci95"]),
        str(entry["n"]),
    )


# Rules
# ----------------------------------------------------------------------------------------------


def _by_rules(pairs: Path, sample: int | None, seed: int) -> dict[str, Any]:
    grounded, verbatim, kinds = list[bool](), list[bool](), Counter[str]()
    for case in sample_cases(pairs, sample, seed)[1]:
        words = read_pair(case.question, case.answer, read_document(case.text))
        grounded.append(words.grounded >= GROUNDED)
        verbatim.append(words.verbatim)
        kinds[kind_of(case.question, case.answer, words.question, words_of(case.answer))] += 1
    if not grounded:
        raise UserError(f"{pairs} holds documents without any pair: there is nothing to judge")
    return {
        "grounded": statistics.proportion(grounded).as_dict(),
        "verbatim": statistics.proportion(verbatim).as_dict(),
        "kinds_by_rules": len(kinds),
        "kinds": dict(kinds.most_common()),
    }


# The judge
# ----------------------------------------------------------------------------------------------


def _by_judge(folder: Path) -> dict[str, Any]:
    verdicts = [
        (row["answer_is_right"], row["about_document"])
        for row in read_parts(folder)
        if not row["failure"]
    ]
    counted = figures(folder)
    if not verdicts:
        raise UserError(
            f"the judge gave no verdict on any pair: failed are {counted['failed']}; take a larger "
            "or instruction-tuned model"
        )
    right, relevant = zip(*verdicts, strict=True)
    return {
        "accuracy": statistics.proportion(right).as_dict(),
        "relevance": statistics.proportion(relevant).as_dict(),
        **{name: counted[name] for name in ("kinds_of_task", "tasks", "failed")},
    }


def _judge_here(
    judge: JudgeConfig, config: EvaluationConfig, pairs: Path, output: Path, seed: int
) -> None:
    """Ask a model that is loaded on this machine. Verdicts that are there are not asked for again."""
    path = output / "judgements" / "part-00000.parquet"
    if path.exists():
        return
    assert judge.model is not None
    check_model(judge.model)
    from ipt.evaluation.backends.base import load_backend

    cases = list(sample_cases(pairs, judge.sample, seed)[1])
    has_template = bool(load_tokenizer(judge.model).chat_template)
    with load_backend(replace(config, apply_chat_template=has_template), judge.model) as backend:
        prompts = [backend.encoder.prompt(spelled_out(case), judge.max_tokens) for case in cases]
        fitting = [ids for ids, truncated in prompts if not truncated]
        replies = iter(backend.generate(fitting, [], judge.max_tokens, "judge"))
        texts = [None if truncated else next(replies).text for _, truncated in prompts]
    write_parquet(path, list(verdict_rows(cases, texts)), SCHEMA)
