"""Numbers and names as people write them."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

SPLITS = {
    "recall": (
        "questions about facts in the training documents, in words that the documents do not use"
    ),
    "generalisation": "questions about facts held out from all training documents",
}
TASKS = {"is_a": "is-a", "held_out_perplexity": "held-out perplexity"}
SMALL_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MINUS = str.maketrans("-", "−")
SEPARATORS = str.maketrans({"_": " ", "/": ", ", ".": ", "})


def duration(seconds: float) -> str:
    """A time span: 2.7 s, and from 10 seconds on 0:03:12 (hours, minutes, seconds)."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no number, infinite or NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def plain(value: Any) -> str:
    """A value of any JSON type as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return thousands(value)
    if isinstance(value, float):
        return minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def thousands(value: float) -> str:
    return f"{value:,.0f}"


def scientific(value: float) -> str:
    return f"{value:.2e}"


def minus(number: str) -> str:
    """A formatted number with a minus sign instead of a hyphen."""
    return number.translate(MINUS)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def task_label(task: str) -> str:
    """definition_to_term_recall -> definition to term, recall."""
    for split in SPLITS:
        if task.endswith(f"_{split}"):
            name = task.removesuffix(f"_{split}")
            return f"{TASKS.get(name, spaced(name))}, {split}"
    return TASKS.get(task, spaced(task))


def spaced(name: str) -> str:
    """An identifier as words: yes_no -> yes no."""
    return name.translate(SEPARATORS)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def count_of(count: int, noun: str) -> str:
    """The number and the noun in its plural where needed: 1 pair, 12 pairs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_words(count: int, noun: str) -> str:
    """As `count_of`, small numbers in words: two models."""
    number = SMALL_NUMBERS[count] if count < len(SMALL_NUMBERS) else f"{count:,}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
