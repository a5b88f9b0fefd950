"""Weights in bf16 against weights in fp32: what SmolLM2-135M learns of this project's own pages at
a small learning rate.

    python benchmarks/rounding.py                # a quarter of an hour on one core
    python benchmarks/rounding.py --lr 1e-4

The arithmetic is in fp32 for all, so only the weights' type differs: after each of AdamW's updates
they are left alone, rounded to the nearest number that bf16 has, or rounded stochastically
(trainer.precision=bf16-mixed-true). Prints the mean loss of each pass over the same sequences.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ipt.models import load_model, load_tokenizer  # noqa: E402
from ipt.training.optim.arithmetic import round_stochastically  # noqa: E402

MODEL = "embedded:smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--passes", type=int, default=4)
    arguments = parser.parse_args()
    sequences = make_sequences(arguments.sequences, arguments.length)
    print(
        f"{MODEL}, lr {arguments.lr}, {arguments.sequences} sequences of {arguments.length} "
        "tokens, loss of each pass"
    )
    for rounding in ("none", "nearest", "stochastic"):
        losses = train(sequences, arguments.lr, arguments.passes, rounding)
        print(f"{rounding:<12}" + "".join(f"{loss:>8.4f}" for loss in losses), flush=True)


def make_sequences(count: int, length: int) -> Tensor:
    text = "\n".join(
        page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))
    )
    ids = torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])
    return ids[: count * (length + 1)].view(count, length + 1)


def train(sequences: Tensor, lr: float, passes: int, rounding: str) -> list[float]:
    model = load_model(MODEL, torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    noise = torch.Generator().manual_seed(0)
    means = []
    for _ in range(passes):
        total = 0.0
        for sequence in sequences:
            loss = cross_entropy(model(sequence[None, :-1]).logits[0], sequence[1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            round_weights(model, rounding, noise)
        means.append(total / len(sequences))
    return means


@torch.no_grad()
def round_weights(model: torch.nn.Module, rounding: str, noise: torch.Generator) -> None:
    for parameter in model.parameters():
        if rounding == "nearest":
            parameter.copy_(parameter.bfloat16())
        elif rounding == "stochastic":
            parameter.copy_(round_stochastically(parameter, noise))


if __name__ == "__main__":
    main()
