"""How the documents of a block fill its sequences: in order, or by best fit.

Pieces are rows of int64: source, document, first token, last token + 1, length of the document. A
packed block consists of its pieces, sequence after sequence, and of the number of pieces before
each sequence.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from ipt.mixture.order import permutation

SOURCE, DOCUMENT, START, END, LENGTH = range(5)


class Packed(NamedTuple):
    """`pieces[bounds[i]:bounds[i + 1]]` are in sequence i of the block: int64 [pieces, 5] and
    [sequences + 1].
    """

    pieces: np.ndarray
    bounds: np.ndarray


def sizes(pieces: np.ndarray) -> np.ndarray:
    return pieces[:, END] - pieces[:, START]


def concatenate(pieces: list[np.ndarray], targets: np.ndarray, seq_len: int) -> Packed:
    """Documents in order, split wherever a sequence ends, as GPT-3 was trained (arXiv 2005.14165,
    section 2.3).

    `pieces` are those of each source in its order; together they fill the block exactly. `targets`
    [sequences + 1, sources] is the number of tokens that each source should have contributed at the
    start of each sequence. A document is due when the target of its source reaches its middle, so
    no source is ever further than one document from its target.
    """
    ends = [np.cumsum(sizes(rows)) for rows in pieces]
    clock = np.arange(len(targets)) * seq_len
    due = [
        np.interp(end - sizes(rows) / 2, target, clock) if len(rows) else np.zeros(0)
        for rows, end, target in zip(pieces, ends, targets.T, strict=True)
    ]
    ordered = np.concatenate(pieces)[np.argsort(np.concatenate(due), kind="stable")]
    cut = cut_at(ordered, clock)
    return Packed(
        cut,
        np.searchsorted(np.cumsum(sizes(cut)), clock, side="right")
        if len(cut)
        else np.zeros(len(clock), np.int64),
    )


def best_fit(pieces: np.ndarray, seq_len: int, sequences: int, *entropy: object) -> Packed:
    """Pieces of at most `seq_len` tokens, the longest first, each into the fullest sequence with
    enough space.

    A piece that fits nowhere is split to fill the remaining space; the total must fit. The order of
    the sequences, and of the pieces in each, is a random one that depends only on `entropy`,
    because best-fit decreasing would put the longest first (for language models see arXiv
    2404.10830).
    """
    pieces = pieces[np.argsort(-sizes(pieces), kind="stable")]
    # room * sequences + sequence, in order
    rooms = [seq_len * sequences + sequence for sequence in range(sequences)]
    places, left = np.zeros(len(pieces), np.int64), []
    for number, size in enumerate(sizes(pieces).tolist()):
        found = bisect_left(rooms, size * sequences)
        if found == len(rooms):
            left.append(number)
            continue
        room, places[number] = divmod(rooms.pop(found), sequences)
        insort(rooms, (room - size) * sequences + int(places[number]))
    if left:
        cut, cut_places = _cut_into(pieces[left], rooms, sequences)
        pieces = np.concatenate([np.delete(pieces, left, axis=0), cut])
        places = np.concatenate([np.delete(places, left), cut_places])
    _leave_none_empty(places, sequences)
    places = permutation(sequences, *entropy, "sequences")[places]
    order = np.lexsort((permutation(len(pieces), *entropy, "pieces"), places))
    return Packed(pieces[order], np.searchsorted(places[order], np.arange(sequences + 1)))


def cut_at(pieces: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The same tokens in the same order, split at each of the positions, which count from the start
    of the first piece.
    """
    ends = np.cumsum(sizes(pieces))
    borders = np.unique(
        np.concatenate(
            [ends, positions[(positions > 0) & (positions < (ends[-1] if len(ends) else 0))]]
        )
    )
    row = np.searchsorted(ends, borders, side="left")
    cut = pieces[row]
    cut[:, END] = pieces[row, END] - (ends[row] - borders)
    cut[:, START] = cut[:, END] - np.diff(borders, prepend=0)
    return cut


def split_long(pieces: np.ndarray, seq_len: int) -> np.ndarray:
    """The same tokens, with each document split after every `seq_len` tokens."""
    long = np.flatnonzero((pieces[:, END] - 1) // seq_len > pieces[:, START] // seq_len)
    begins = np.cumsum(sizes(pieces)) - sizes(pieces)
    cuts = [
        begins[row]
        - pieces[row, START]
        + np.arange(pieces[row, START] // seq_len + 1, (pieces[row, END] - 1) // seq_len + 1)
        * seq_len
        for row in long
    ]
    return cut_at(pieces, np.concatenate(cuts)) if cuts else pieces


def _leave_none_empty(places: np.ndarray, sequences: int) -> None:
    """Give each empty sequence half of the pieces of another one, because a step on padding alone
    would train nothing.
    """
    counts = np.bincount(places, minlength=sequences)
    for empty in np.flatnonzero(counts == 0).tolist():
        moved = np.flatnonzero(places == counts.argmax())[1::2]
        counts[[counts.argmax(), empty]] -= [len(moved), -len(moved)]
        places[moved] = empty


def _cut_into(
    pieces: np.ndarray, rooms: list[int], sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces split to fill the largest free spaces first, and the sequence of each."""
    cut, places = [], []
    for row in pieces.tolist():
        while row[START] < row[END]:
            room, sequence = divmod(rooms.pop(), sequences)
            assert room, "a block holds more tokens than its sequences"
            end = min(row[START] + room, row[END])
            cut.append([*row[:START], row[START], end, row[LENGTH]])
            places.append(sequence)
            insort(rooms, (room - (end - row[START])) * sequences + sequence)
            row[START] = end
    return np.array(cut, np.int64), np.array(places, np.int64)
