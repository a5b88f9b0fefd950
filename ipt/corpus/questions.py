"""Closed-book questions: their format, and those that a user puts next to a corpus.

A question is `{"id", "task", "split", "prompt", "options", "gold", "meta"}`. Evaluation scores the
prompt followed by each option.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ipt.errors import UserError

RECALL, GENERALISATION = "recall", "generalisation"

Question = dict[str, Any]


def count_questions(questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Task -> split -> number of questions."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question["task"], Counter())[question["split"]] += 1
    return {task: dict(splits) for task, splits in counts.items()}


def read_questions(lines: Iterable[bytes], where: str) -> Iterator[Question]:
    """The questions of a .jsonl file. Raises UserError with the line of a question that cannot be
    scored.
    """
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            question = _parse(line, f"{where}, line {number}")
            if question["id"] in seen:
                raise UserError(
                    f"{where}, line {number}: id {question['id']!r} occurred before: make it unique"
                )
            seen.add(question["id"])
            yield question


def _parse(line: bytes, where: str) -> Question:
    try:
        question = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(question, dict):
        raise UserError(
            f"{where}: a JSON {type(question).__name__}, expected a question with id, task, split, "
            "prompt, options, gold"
        )
    for key in ("id", "task", "split", "prompt"):
        if not isinstance(question.get(key), str) or not question[key]:
            raise UserError(f"{where}: {key} is {question.get(key)!r}, expected text")
    options, gold = question.get("options"), question.get("gold")
    if (
        not isinstance(options, list)
        or len(options) < 2
        or not all(isinstance(option, str) and option for option in options)
    ):
        raise UserError(f"{where}: options are {options!r}, expected a list of two or more texts")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        raise UserError(
            f"{where}: gold is {gold!r}, expected the place of the right option, 0 to "
            f"{len(options) - 1}"
        )
    return {**question, "meta": question.get("meta", {})}
