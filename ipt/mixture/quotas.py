"""Cumulative token count of each source after N tokens of the run: a closed formula, exact to the
token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ipt.errors import UserError
from ipt.mixture.schedule import Schedule

HALVINGS = 64  # of an interval a few tokens wide: down to the last bit of its bounds


@dataclass(frozen=True)
class Quotas:
    """Tokens of each source at every position of a run of `total` tokens, in constant time."""

    schedule: Schedule
    total: int

    def exact(self, positions: np.ndarray) -> np.ndarray:
        """Integral of the shares: float [positions] in tokens -> float [positions, sources]."""
        return self.schedule.integral(positions / self.total) * self.total

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Whole tokens: int64 [positions] -> int64 [positions, sources]. Rows sum to the position
        and never decrease.

        A clock runs through the exact integrals. A source gets its k-th token when its integral
        passes k - 1/2 (Webster's method), and the row of position p is the state after p tokens.
        Rounding each row by largest remainders also gives the right sums, but can take back a token
        of an earlier row. Rows are within about one token of `exact`.
        """
        counts = self._rounded(positions.astype(float))
        off = counts.sum(axis=1) != positions
        if off.any():
            counts[off] = self._settle(positions[off])
        return counts

    def _settle(self, positions: np.ndarray) -> np.ndarray:
        """Find the moment of the clock at which that many tokens are assigned."""
        margin = len(self.schedule.sources) + 1
        low = np.maximum(positions - margin, 0).astype(float)
        high = (positions + margin).astype(float)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            before = self._rounded(middle).sum(axis=1) <= positions
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        counts = self._rounded(low)
        # tokens given at the same instant: to the sources in their order
        missing = positions - counts.sum(axis=1)
        due = self._rounded(high) - counts
        return counts + np.clip(missing[:, None] - (np.cumsum(due, axis=1) - due), 0, due)

    def _rounded(self, clock: np.ndarray) -> np.ndarray:
        return np.floor(self.exact(clock) + 0.5).astype(np.int64)


def cap_shares(schedule: Schedule, caps: Mapping[str, float], total: int) -> Schedule:
    """Proportions with which no source exceeds its cap in tokens.

    A capped source contributes exactly its cap, and the others share the rest in proportion. At
    each point of the schedule the share of a capped source shrinks by the same factor. Raises
    UserError if only capped sources are left for a part of the run.
    """
    limits = np.array([caps.get(name, np.inf) for name in schedule.sources])
    fixed, capped, current = np.zeros_like(schedule.shares), np.zeros(len(limits), bool), schedule
    while True:
        amounts = current.mean() * total
        over = ~capped & (amounts > limits + 0.5)
        if not over.any():
            return current
        capped |= over
        fixed[:, over] = current.shares[:, over] * (limits[over] / amounts[over])
        free = np.where(capped, 0.0, schedule.shares)
        rest, weight = 1 - fixed.sum(axis=1, keepdims=True), free.sum(axis=1, keepdims=True)
        if ((weight == 0) & (rest > 1e-9)).any():
            names = ", ".join(
                name for name, flag in zip(schedule.sources, capped, strict=True) if flag
            )
            raise UserError(
                f"mixture.on_max_repeats=renormalise: with no more of {names} than "
                "mixture.max_repeats allows, "
                "no source is left that fills the run; take fewer steps or allow more repeats"
            )
        current = schedule.with_shares(
            fixed + free * np.divide(rest, weight, out=np.zeros_like(rest), where=weight > 0)
        )
