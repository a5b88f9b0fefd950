"""Figures of a plan for the table at the start of a run, the log and the summary."""

from typing import Any

import numpy as np

from ipt.mixture.packing import END, LENGTH, SOURCE, START
from ipt.mixture.plan import Plan

COUNTED = 2048  # cuts of a run of up to so many blocks are counted, those of a longer one estimated
SAMPLED = 64  # from so many of its blocks


def plan_report(plan: Plan) -> dict[str, Any]:
    """Figures of a plan. All are exact, except the three counts of splits if `exact_cuts` is false.

    `sources`, for each source:

    - `unique_tokens` and `documents` (after subsampling)
    - `requested` and `realised` share of the trained tokens; with unit=documents also the shares of
      documents
    - `tokens` and `repeats` (epochs)
    - `truncated` (pieces that end before their document), `split_documents` (documents read in
      several pieces) and `split_short_documents` (those that would have fit into a sequence)

    For the run: `packing`, `sequences`, `tokens`, `padding` (in tokens), `fill`, `notes` and, with
    a schedule, `course`: tokens of each source at each 1% of the run.
    """
    room, tokens = len(plan) * plan.seq_len, plan.read_until(plan.n_blocks)
    cuts, exact = _count_cuts(plan)
    sources = {}
    for number, (name, stream, requested) in enumerate(
        zip(plan.sources, plan.streams, plan.asked.mean(), strict=True)
    ):
        sources[name] = {
            "unique_tokens": stream.n_tokens,
            "documents": stream.n_documents,
            "requested": float(requested),
            "realised": int(tokens[number]) / plan.tokens,
            "tokens": int(tokens[number]),
            "repeats": int(tokens[number]) / stream.n_tokens,
            **{key: int(counts[number]) for key, counts in cuts.items()},
        }
    if plan.config.unit == "documents":
        _add_document_shares(plan, sources)
    return {
        "sources": sources,
        "packing": plan.config.packing,
        "sequences": len(plan),
        "tokens": plan.tokens,
        "padding": room - plan.tokens,
        "fill": plan.tokens / room,
        "exact_cuts": exact,
        "notes": plan.notes,
        "course": _course(plan) if plan.config.schedule else [],
    }


def _count_cuts(plan: Plan) -> tuple[dict[str, np.ndarray], bool]:
    """Splits of each source, and whether all blocks were counted or only evenly spaced ones."""
    exact = plan.n_blocks <= COUNTED
    blocks = (
        range(plan.n_blocks)
        if exact
        else np.linspace(0, plan.n_blocks - 1, SAMPLED).astype(int).tolist()
    )
    counts = np.zeros((3, len(plan.sources)), np.int64)
    for block in blocks:
        pieces = plan.block(block).pieces
        truncated = pieces[:, END] < pieces[:, LENGTH]
        split = truncated & (pieces[:, START] == 0)
        for row, chosen in enumerate(
            (truncated, split, split & (pieces[:, LENGTH] <= plan.seq_len))
        ):
            counts[row] += np.bincount(pieces[chosen, SOURCE], minlength=len(plan.sources))
    scaled = counts if exact else np.rint(counts * (plan.n_blocks / SAMPLED)).astype(np.int64)
    return dict(
        zip(("truncated", "split_documents", "split_short_documents"), scaled, strict=True)
    ), exact


def _add_document_shares(plan: Plan, sources: dict[str, dict[str, Any]]) -> None:
    means = np.array([stream.n_tokens / stream.n_documents for stream in plan.streams])
    for key in ("requested", "realised"):
        documents = np.array([row[key] for row in sources.values()]) / means
        for row, share in zip(sources.values(), documents / documents.sum(), strict=True):
            row[f"{key}_of_documents"] = float(share)


def _course(plan: Plan) -> list[dict[str, Any]]:
    moments = np.arange(1, 101)
    rows = plan.quotas.at(moments * plan.quotas.total // 100)
    return [
        {"at": percent / 100, "tokens": dict(zip(plan.sources, row, strict=True))}
        for percent, row in zip(moments.tolist(), rows.tolist(), strict=True)
    ]
