"""Token proportions of the sources at every moment of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ipt.config import MixtureConfig, check_choices
from ipt.errors import UserError


class Point(NamedTuple):
    """The proportions from `at` (0 to 1 of the run) on, or at that moment if proportions are
    interpolated.
    """

    at: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class Schedule:
    """Proportions of `sources` over a run: `shares` [points, sources] with rows that sum to 1, from
    or at the moments `at` [points].

    The first point also applies before its moment, the last one after it.
    """

    sources: list[str]
    at: np.ndarray
    shares: np.ndarray
    linear: bool

    def integral(self, moments: np.ndarray) -> np.ndarray:
        """Fraction of the run's tokens that each source has contributed: [moments] (0 to 1 or
        slightly more) -> [moments, sources].
        """
        starts, values, slopes = self._segments()
        spans = np.diff(starts)[:, None]
        reached = np.concatenate(
            [
                np.zeros((1, len(self.sources))),
                np.cumsum(spans * (values[:-1] + slopes[:-1] * spans / 2), axis=0),
            ]
        )
        moments = np.maximum(moments, 0.0)
        segment = np.searchsorted(starts, moments, side="right") - 1
        since = (moments - starts[segment])[:, None]
        return reached[segment] + since * (values[segment] + slopes[segment] * since / 2)

    def mean(self) -> np.ndarray:
        """Share of each source over the whole run: [sources]."""
        return self.integral(np.ones(1))[0]

    def with_shares(self, shares: np.ndarray) -> "Schedule":
        return Schedule(
            self.sources, self.at, shares / shares.sum(axis=1, keepdims=True), self.linear
        )

    def _segments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments [n] at which something changes, the proportions there and their slopes after them
        [n, sources].
        """
        slopes = np.zeros_like(self.shares)
        if self.linear:
            slopes[:-1] = np.diff(self.shares, axis=0) / np.diff(self.at)[:, None]
        if self.at[0] == 0:
            return self.at, self.shares, slopes
        first = self.shares[:1]
        return (
            np.concatenate([[0.0], self.at]),
            np.concatenate([first, self.shares]),
            np.concatenate([np.zeros_like(first), slopes]),
        )


def read_schedule(config: MixtureConfig) -> Schedule:
    """The schedule of `mixture.schedule` if set, else of `mixture.ratios`, in the unit of the
    config.
    """
    points = schedule_points(config)
    names = list(points[0].ratios)
    return Schedule(
        names,
        np.array([point.at for point in points]),
        np.array([[point.ratios[name] for name in names] for point in points]),
        config.interpolation == "linear",
    )


def used_sources(config: MixtureConfig) -> list[str]:
    """Names of the sources with a share at any moment of the run. Raises UserError as
    `schedule_points` does.
    """
    return list(schedule_points(config)[0].ratios)


def schedule_points(config: MixtureConfig) -> list[Point]:
    """Points with the resolved ratios of all used sources, sorted by time. Constant ratios are one
    point.

    Raises UserError for ratios that cannot be resolved, for moments outside 0 to 1 or out of order,
    and for an invalid choice (`mixture.unit`, `packing`, `interpolation`, `on_max_repeats`).
    """
    _check_choices(config)
    if not config.schedule:
        points = [Point(0.0, resolve_ratios(config.ratios))]
    else:
        points = [
            Point(point.at, resolve_ratios(point.ratios, f"mixture.schedule[{number}].ratios"))
            for number, point in enumerate(config.schedule)
        ]
    _check_order([point.at for point in points])
    used = dict.fromkeys(
        name for point in points for name, ratio in point.ratios.items() if ratio > 0
    )
    return [
        Point(point.at, {name: point.ratios.get(name, 0.0) for name in used}) for point in points
    ]


def resolve_ratios(
    ratios: Mapping[str, float | None], key: str = "mixture.ratios"
) -> dict[str, float]:
    """Proportions that sum to 1. A null ratio takes the remainder to 1; without one, ratios are
    weights and are normalised.

    Raises UserError for a negative ratio, for several nulls, and if nothing is left to train on.
    """
    for name, ratio in ratios.items():
        if ratio is not None and not ratio >= 0:
            raise UserError(f"{key}.{name}={ratio}: a ratio must be zero or more")
    rest = [name for name, ratio in ratios.items() if ratio is None]
    if len(rest) > 1:
        raise UserError(
            f"{key}: only one source can take the rest (null), these do: {', '.join(rest)}"
        )
    given = sum(ratio for ratio in ratios.values() if ratio is not None)
    shares = {
        name: max(0.0, 1.0 - given) if ratio is None else float(ratio)
        for name, ratio in ratios.items()
    }
    total = sum(shares.values())
    if not 0 < total < float("inf"):
        given_as = ", ".join(f"{name}={ratio}" for name, ratio in ratios.items())
        raise UserError(f"{key} sum to {total:g} ({given_as}): at least one must be above zero")
    return {name: share / total for name, share in shares.items()}


def _check_choices(config: MixtureConfig) -> None:
    check_choices(config, "mixture.")
    for name, share in config.subsample.items():
        if not 0 < share <= 1:
            raise UserError(f"mixture.subsample.{name}={share}: must be above 0 and at most 1")
    if config.match_tokens is not None and config.match_tokens < 1:
        raise UserError(
            f"mixture.match_tokens={config.match_tokens}: must be at least 1, the tokens of the "
            "longer run"
        )
    if config.match_tokens is not None and config.subsample:
        name = next(iter(config.subsample))
        raise UserError(
            f"mixture.match_tokens={config.match_tokens} and "
            f"mixture.subsample.{name}={config.subsample[name]}: "
            f"both say how much of source {name} is used, give one of them"
        )


def _check_order(moments: Sequence[float]) -> None:
    for number, moment in enumerate(moments):
        if not 0 <= moment <= 1:
            raise UserError(
                f"mixture.schedule[{number}].at={moment}: must be a share of the run, from 0 to 1"
            )
        if number and moment <= moments[number - 1]:
            raise UserError(
                f"mixture.schedule[{number}].at={moment}: must come after the point before it, at "
                f"{moments[number - 1]}"
            )
