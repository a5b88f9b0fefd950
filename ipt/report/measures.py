"""Names, units and directions of metrics, and the main metrics of a task."""

from collections.abc import Iterable
from dataclasses import dataclass

from ipt.report.formatting import minus, spaced


@dataclass(frozen=True)
class Measure:
    """How a metric is named and formatted."""

    label: str
    better: int = 0  # 1: higher is better, -1: lower is better, 0: unknown
    percent: bool = False
    unit: str = ""
    detail: str = ""
    short: str = ""  # name in narrow tables, if not the label

    @property
    def direction(self) -> str:
        return {1: "higher is better", -1: "lower is better", 0: ""}[self.better]

    def show(self, value: float | None, signed: bool = False) -> str:
        """The value as text: 40.0%, −3.061. With `signed` a difference: +4.0 (in points)."""
        if value is None:
            return "–"
        if self.percent:
            return _decimals(value * 100, 1, signed) + ("" if signed else "%")
        return _decimals(value, 3 if abs(value) < 100 else 1, signed)


def _decimals(value: float, decimals: int, signed: bool) -> str:
    rounded = round(value, decimals) + 0.0  # -0.0 + 0.0 is 0.0
    sign = "+" if signed and rounded else ""
    return minus(f"{rounded:{sign},.{decimals}f}")


MEASURES = {
    "correct": Measure("score", 1, percent=True, detail="accuracy or F1, depending on the task"),
    "paper": Measure("score, paper's metric", 1, percent=True, short="paper's score"),
    "accuracy": Measure("accuracy", 1, percent=True),
    "accuracy_sum": Measure(
        "accuracy (sum)", 1, percent=True, detail="options ranked by total log-probability"
    ),
    "accuracy_bytes": Measure(
        "accuracy (bytes)", 1, percent=True, detail="options ranked by log-probability per byte"
    ),
    "logprob": Measure(
        "log-probability",
        1,
        unit="nats per token",
        detail="of the correct answer",
        short="logprob",
    ),
    "probability": Measure("probability", 1, percent=True, detail="of the correct answer"),
    "bits_per_byte": Measure("bits per byte", -1, short="bits/byte"),
    "nll": Measure("negative log-likelihood", -1, unit="nats per token", short="NLL"),
    "perplexity": Measure("perplexity", -1, short="ppl"),
    "contaminated": Measure("contaminated", percent=True, detail="items found in training data"),
}
# Metrics whose names contain one of these words are taken to be of this kind.
SIMILAR = (
    (("accuracy", "exact_match", "f1", "correct", "paper"), 1, True),
    (("log_prob", "logprob", "log_likelihood"), 1, False),
    (("perplexity", "bits_per", "nll", "loss"), -1, False),
)
# The main measures of a task: from each line the first metric that the task has. A task without
# any of these is represented by the first of MAIN_TEXT_METRICS.
MAIN_ANSWER_METRICS = (("correct", "accuracy", "exact_match", "f1"), ("logprob", "probability"))
MAIN_TEXT_METRICS = ("bits_per_byte", "nll", "perplexity")


def measure_of(metric: str) -> Measure:
    """The measure of a metric; one that is not in MEASURES is classified by its name."""
    if metric in MEASURES:
        return MEASURES[metric]
    for words, better, percent in SIMILAR:
        if any(word in metric for word in words):
            return Measure(spaced(metric), better, percent)
    return Measure(spaced(metric))


def main_metrics(metrics: Iterable[str]) -> list[str]:
    present = set(metrics)
    chosen = []
    for names in MAIN_ANSWER_METRICS:
        chosen += [name for name in names if name in present][:1]
    if chosen:
        return chosen
    known = [name for name in MAIN_TEXT_METRICS if name in present]
    return (known or sorted(present))[:1]
