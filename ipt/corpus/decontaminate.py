"""Decontamination: finds texts that share an n-gram of words with an item of an evaluation task.

As usual in the field, two texts overlap if they share `ngram` consecutive words (13, as for GPT-3),
regardless of case and punctuation. N-grams that many items of a task share are the wording of the
task, not its content, and are ignored. Only hashes are stored: 20 to 28 bytes per n-gram of the
items.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from ipt.corpus.words import words_of
from ipt.errors import UserError

OVERLAPS = "overlaps with an evaluation task"  # reason for which documents are dropped
SHORTEST = 8  # words; an item with fewer says too little to tell a copy from chance
# An n-gram in more items than this, and in more than this share of its task's items, is the task's
# wording.
WORDING_ITEMS, WORDING_SHARE = 10, 0.2

Hashes = npt.NDArray[np.uint64]
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Overlap:
    """Finds the items of evaluation tasks in other texts.

    `texts` maps each task to the texts of its items; an item's number is its index. An item of
    fewer than `ngram` words is searched for as a whole if it has at least `SHORTEST` words;
    otherwise it is counted as too short.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], ngram: int = 13) -> None:
        if ngram < 1:
            raise UserError(f"ngram={ngram}: expected a number of words, 1 or more")
        self.ngram = ngram
        self.items: dict[str, int] = {}
        self.too_short: Counter[str] = Counter()
        self._lengths: set[int] = set()
        self._owners: list[tuple[str, int]] = []  # of each item: its task and number
        self._powers, self._inverses = _powers(_FACTOR), _powers(pow(_FACTOR, -1, 2**64))
        self._grams, self._owner = self._index(texts)
        # a table by their first bits, which tells at once that an n-gram is not there
        bits = (8 * len(self._grams)).bit_length()
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(2**bits, bool)
        self._seen[self._grams >> self._shift] = True

    def find(self, text: str) -> dict[str, set[int]]:
        """The items that share an n-gram with `text`: task -> their numbers. Empty if there are
        none.
        """
        found: dict[str, set[int]] = {}
        sums = self._sums(words_of(text))
        for length in self._lengths:
            grams = self._ngrams(sums, length)
            grams = grams[self._seen[grams >> self._shift]]
            if not len(grams):
                continue
            first, end = (
                np.searchsorted(self._grams, grams, side=side) for side in ("left", "right")
            )
            for owner in {
                owner
                for place in range(len(grams))
                for owner in self._owner[first[place] : end[place]]
            }:
                task, number = self._owners[owner]
                found.setdefault(task, set()).add(number)
        return found

    def _index(self, texts: Mapping[str, Iterable[str]]) -> tuple[Hashes, npt.NDArray[np.uint32]]:
        """The n-grams of all items in ascending order, and the item of each."""
        grams: list[Hashes] = []
        for task, items in texts.items():
            number, first = -1, len(grams)
            for number, text in enumerate(items):
                words = words_of(text)
                if len(words) < min(SHORTEST, self.ngram):
                    self.too_short[task] += 1
                    grams.append(np.empty(0, np.uint64))
                else:
                    length = min(self.ngram, len(words))
                    self._lengths.add(length)
                    grams.append(self._ngrams(self._sums(words), length))
                self._owners.append((task, number))
            self.items[task] = number + 1
            grams[first:] = _without_wording(grams[first:])
        joined = np.concatenate([np.empty(0, np.uint64), *grams])
        owner = np.repeat(np.arange(len(grams), dtype=np.uint32), [len(item) for item in grams])
        order = np.argsort(joined, kind="stable")
        return joined[order], owner[order]

    def _sums(self, words: list[str]) -> Hashes:
        """h[0]*f^0 + ... + h[k-1]*f^(k-1) modulo 2**64 for each k, where h are the hashes of the
        words and f is a factor.
        """
        while len(self._powers) < len(words):
            self._powers, self._inverses = _longer(self._powers), _longer(self._inverses)
        hashes = np.fromiter(
            map(xxh3_64_intdigest, " ".join(words).encode().split()), np.uint64, len(words)
        )
        return np.concatenate(
            [
                np.zeros(1, np.uint64),
                np.cumsum(hashes * self._powers[: len(words)], dtype=np.uint64),
            ]
        )

    def _ngrams(self, sums: Hashes, length: int) -> Hashes:
        """A hash of each run of `length` words, independent of its position."""
        runs = max(len(sums) - length, 0)
        return (sums[length:] - sums[:runs]) * self._inverses[:runs]


class OverlapCount:
    """Sums up the results of `Overlap.find` over many texts."""

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = overlap
        self._texts: Counter[str] = Counter()
        self._items: dict[str, set[int]] = {}

    def add(self, found: Mapping[str, set[int]]) -> None:
        for task, numbers in found.items():
            self._texts[task] += 1
            self._items.setdefault(task, set()).update(numbers)

    def report(self) -> dict[str, dict[str, int]]:
        """Task -> number of items, of items found, of items too short to search for, and of texts
        that contain an item.
        """
        return {
            task: {
                "items": items,
                "items_found": len(self._items.get(task, ())),
                "items_too_short_to_look_for": self._overlap.too_short[task],
                "texts_that_overlap": self._texts[task],
            }
            for task, items in self._overlap.items.items()
        }


def _without_wording(grams: list[Hashes]) -> list[Hashes]:
    """The n-grams of a task's items, except those that many items share."""
    once = [np.unique(item) for item in grams]
    found, items = np.unique(np.concatenate([np.empty(0, np.uint64), *once]), return_counts=True)
    wording = found[items > max(WORDING_ITEMS, WORDING_SHARE * len(grams))]
    return [item[~np.isin(item, wording)] for item in once] if len(wording) else grams


def _powers(factor: int, count: int = 1024) -> Hashes:
    return np.concatenate(
        [np.ones(1, np.uint64), np.cumprod(np.full(count - 1, factor, np.uint64), dtype=np.uint64)]
    )


def _longer(powers: Hashes) -> Hashes:
    """Twice as many powers: the second half is the first half times the next power."""
    return np.concatenate([powers, powers * (powers[-1:] * powers[1:2])])


class Decontamination:
    """Counts the texts of a corpus that overlap with evaluation tasks and decides which to drop.

    Without an `overlap` it drops nothing and reports nothing.
    """

    def __init__(self, overlap: Overlap | None, remove: bool) -> None:
        self._overlap = overlap
        self._remove = remove
        self._count = OverlapCount(overlap) if overlap else None

    def drops(self, text: str) -> bool:
        if self._overlap is None or self._count is None:
            return False
        found = self._overlap.find(text)
        self._count.add(found)
        return bool(found) and self._remove

    def report(self) -> dict[str, Any]:
        if self._overlap is None or self._count is None:
            return {}
        entry = {
            "ngram": self._overlap.ngram,
            "removed": self._remove,
            "tasks": self._count.report(),
        }
        return {"overlap": entry}
