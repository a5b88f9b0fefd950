"""Projection to the vocabulary and cross-entropy: this project's chunked operation against torch's,
the plain way, and Liger's.

    python benchmarks/loss.py
    python benchmarks/loss.py --tokens 8192 --width 4096 --vocabulary 128256 --device cuda

The first command uses 2,048 tokens and the shape of SmolLM2-135M, in fp32 and bf16; the second one
uses the shape of Llama-3-8B.

For each: seconds of a forward and a backward pass (the median of several, alternating), memory that
they take beyond their inputs, and what is off in the loss (nats/token) and in the gradients (share
of their norm) against the same numbers computed in fp64. Operands in bf16 are rounded before, so
that only the operation's own error is seen. Liger's kernels need a GPU and the package
liger-kernel, torch's operation torch 2.13.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import Comparison, add_json_option, alternate, clocked, named, report  # noqa: E402
from ipt.training.loss import chunked_cross_entropy  # noqa: E402

PAGE = 4096  # bytes: the least that resident memory grows by
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Measured(NamedTuple):
    name: str
    seconds: list[float]  # of each pass
    memory: int  # bytes beyond the inputs
    off: list[float]  # loss, gradient of the hidden states, gradient of the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--chunk", type=int, default=1024, help="trainer.loss_chunk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    report(
        [row for dtype in (torch.float32, torch.bfloat16) for row in compare(arguments, dtype)],
        arguments.json,
    )


def compare(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[Comparison]:
    """Time and memory of ours against each other one's."""
    measured = {one.name: one for one in measure(arguments, dtype)}
    ours = measured.pop("ours")
    what = (
        f"{str(dtype).removeprefix('torch.')}, {arguments.tokens} x {arguments.width} x "
        f"{arguments.vocabulary}, {arguments.device}"
    )
    for name, theirs in measured.items():
        peer = named(name, "liger-kernel" if name == "liger" else "torch")
        note = f"off in loss, hidden and weight: {shown_errors(ours)}; peer {shown_errors(theirs)}"
        yield Comparison(
            what, "s", ours.seconds, peer, theirs.seconds, less_is_better=True, note=note
        )
        yield Comparison(
            what, "MiB", [ours.memory / 2**20], peer, [theirs.memory / 2**20], less_is_better=True
        )
    if "liger" not in measured:
        yield Comparison(what, peer="liger", missing="it needs a GPU and the package liger-kernel")


def shown_errors(measured: Measured) -> str:
    return ", ".join(f"{one:.1e}" for one in measured.off)


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[Measured]:
    operands = make_operands(arguments, dtype)
    exact = exact_loss_and_gradients(*operands)
    losses = competitors(arguments)
    seconds = alternate(
        {name: clocked(partial(run, loss, operands)) for name, loss in losses.items()},
        arguments.repeats,
        warm_up=1,
    )
    for name, loss in losses.items():
        yield Measured(
            name, seconds[name], peak_memory(loss, operands), errors(loss, operands, exact)
        )


def competitors(arguments: argparse.Namespace) -> dict[str, Loss]:
    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy((hidden @ weight.T).float(), labels)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, weight, labels, 1 / len(labels), arguments.chunk)[0]

    losses: dict[str, Loss] = {"plain": plain, "ours": ours}
    if hasattr(functional, "linear_cross_entropy"):
        losses |= torchs(arguments.chunk)
    if find_spec("liger_kernel") and arguments.device == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        losses["liger"] = lambda hidden, weight, labels: liger_fused_linear_cross_entropy(
            hidden, weight, labels
        )
    return losses


def torchs(chunk: int) -> dict[str, Loss]:
    from torch.nn import LinearCrossEntropyOptions

    def with_options(options: LinearCrossEntropyOptions) -> Loss:
        return lambda hidden, weight, labels: functional.linear_cross_entropy(
            hidden, weight, labels, options=options
        )

    return {
        "torch auto": with_options(LinearCrossEntropyOptions()),
        "torch accurate": with_options(
            LinearCrossEntropyOptions(
                acc_policy="accurate", chunking_method=None, batch_chunk_size=chunk
            )
        ),
    }


def make_operands(
    arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a table of about the sizes that trained models have, and labels that are
    often right.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.width, generator=generator)
    weight = (
        torch.randn(arguments.vocabulary, arguments.width, generator=generator)
        / arguments.width**0.5
    )
    labels = torch.randint(0, arguments.vocabulary, (arguments.tokens,), generator=generator)
    hidden[::2] += 4 * weight[labels[::2]]
    return (
        hidden.to(arguments.device, dtype),
        weight.to(arguments.device, dtype),
        labels.to(arguments.device),
    )


def exact_loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64, a few rows at a time."""
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(labels), 128):
        rows = slice(start, start + 128)
        loss = cross_entropy(leaves[0][rows] @ leaves[1].T, labels[rows], reduction="sum") / len(
            labels
        )
        loss.backward()
        total += loss.detach()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return total, leaves[0].grad, leaves[1].grad


def run(loss: Loss, operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = operands[0].detach().requires_grad_(), operands[1].detach().requires_grad_()
    value = loss(hidden, weight, operands[2])
    value.backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    assert hidden.grad is not None and weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


def peak_memory(loss: Loss, operands: tuple[Tensor, Tensor, Tensor]) -> int:
    if operands[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, operands)
        return torch.cuda.max_memory_allocated() - before
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(loss, operands)
    done.set()
    watcher.join()
    return max(PAGE, most[0] - before)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE


def errors(
    loss: Loss, operands: tuple[Tensor, Tensor, Tensor], exact: tuple[Tensor, Tensor, Tensor]
) -> list[float]:
    value, *gradients = run(loss, operands)
    shares = [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(gradients, exact[1:], strict=True)
    ]
    return [abs(float(value.double() - exact[0])), *shares]


if __name__ == "__main__":
    main()
