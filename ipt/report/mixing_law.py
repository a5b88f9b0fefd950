"""Which ratio? A simple law of a score against the ratio of one source, the ratio that it says is
best, and how sure that is.

Two laws of three parameters are tried, and the one with the smaller squared error is taken:

    c + k exp(t r)      losses of a validation set against a proportion of the data
                        (data mixing laws, arXiv 2403.16952)
    c + a r + b r^2     measures whose best value lies between two proportions

Nothing is said beyond the ratios that were tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_RATIOS = 4  # distinct ones; three parameters go through any three
SAMPLES = 1000  # of the bootstrap
GRID = 201  # ratios at which a law is drawn and its best one looked for
STEEPEST = 12.0  # |t| times the width of what was tried: beyond it a law is a step
RATES = 40  # values of t that are tried, of each sign


@dataclass(frozen=True)
class Point:
    """One run: the ratio, its score, and what each item adds to the score (items in the same order
    in all runs; None: not known).
    """

    ratio: float
    value: float
    influence: Floats | None = None


@dataclass(frozen=True)
class Law:
    """A fitted law; intervals are 95%, by bootstrap. `p`: how often noise alone would bend a flat
    line as far.
    """

    formula: str
    ratios: Floats  # (GRID,)
    curve: Floats
    low: Floats
    high: Floats
    best: float
    best_low: float
    best_high: float
    at_best: float
    p: float

    @property
    def is_flat(self) -> bool:
        """Whether the runs do not show that the ratio matters at all."""
        return self.p > 0.05

    @property
    def edge(self) -> str:
        """`lowest` or `highest` where the best ratio is at an end of what was tried, else empty."""
        return {self.ratios[0]: "lowest", self.ratios[-1]: "highest"}.get(np.float64(self.best), "")


def fit_law(points: Sequence[Point], better: int, samples: int = SAMPLES, seed: int = 0) -> Law:
    """The law of these runs and its best ratio; `better`: 1 where higher is better, -1 where lower
    is.

    The bootstrap resamples the items, the same for all runs, and draws the noise of training as
    normal. Its variance is what runs of one ratio differ by, or where each ratio has one run, what
    the law leaves over; in both cases without the items' part, and with the uncertainty of a
    variance from so few runs (as Student's t has it). The choice between the laws is made anew in
    each sample. `points` must have MIN_RATIOS distinct ratios, and `better` a direction.
    """
    ratios = np.array([point.ratio for point in points])
    values = np.array([point.value for point in points])
    assert len(set(ratios)) >= MIN_RATIOS and better in (-1, 1), (
        "a law needs four ratios and a direction"
    )
    laws = _Laws(ratios)
    chosen, (curve,) = laws.fit(values[None])
    noise = _noise(
        points, values, laws.residual_maker(int(chosen[0])), samples, np.random.default_rng(seed)
    )
    _, curves = laws.fit(values + noise)
    best = int(np.argmax(better * curve))
    bests = laws.grid[np.argmax(better * curves, axis=1)]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    best_low, best_high = (
        float(bound) for bound in np.quantile(bests, [0.025, 0.975], method="closest_observation")
    )
    return Law(
        formula=laws.formula(int(chosen[0]), values),
        ratios=laws.grid,
        curve=curve,
        low=low,
        high=high,
        best=float(laws.grid[best]),
        best_low=min(best_low, float(laws.grid[best])),
        best_high=max(best_high, float(laws.grid[best])),
        at_best=float(curve[best]),
        p=_flatness(laws, curve, values, noise),
    )


class _Laws:
    """All candidate laws at the ratios of the runs: for a given t each is a linear model, whose fit
    is one matrix.
    """

    def __init__(self, ratios: Floats) -> None:
        self.low, self.width = float(ratios.min()), float(np.ptp(ratios))
        self.grid = np.linspace(self.low, float(ratios.max()), GRID)
        rates = np.geomspace(0.2, STEEPEST, RATES) / self.width
        self.rates: list[float | None] = [
            None,
            *(-rates).tolist(),
            *rates.tolist(),
        ]  # None: the quadratic
        self.ratios = ratios
        self.solvers = [np.linalg.pinv(self._columns(rate, ratios)) for rate in self.rates]

    def fit(self, values: Floats) -> tuple[NDArray[np.intp], Floats]:
        """Of each row of `values` (samples, runs) the law that fits best, and its curve (samples,
        GRID).
        """
        errors = np.empty((len(self.rates), len(values)))
        for number, (rate, solver) in enumerate(zip(self.rates, self.solvers, strict=True)):
            errors[number] = (
                (values - values @ solver.T @ self._columns(rate, self.ratios).T) ** 2
            ).sum(1)
        chosen = errors.argmin(0)
        curves = np.empty((len(values), GRID))
        for number in set(chosen.tolist()):
            rows = chosen == number
            curves[rows] = (
                values[rows]
                @ self.solvers[number].T
                @ self._columns(self.rates[number], self.grid).T
            )
        return chosen, curves

    def residual_maker(self, number: int) -> Floats:
        """What a law's three parameters leave of the runs, to first order: (runs, runs), symmetric
        and idempotent.
        """
        columns = self._columns(self.rates[number], self.ratios)
        if self.rates[number] is not None:
            columns = np.column_stack([columns, self.ratios * columns[:, 1]])  # the derivative by t
        return np.eye(len(self.ratios)) - columns @ np.linalg.pinv(columns)

    def formula(self, number: int, values: Floats) -> str:
        """The law with its parameters, in the ratio r."""
        rate, parameters = self.rates[number], self.solvers[number] @ values
        if rate is None:
            constant, linear, square = self._centred(parameters)
            return f"{constant:.4g} {linear:+.4g}·r {square:+.4g}·r²".replace("-", "−")
        scale = parameters[1] * math.exp(-rate * self.low)
        return f"{parameters[0]:.4g} {scale:+.4g}·exp({rate:.3g}·r)".replace("-", "−")

    def _columns(self, rate: float | None, ratios: Floats) -> Floats:
        """The linear model for one t, in ratios counted from the lowest."""
        shifted = ratios - self.low
        if rate is None:
            return np.column_stack([np.ones_like(shifted), shifted, shifted**2])
        return np.column_stack([np.ones_like(shifted), np.exp(rate * shifted)])

    def _centred(self, parameters: Floats) -> tuple[float, float, float]:
        constant, linear, square = (float(parameter) for parameter in parameters)
        return (
            constant - linear * self.low + square * self.low**2,
            linear - 2 * square * self.low,
            square,
        )


def _noise(
    points: Sequence[Point],
    values: Floats,
    residual_maker: Floats,
    samples: int,
    random: np.random.Generator,
) -> Floats:
    """How the scores would have differed with other items and other seeds: (samples, runs)."""
    known = [point.influence for point in points if point.influence is not None]
    influences = np.array(known) if len(known) == len(points) else np.zeros((len(points), 2))
    items = influences.shape[1]
    drawn = random.multinomial(items, np.full(items, 1 / items), size=samples) / items
    leave_mean = _within_ratios(np.array([point.ratio for point in points]))
    maker = leave_mean if leave_mean.any() else residual_maker
    freedom = max(1, round(float(np.trace(maker))))
    of_items = (
        float(((maker @ influences) ** 2).sum()) / (items * (items - 1)) if items > 1 else 0.0
    )
    variance = max(0.0, float(((maker @ values) ** 2).sum()) - of_items) / freedom
    spread = np.sqrt(variance * freedom / random.chisquare(freedom, size=(samples, 1)))
    return drawn @ influences.T + spread * random.standard_normal((samples, len(points)))


def _within_ratios(ratios: Floats) -> Floats:
    """Takes the mean of its ratio's runs from each run: (runs, runs); zero where each ratio has one
    run.
    """
    same = (ratios[:, None] == ratios[None, :]).astype(np.float64)
    return np.eye(len(ratios)) - same / same.sum(1, keepdims=True)


def _flatness(laws: _Laws, curve: Floats, values: Floats, noise: Floats) -> float:
    """Share of samples of pure noise whose law has as wide a range as this one."""
    range_ = float(np.ptp(curve))
    if range_ <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return 1.0
    _, curves = laws.fit(noise)
    return float((np.ptp(curves, axis=1) >= range_).mean())
