"""Projection and loss at Llama-3-8B's shape, chunked, plain, torch's and Liger's, against fp64; and
what the size of a chunk costs.
"""

import argparse

import torch

from benchmarks.gpu.piece import Piece, run
from benchmarks.loss import measure as measure_losses
from ipt.training.loss import chunked_cross_entropy

# Of ours, in nats/token for the loss and as a share of the norm for gradients, which in bf16 are
# themselves rounded to 8 bits.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 1e-2)}


def measure(piece: Piece) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        if piece.reach(f"all of them in {name}", 60):
            for row in measure_losses(shape(piece), dtype):
                figures = {
                    "ms": 1000 * min(row.seconds),
                    "GiB beside the inputs": row.memory / 2**30,
                }
                off = dict(zip(("loss off", "hidden off", "weight off"), row.off, strict=True))
                piece.row(
                    "Forward and backward pass",
                    {"operation": row.name, "operands": name} | figures | off,
                )
                if row.name == "ours":
                    piece.check(
                        f"{name}: loss of ours against fp64, nats/token",
                        row.off[0],
                        LIMITS[dtype][0],
                    )
                    piece.check(
                        f"{name}: gradients of ours against fp64",
                        max(row.off[1:]),
                        LIMITS[dtype][1],
                    )
    equal_chunks(piece)


def shape(piece: Piece) -> argparse.Namespace:
    sizes = (256, 32, 512, 64) if piece.smoke else (8192, 4096, 128256, 1024)
    return argparse.Namespace(
        **dict(zip(("tokens", "width", "vocabulary", "chunk"), sizes, strict=True)),
        device=str(piece.device),
        repeats=5,
    )


def equal_chunks(piece: Piece) -> None:
    """One loss in bf16 by chunks of several sizes, one of which does not divide the tokens: no size
    changes it.
    """
    sizes = shape(piece)
    generator = torch.Generator(piece.device).manual_seed(0)
    hidden, weight = (
        torch.randn(
            rows, sizes.width, generator=generator, device=piece.device, dtype=torch.bfloat16
        )
        for rows in (sizes.tokens, sizes.vocabulary)
    )
    labels = torch.randint(
        0, sizes.vocabulary, (sizes.tokens,), generator=generator, device=piece.device
    )
    expected, _ = chunked_cross_entropy(
        hidden, weight / sizes.width**0.5, labels, 1 / sizes.tokens, sizes.tokens
    )
    for chunk in (sizes.chunk // 2 + 1, sizes.chunk, 2 * sizes.chunk):
        found, _ = chunked_cross_entropy(
            hidden, weight / sizes.width**0.5, labels, 1 / sizes.tokens, chunk
        )
        piece.check(
            f"chunks of {chunk} tokens against one, nats/token", abs(float(found - expected)), 1e-5
        )


if __name__ == "__main__":
    run("loss", measure)
