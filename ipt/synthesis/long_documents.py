"""Documents that do not fit the context window: split at sentence boundaries, truncated, or skipped
(`synthesis.long_documents`).
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

# The end of a sentence: a full stop before something that begins one, a full stop of a script
# without spaces, or a line break. A run of full stops is tried once, from its first one: trying
# each takes quadratic time on dotted lines.
SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s+(?![a-z])|[。！？｡।]+[」』”’）]*\s*|\n\s*"
)


class Fitted(NamedTuple):
    """The pieces that go on, and what was done: nothing (""), split, truncated, or too_long where
    none goes on.
    """

    pieces: list[str]
    action: str


def fit(text: str, mode: str, limit: int, count: Callable[[str], int]) -> Fitted:
    """Make `text` fit. `count` gives a text's prompt length in tokens, which may be at most
    `limit`; an empty text must fit.
    """
    if count(text) <= limit:
        return Fitted([text], "")
    if mode == "split":
        return Fitted(split(text, limit, count), "split")
    if mode == "truncate":
        return Fitted([truncate(text, limit, count)], "truncated")
    return Fitted([], "too_long")


def split(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Cut `text` into few pieces of similar length that fit; joined again they are `text`,
    character for character.

    Cuts are between sentences; only a sentence that does not fit is cut between words, and only a
    word that does not, within.
    """
    overhead = count("")
    units = _fitting_units(text, limit, count)
    lengths = [max(1, count(unit) - overhead) for unit in units]
    pieces = -(-sum(lengths) // max(1, limit - overhead))
    while True:
        parts = _group(units, lengths, pieces)
        if all(count(part) <= limit for part in parts):
            return parts
        pieces += 1  # ends at the latest when each unit is a piece


def truncate(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The longest beginning of `text` that fits, cut back to the end of a word where there is one
    in its second half.
    """
    end = bisect_right(range(len(text)), limit, key=lambda length: count(text[:length])) - 1
    while count(text[:end]) > limit:  # a shorter text can have more tokens, by one or two
        end -= 1
    word_end = max(text.rfind(space, 0, end) for space in " \n\t")
    return text[:word_end] if word_end > end // 2 else text[:end]


def sentences(text: str) -> list[str]:
    """`text` cut behind each sentence; the white space after a sentence belongs to it."""
    return _cut(text, SENTENCE_END)


def _fitting_units(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    units: list[str] = []
    for sentence in sentences(text):
        if count(sentence) <= limit:
            units.append(sentence)
            continue
        for word in _cut(sentence, re.compile(r"\s+")):
            units.extend([word] if count(word) <= limit else word)
    return units


def _group(units: list[str], lengths: list[int], pieces: int) -> list[str]:
    """Neighbouring units joined to at most `pieces` texts of similar length: a unit goes where its
    middle falls.
    """
    total, groups = sum(lengths), [""] * pieces
    for unit, length, end in zip(units, lengths, accumulate(lengths), strict=True):
        groups[min(pieces - 1, int((end - length / 2) * pieces / total))] += unit
    return [group for group in groups if group]


def _cut(text: str, boundary: re.Pattern[str]) -> list[str]:
    ends = [0, *(match.end() for match in boundary.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if end > start]
