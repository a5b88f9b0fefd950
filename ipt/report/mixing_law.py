"""The best mixture ratio: a simple law of a score as a function of the ratio of one source.

Two laws of three parameters are fitted, and the one with the smaller squared error is used:

    c + k exp(t r)      for losses against a proportion of the data
                        (data mixing laws, arXiv 2403.16952)
    c + a r + b r^2     for measures that are best between two proportions

Nothing is extrapolated beyond the ratios that were tried.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipt.errors import UserError
from ipt.evaluation.results import load_results, paired_metrics
from ipt.files import read_json
from ipt.report.formatting import listed, minus
from ipt.report.measures import Measure, measure_of
from ipt.report.scores import Arm, Run, Score, main_scores
from ipt.stage import MANIFEST
from ipt.sweeps.job import SEEDS

Floats = NDArray[np.float64]

MIN_RATIOS = 4  # distinct ones; three parameters fit any three exactly
SAMPLES = 1000  # of the bootstrap
GRID = 201  # ratios at which a law is drawn and its best one is searched
STEEPEST = 12.0  # |t| times the range of ratios; a steeper law is a step
RATES = 40  # values of t that are tried, of each sign

# A source whose repeats differ by more than this factor between ratios confounds the ratio.
CONFOUNDED = 1.1
# Config keys that may differ between the runs: the ratio, and what keeps the repeats equal.
MAY_VARY = ("mixture.schedule", "mixture.ratios", "mixture.subsample", *SEEDS)


# The law
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run: its ratio, its score, and each item's influence on the score.

    Influences have the same items in the same order in all runs; None: unknown.
    """

    ratio: float
    value: float
    influence: Floats | None = None


@dataclass(frozen=True)
class Law:
    """A fitted law with 95% bootstrap intervals.

    `p` is the probability that noise around a flat line gives a law with as wide a range.
    """

    formula: str
    ratios: Floats  # (GRID,)
    curve: Floats  # (GRID,)
    low: Floats  # (GRID,)
    high: Floats  # (GRID,)
    best: float
    best_low: float
    best_high: float
    at_best: float
    p: float

    @property
    def is_flat(self) -> bool:
        """Whether the runs show no effect of the ratio."""
        return self.p > 0.05

    @property
    def edge(self) -> str:
        """`lowest` or `highest` if the best ratio is at an end of the range, else empty."""
        if self.best == self.ratios[0]:
            return "lowest"
        return "highest" if self.best == self.ratios[-1] else ""


def fit_law(points: Sequence[Point], better: int, samples: int = SAMPLES, seed: int = 0) -> Law:
    """Fit the law to runs of at least MIN_RATIOS distinct ratios.

    `better` is 1 if higher scores are better, -1 if lower ones are. The bootstrap resamples items,
    the same ones for all runs, and draws training noise from a normal distribution. The variance of
    the noise is that between runs of the same ratio, or that of the residuals if each ratio has one
    run; in both cases without the variance due to items, and with the uncertainty of a variance
    estimated from few runs (chi-squared). Each sample chooses its own law.
    """
    ratios = np.array([point.ratio for point in points])
    values = np.array([point.value for point in points])
    assert len(set(ratios)) >= MIN_RATIOS and better in (-1, 1), (
        "a law needs four ratios and a direction"
    )
    laws = _Laws(ratios)
    chosen, (curve,) = laws.fit(values[None])
    residuals = laws.residual_maker(int(chosen[0]))
    noise = _noise(points, values, residuals, samples, np.random.default_rng(seed))
    _, curves = laws.fit(values + noise)
    best = int(np.argmax(better * curve))
    best_ratio = float(laws.grid[best])
    bests = laws.grid[np.argmax(better * curves, axis=1)]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    best_low, best_high = np.quantile(bests, [0.025, 0.975], method="closest_observation")
    return Law(
        formula=laws.formula(int(chosen[0]), values),
        ratios=laws.grid,
        curve=curve,
        low=low,
        high=high,
        best=best_ratio,
        best_low=min(float(best_low), best_ratio),
        best_high=max(float(best_high), best_ratio),
        at_best=float(curve[best]),
        p=_flatness(laws, curve, values, noise),
    )


class _Laws:
    """All candidate laws. For a given t each is a linear model, whose fit is one matrix product."""

    def __init__(self, ratios: Floats) -> None:
        self.low = float(ratios.min())
        width = float(np.ptp(ratios))
        self.grid = np.linspace(self.low, float(ratios.max()), GRID)
        rates = np.geomspace(0.2, STEEPEST, RATES) / width
        # None: the parabola
        self.rates: list[float | None] = [None, *(-rates).tolist(), *rates.tolist()]
        self.ratios = ratios
        self.solvers = [np.linalg.pinv(self._columns(rate, ratios)) for rate in self.rates]

    def fit(self, values: Floats) -> tuple[NDArray[np.intp], Floats]:
        """The best law of each row of `values` (samples, runs), and its curve (samples, GRID)."""
        errors = np.empty((len(self.rates), len(values)))
        for number, (rate, solver) in enumerate(zip(self.rates, self.solvers, strict=True)):
            fitted = values @ solver.T @ self._columns(rate, self.ratios).T
            errors[number] = ((values - fitted) ** 2).sum(1)
        chosen = errors.argmin(0)
        curves = np.empty((len(values), GRID))
        for number in set(chosen.tolist()):
            rows = chosen == number
            parameters = values[rows] @ self.solvers[number].T
            curves[rows] = parameters @ self._columns(self.rates[number], self.grid).T
        return chosen, curves

    def residual_maker(self, number: int) -> Floats:
        """The matrix (runs, runs) that gives the residuals of a law, to first order in t."""
        columns = self._columns(self.rates[number], self.ratios)
        if self.rates[number] is not None:
            columns = np.column_stack([columns, self.ratios * columns[:, 1]])  # derivative by t
        return np.eye(len(self.ratios)) - columns @ np.linalg.pinv(columns)

    def formula(self, number: int, values: Floats) -> str:
        """The law with its parameters, in the ratio r."""
        rate, parameters = self.rates[number], self.solvers[number] @ values
        if rate is None:
            constant, linear, square = parameters  # in r - low
            constant += square * self.low**2 - linear * self.low
            linear -= 2 * square * self.low
            return minus(f"{constant:.4g} {linear:+.4g}·r {square:+.4g}·r²")
        scale = parameters[1] * math.exp(-rate * self.low)
        return minus(f"{parameters[0]:.4g} {scale:+.4g}·exp({rate:.3g}·r)")

    def _columns(self, rate: float | None, ratios: Floats) -> Floats:
        """The design matrix for one t, in ratios counted from the lowest."""
        shifted = ratios - self.low
        if rate is None:
            return np.column_stack([np.ones_like(shifted), shifted, shifted**2])
        return np.column_stack([np.ones_like(shifted), np.exp(rate * shifted)])


def _noise(
    points: Sequence[Point],
    values: Floats,
    residual_maker: Floats,
    samples: int,
    random: np.random.Generator,
) -> Floats:
    """How the scores would differ with other items and other seeds: (samples, runs)."""
    known = [point.influence for point in points if point.influence is not None]
    influences = np.array(known) if len(known) == len(points) else np.zeros((len(points), 2))
    items = influences.shape[1]
    drawn = random.multinomial(items, np.full(items, 1 / items), size=samples) / items
    leave_mean = _within_ratios(np.array([point.ratio for point in points]))
    maker = leave_mean if leave_mean.any() else residual_maker
    freedom = max(1, round(float(np.trace(maker))))
    of_items = 0.0
    if items > 1:
        of_items = float(((maker @ influences) ** 2).sum()) / (items * (items - 1))
    variance = max(0.0, float(((maker @ values) ** 2).sum()) - of_items) / freedom
    spread = np.sqrt(variance * freedom / random.chisquare(freedom, size=(samples, 1)))
    return drawn @ influences.T + spread * random.standard_normal((samples, len(points)))


def _within_ratios(ratios: Floats) -> Floats:
    """The matrix (runs, runs) that subtracts from each run the mean of its ratio."""
    same = (ratios[:, None] == ratios[None, :]).astype(np.float64)
    return np.eye(len(ratios)) - same / same.sum(1, keepdims=True)


def _flatness(laws: _Laws, curve: Floats, values: Floats, noise: Floats) -> float:
    """The fraction of samples of pure noise whose law has as wide a range as this one."""
    width = float(np.ptp(curve))
    if width <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return 1.0
    _, curves = laws.fit(noise)
    return float((np.ptp(curves, axis=1) >= width).mean())


# The runs of a report
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One measure: its runs, and the law if there are enough ratios."""

    task: str
    metric: str
    points: list[Point]
    law: Law | None

    @property
    def measure(self) -> Measure:
        return measure_of(self.metric)

    @property
    def best_interval(self) -> str:
        return f"{self.law.best_low:.2f} to {self.law.best_high:.2f}" if self.law else ""

    @property
    def finding(self) -> str:
        law = self.law
        if law is None:
            return "no fit"
        if law.is_flat:
            return "no significant effect of the ratio"
        found = f"{law.best:.2f} (95% CI: {self.best_interval})"
        if not law.edge:
            return f"best at {found}"
        beyond = "" if law.best in (0.0, 1.0) else "; the optimum may lie outside the range"
        return f"best at the {law.edge} ratio tried, {found}{beyond}"


@dataclass(frozen=True)
class RatioStudy:
    """The section about the mixture ratio. Without `panels`, `notes` say why there are none."""

    source: str
    panels: list[Panel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ratio_study(
    runs: Sequence[Run], scores: Sequence[Score], required: bool = False
) -> RatioStudy | None:
    """The law of each main measure; None if the runs do not differ in exactly one ratio.

    With `required` (a sweep over a ratio), the study then says why no law is fitted.
    """
    trained = [run for run in runs if run.is_trained and run.sources]
    source = _varying_source(trained)
    if source is None:
        return None
    obstacle = _obstacle(trained, source)
    if obstacle:
        return RatioStudy(source, notes=[obstacle]) if required else None
    panels = [_panel(task, metric, trained, source) for task, metric in main_scores(scores)]
    found = [panel for panel in panels if panel is not None]
    return RatioStudy(source, found, _repetition(trained, source), _notes(trained, found))


def ratio_of(run: Run, source: str) -> float:
    """The requested fraction of a source in the trained tokens."""
    return float(run.sources.get(source, {}).get("requested") or 0.0)


def _varying_source(runs: Sequence[Run]) -> str | None:
    """The source whose ratio varies: `instruction` if it does, else the first other than `raw`."""
    varying = []
    for name in dict.fromkeys(name for run in runs for name in run.sources):
        if len({round(ratio_of(run, name), 6) for run in runs}) > 1:
            varying.append(name)
    if "instruction" in varying:
        return "instruction"
    others = [name for name in varying if name != "raw"]
    return next(iter(others + varying), None)


def _obstacle(runs: Sequence[Run], source: str) -> str:
    """Why no law can be fitted; empty if one can."""
    ratios = sorted({round(ratio_of(run, source), 6) for run in runs})
    if len(ratios) < MIN_RATIOS:
        tried = listed([f"{ratio:g}" for ratio in ratios])
        return (
            f"No law was fitted: it needs at least {MIN_RATIOS} different ratios of {source}, and "
            f"{tried} were tried."
        )
    manifests = [_manifest(arm) for run in runs for arm in run.arms]
    configs = [dict(_flat(manifest.get("config", {}))) for manifest in manifests]
    if any(len(config.get("mixture.schedule") or []) > 1 for config in configs):
        return "No law was fitted: ratios change during the run (mixture.schedule)."
    differ = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = {repr(config.get(key)) for config in configs}
        if len(values) > 1 and not key.startswith(MAY_VARY):
            differ.append(key)
    if not differ:
        differ = [f"the data of {name}" for name in _changed_inputs(manifests)]
    if differ:
        return (
            f"No law was fitted: the runs differ in more than the ratio of {source} "
            f"({listed(differ)})."
        )
    return ""


def _changed_inputs(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sources whose data differ between runs of the same seed."""
    found: dict[tuple[str, int], set[str]] = {}
    for manifest in manifests:
        for name, digest in manifest.get("inputs", {}).items():
            found.setdefault((name, manifest.get("seed", 0)), set()).add(digest)
    return list(dict.fromkeys(name for (name, _), digests in found.items() if len(digests) > 1))


def _panel(task: str, metric: str, runs: Sequence[Run], source: str) -> Panel | None:
    """None for a measure without values or without a direction."""
    arms = [(round(ratio_of(run, source), 6), arm) for run in runs for arm in run.arms]
    points = _points(task, metric, arms)
    better = measure_of(metric).better
    if not points or not better:
        return None
    enough = len({point.ratio for point in points}) >= MIN_RATIOS
    return Panel(task, metric, points, fit_law(points, better) if enough else None)


def _points(task: str, metric: str, arms: Sequence[tuple[float, Arm]]) -> list[Point]:
    """The points of all arms, with influences if all arms answered the same items."""
    points = []
    try:
        found = paired_metrics(task, [arm.evaluation for _, arm in arms])
        for (ratio, _), metrics in zip(arms, found, strict=True):
            points.append(Point(ratio, metrics[metric].value, metrics[metric].influence))
        return points
    except (UserError, FileNotFoundError, KeyError):  # other items for each seed, no predictions
        points.clear()
    for ratio, arm in arms:
        value = load_results(arm.evaluation).get(task, {}).get(metric, {}).get("value")
        if value is not None:
            points.append(Point(ratio, value))
    return points


def _repetition(runs: Sequence[Run], source: str) -> list[str]:
    """A warning if the source was repeated more often at one ratio than at another."""
    repeats = [run.sources[source].get("repeats") for run in runs if ratio_of(run, source) > 0]
    known = [number for number in repeats if number]
    if not known or max(known) <= max(1, CONFOUNDED * min(known)):
        return []
    for run in runs:
        mixture = _manifest(run.arms[0]).get("config", {}).get("mixture") or {}
        if mixture.get("match_tokens"):  # repeats are those of the full run
            return []
    return [
        f"Repetition confounds these results. {source} was read {min(known):.2f} times at one "
        f"ratio and {max(known):.2f} times at another, so an apparent effect of the ratio may be "
        "an effect of repetition. Set mixture.match_tokens to the token budget of the full run, or "
        f"set mixture.subsample.{source} in proportion to the ratio."
    ]


def _notes(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    ratios = [point.ratio for panel in panels[:1] for point in panel.points]
    noise = "between runs of the same ratio"
    if len(set(ratios)) == len(ratios):
        noise = "of the residuals, because each ratio has one run"
    items = "Items are resampled, the same ones for all runs."
    if any(point.influence is None for panel in panels for point in panel.points):
        items = "Items could not be resampled, because the runs answered different ones."
    notes = [
        "Two laws with three parameters are fitted, c + k exp(t r) and a parabola. The one with "
        "the smaller error is shown.",
        "Bands and intervals are 95% bootstrap intervals. The variance of training noise is that "
        f"{noise}. {items}",
        "The laws hold for the ratios that were tried and for this token budget only.",
    ]
    repeats = []
    for run in runs:
        for name, row in run.sources.items():
            if name != "raw":
                repeats.append(row.get("repeats") or 0.0)
    if repeats and max(repeats) <= 1:
        notes.append(
            "No tokens other than raw text were repeated. If the full run repeats them, set "
            "mixture.match_tokens to its token budget."
        )
    return notes


def _manifest(arm: Arm) -> dict[str, Any]:
    path = (arm.training or Path()) / MANIFEST
    return read_json(path) if path.exists() else {}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
