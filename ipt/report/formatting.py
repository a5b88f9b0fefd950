"""Numbers and names as people write them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = {
    "recall": (
        "questions about what the training documents say, none of which stands there as it is asked"
    ),
    "generalisation": "questions about what was held out of all training documents",
}


def duration(seconds: float) -> str:
    """A time span as people say it: 0.4 s, 42 s, 3 min 12 s, 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds else "0"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def plain(value: Any) -> str:
    """A leaf of statistics for readers."""
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
        return ", ".join(plain(inner) for inner in value) or "none"
    return str(value)


def thousands(value: float) -> str:
    return f"{value:,.0f}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def task_label(task: str) -> str:
    """definition_to_term_recall -> definition to term, recall."""
    return spaced(
        re.sub(rf"_({'|'.join(SPLITS)})$", r", \1", task)
        .replace("is_a", "is-a")
        .replace("held_out", "held-out")
    )


def spaced(name: str) -> str:
    return name.replace("/", ", ").replace(".", ", ").replace("_", " ")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
