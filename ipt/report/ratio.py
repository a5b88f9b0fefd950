"""Which ratio? The runs of a report as points of a mixing law, if it is a ratio that they differ
in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipt.errors import UserError
from ipt.files import read_json
from ipt.report.formatting import listed
from ipt.report.mixing_law import MIN_RATIOS, Law, Point, fit_law
from ipt.report.scores import Arm, Measure, Run, Score, main_scores, measure_of
from ipt.stage import MANIFEST

CONFOUNDED = 1.1  # repeats of the pool at one ratio over those at another
SEEDS = ("trainer.seed", "seed")  # what may differ between runs of one ratio
BESIDE = (
    "mixture.schedule",
    "mixture.ratios",
    "mixture.subsample",
)  # the ratio itself, and what keeps its repeats equal


@dataclass(frozen=True)
class Panel:
    """One validation set: its runs, and the law if there is one."""

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
        """What the fit allows to say about the best ratio."""
        law = self.law
        if law is None:
            return "no fit"
        if law.is_flat:
            return "no ratio is shown to be better than another"
        if not law.edge:
            return f"best at {law.best:.2f} (95%: {self.best_interval})"
        beyond = "" if law.best in (0.0, 1.0) else "; the best may lie beyond"
        return (
            f"best at the {law.edge} ratio that was tried, {law.best:.2f} (95%: "
            f"{self.best_interval}){beyond}"
        )


@dataclass(frozen=True)
class RatioStudy:
    """What a report says of a ratio. Without `panels`, `notes` say why there are none."""

    source: str
    panels: list[Panel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ratio_study(runs: Sequence[Run], scores: list[Score], asked: bool = False) -> RatioStudy | None:
    """The law of each main measure; None where the runs do not differ in a ratio alone.

    With `asked` (a sweep over a ratio) what stands against a fit is said in place of None.
    """
    trained = [run for run in runs if run.is_trained and run.sources]
    source = _varying_source(trained)
    if source is None:
        return None
    against = _against(trained, source)
    if against:
        return RatioStudy(source, notes=[against]) if asked else None
    panels = [
        panel
        for panel in (_panel(name, trained, source) for name in main_scores(scores))
        if panel is not None
    ]
    return RatioStudy(source, panels, _repetition(trained, source), _notes(trained, panels))


def ratio_of(run: Run, source: str) -> float:
    """The requested share of a source in the trained tokens."""
    return float(run.sources.get(source, {}).get("requested") or 0.0)


def _varying_source(runs: Sequence[Run]) -> str | None:
    """The source whose share varies: `instruction` where that is one, else the first beside `raw`."""
    names = dict.fromkeys(name for run in runs for name in run.sources)
    varying = [name for name in names if len({round(ratio_of(run, name), 6) for run in runs}) > 1]
    return next(
        (name for name in ("instruction", *varying) if name in varying and name != "raw"),
        varying[0] if varying else None,
    )


def _against(runs: Sequence[Run], source: str) -> str:
    """Why no law can be fitted; empty if one can."""
    ratios = sorted({round(ratio_of(run, source), 6) for run in runs})
    if len(ratios) < MIN_RATIOS:
        tried = listed([f"{ratio:g}" for ratio in ratios])
        return (
            f"Ratios of {source} that were tried: {tried}. A law of three parameters needs "
            f"{MIN_RATIOS} different ones, so none is fitted."
        )
    manifests = [_manifest(arm) for run in runs for arm in run.arms]
    configs = [dict(_flat(manifest.get("config", {}))) for manifest in manifests]
    if any(len(config.get("mixture.schedule") or []) > 1 for config in configs):
        return (
            "Ratios change over the run (mixture.schedule), so there is no one ratio to fit a law "
            "against."
        )
    keys = dict.fromkeys(key for config in configs for key in config)
    others = [
        key
        for key in keys
        if len({repr(config.get(key)) for config in configs}) > 1
        and not key.startswith((*BESIDE, *SEEDS))
    ]
    inputs = _changed_inputs(runs) if not others else []
    if others or inputs:
        what = listed(others or [f"the data of {name}" for name in inputs])
        return f"The runs differ in more than the ratio of {source} ({what}), so no law is fitted."
    return ""


def _changed_inputs(runs: Sequence[Run]) -> list[str]:
    """Sources whose data are not the same in all runs that have them, seeds apart."""
    found: dict[str, dict[int, set[str]]] = {}
    for run in runs:
        for arm in run.arms:
            manifest = _manifest(arm)
            for name, digest in manifest.get("inputs", {}).items():
                found.setdefault(name, {}).setdefault(manifest.get("seed", 0), set()).add(digest)
    return [
        name
        for name, by_seed in found.items()
        if any(len(digests) > 1 for digests in by_seed.values())
    ]


def _panel(name: tuple[str, str], runs: Sequence[Run], source: str) -> Panel | None:
    """The points of a measure that has a direction, with the shares of items where all runs have
    answered the same ones.
    """
    task, metric = name
    arms = [(ratio_of(run, source), arm) for run in runs for arm in run.arms]
    points = _points(task, metric, arms)
    better = measure_of(metric).better
    if not points or not better:
        return None
    enough = len({point.ratio for point in points}) >= MIN_RATIOS
    return Panel(task, metric, points, fit_law(points, better) if enough else None)


def _points(task: str, metric: str, arms: Sequence[tuple[float, Arm]]) -> list[Point]:
    from ipt.evaluation.results import load_results, paired_metrics

    try:
        found = paired_metrics(task, [arm.evaluation for _, arm in arms])
        if all(metric in metrics for metrics in found):
            return [
                Point(round(ratio, 6), metrics[metric].value, metrics[metric].influence)
                for (ratio, _), metrics in zip(arms, found, strict=True)
            ]
    except (UserError, FileNotFoundError):  # seeds with items of their own, or no predictions
        pass
    entries = [
        (ratio, load_results(arm.evaluation).get(task, {}).get(metric, {}).get("value"))
        for ratio, arm in arms
    ]
    return [Point(round(ratio, 6), value) for ratio, value in entries if value is not None]


def _repetition(runs: Sequence[Run], source: str) -> list[str]:
    """A warning where the pool was read more often at one ratio than at another, and so more than
    the ratio was varied.
    """
    repeats = [
        repeats
        for run in runs
        if ratio_of(run, source) > 0 and (repeats := run.sources[source].get("repeats"))
    ]
    if not repeats or max(repeats) <= 1 or max(repeats) <= CONFOUNDED * min(repeats):
        return []
    if any(
        (_manifest(run.arm).get("config", {}).get("mixture") or {}).get("match_tokens")
        for run in runs
    ):
        return []  # as often as in the run that it stands for
    return [
        f"Repetition confounds this: {source} was read {min(repeats):.2f} times at one ratio and "
        f"{max(repeats):.2f} times at another. What "
        "looks like an effect of the ratio may be one of repetition. mixture.match_tokens=TOKENS "
        "makes each ratio repeat as often as in a "
        f"run of so many tokens; mixture.subsample.{source}=SHARE, in proportion to the ratio, "
        "makes all repeat alike."
    ]


def _notes(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    ratios = [ratio for panel in panels[:1] for ratio in (point.ratio for point in panel.points)]
    once = len(set(ratios)) == len(ratios)
    noise = (
        "what the law leaves over, as each ratio has one run"
        if once
        else "what runs of one ratio differ by"
    )
    items = all(point.influence is not None for panel in panels for point in panel.points)
    notes = [
        "Two laws of three parameters were tried, c + k exp(t r) and a parabola, and the one with "
        "the smaller error is shown.",
        f"Bands and intervals are 95%, by bootstrap: the noise of training is {noise}"
        + (
            "; items are resampled, the same for all runs."
            if items
            else "; items could not be resampled, as the runs answered different ones."
        ),
        "Nothing is said beyond the ratios that were tried, nor of other token budgets.",
    ]
    repeats = [
        run.sources[name].get("repeats") or 0.0
        for run in runs
        for name in run.sources
        if name != "raw"
    ]
    if repeats and max(repeats) <= 1:
        notes.append(
            "No token beside raw text was read twice here. If the full run repeats its pool, match "
            "that: mixture.match_tokens=TOKENS."
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
