"""The plan: which tokens of which documents fill which packed sequence.

A plan is a pure function of document lengths, ratios, sequence length and seed. It knows nothing of ranks or workers, so
order, exact token ratios and resuming are arithmetic on one integer, the number of sequences already trained on.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens `start:end` of a document of a source; sources are numbered in the order of `Plan.sources`."""

    source: int
    document: int
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """`pieces[boundaries[i]:boundaries[i + 1]]` fill sequence i with exactly `seq_len` tokens."""

    sources: list[str]
    ratios: list[float]
    lengths: list[np.ndarray]
    seq_len: int
    pieces: np.ndarray  # int64 [n_pieces, 4]: the fields of Piece
    boundaries: np.ndarray  # int64 [n_sequences + 1]

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def sequence(self, index: int) -> list[Piece]:
        return [Piece(*row) for row in self.pieces[self.boundaries[index] : self.boundaries[index + 1]].tolist()]

    def report(self) -> dict[str, dict[str, Any]]:
        """Per source: unique tokens, requested and realised share, tokens, repeats (epochs) and pieces cut by a sequence's end."""
        total = len(self) * self.seq_len
        report = {}
        for number, name in enumerate(self.sources):
            rows = self.pieces[self.pieces[:, 0] == number]
            tokens, unique = int((rows[:, 3] - rows[:, 2]).sum()), int(self.lengths[number].sum())
            report[name] = {
                "unique_tokens": unique,
                "documents": len(self.lengths[number]),
                "requested": self.ratios[number],
                "realised": tokens / total,
                "tokens": tokens,
                "repeats": tokens / unique if unique else 0.0,
                "truncated": int((rows[:, 3] < self.lengths[number][rows[:, 1]]).sum()),
            }
        return report


def resolve_ratios(ratios: Mapping[str, float | None]) -> dict[str, float]:
    """Shares that sum to 1. A null ratio is what the others leave of 1; without one, ratios are weights and are normalised.

    Raises ValueError for a negative ratio, for more than one null, and where nothing is left to train on.
    """
    for name, ratio in ratios.items():
        if ratio is not None and not ratio >= 0:
            raise ValueError(f"mixture.ratios.{name}={ratio}: a ratio must be zero or more")
    rest = [name for name, ratio in ratios.items() if ratio is None]
    if len(rest) > 1:
        raise ValueError(f"mixture.ratios: only one source can take the rest (null), these do: {', '.join(rest)}")
    given = sum(ratio for ratio in ratios.values() if ratio is not None)
    shares = {name: max(0.0, 1.0 - given) if ratio is None else float(ratio) for name, ratio in ratios.items()}
    total = sum(shares.values())
    if not 0 < total < float("inf"):
        given_as = ", ".join(f"{name}={ratio}" for name, ratio in ratios.items())
        raise ValueError(f"mixture.ratios sum to {total:g} ({given_as}): at least one must be above zero")
    return {name: share / total for name, share in shares.items()}


def make_plan(lengths: Mapping[str, np.ndarray], ratios: Mapping[str, float], seq_len: int, n_sequences: int, seed: int) -> Plan:
    """Fill `n_sequences` sequences with documents of the sources so that each source has its share of all tokens, to the token.

    The next piece always comes from the source that is furthest behind its share (the largest deficit, as in Megatron's
    blended datasets but counted in tokens), so the share also holds within a document's length at every prefix of the
    run. A source is read in a random order, all of it before any of it is repeated. A document that does not fit is cut,
    and its remainder comes next from that source.
    """
    sources = [name for name in ratios if ratios[name] > 0]
    for name in sources:
        if not lengths[name].sum():
            raise ValueError(f"mixture.ratios.{name}={ratios[name]:g}, but source {name} has no tokens")
    shares = np.array([ratios[name] for name in sources])
    quota = _allocate(shares, seq_len * n_sequences)
    cursors = [_read(number, lengths[name], name, seed) for number, name in enumerate(sources)]
    heads = [next(cursor) for cursor in cursors]
    used = [0] * len(sources)
    weights, limits = shares.tolist(), quota.tolist()
    pieces, boundaries, filled = [], [0], 0
    for _ in range(n_sequences):
        room = seq_len
        while room:
            open_sources = [number for number in range(len(sources)) if used[number] < limits[number]]
            number = max(open_sources, key=lambda source: weights[source] * (filled + 1) - used[source])
            head = heads[number]
            taken = min(head.end - head.start, room, limits[number] - used[number])
            pieces.append((number, head.document, head.start, head.start + taken))
            used[number], filled, room = used[number] + taken, filled + taken, room - taken
            rest = head._replace(start=head.start + taken)
            heads[number] = rest if rest.start < rest.end else next(cursors[number])
        boundaries.append(len(pieces))
    return Plan(
        sources, weights, [lengths[name] for name in sources], seq_len, np.array(pieces, np.int64).reshape(-1, 4), np.array(boundaries)
    )


def _read(number: int, lengths: np.ndarray, name: str, seed: int) -> Iterator[Piece]:
    """Whole documents of a source, epoch after epoch, each epoch in an order of its own; empty documents hold nothing to read."""
    epoch = 0
    while True:
        entropy = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
        for document in np.random.Generator(np.random.PCG64(int.from_bytes(entropy[:16]))).permutation(len(lengths)):
            if lengths[document]:
                yield Piece(number, int(document), 0, int(lengths[document]))
        epoch += 1


def _allocate(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total` and are nearest to the shares (largest remainder)."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[number] += 1
    return counts
