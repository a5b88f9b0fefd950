"""Every attention that this machine has, at Llama-3-8B's shape on packed documents: against the
fp32 sdpa with a block mask, and time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import allow_older_torch
from benchmarks.gpu.jobs import lengths
from benchmarks.gpu.piece import Piece, apart, milliseconds, run
from ipt.config import Config, TrainerConfig
from ipt.training.attention import cu_seqlens_kwargs, resolve_attention, takes_cu_seqlens
from ipt.training.model import build_model

NAMES = ("sdpa", "packed", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
LIMIT = 1e-2  # norm of the error in bf16 as a share of the norm; rounding alone gives 2e-3 to 5e-3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """One row of documents: heads, and the window of tokens that each sees (None: its whole
    document).
    """

    sizes: list[int]
    heads: int
    key_heads: int
    head_size: int
    window: int | None

    @property
    def length(self) -> int:
        return sum(self.sizes)


def measure(piece: Piece) -> None:
    allow_older_torch()
    shape = (4, 2, 32) if piece.smoke else (32, 8, 128)
    for seq_len in (96, 160) if piece.smoke else (4096, 8192):
        for window in (None, seq_len // 8):
            sizes = lengths(seq_len, mean=seq_len // 5, seed=seq_len)
            assert len(sizes) > 2
            compare(piece, Case(sizes, *shape, window))
        compare(piece, Case([seq_len], *shape, None))


def compare(piece: Piece, case: Case) -> None:
    generator = torch.Generator(piece.device).manual_seed(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    *operands, grad = (
        torch.randn(1, count, case.length, case.head_size, generator=generator, device=piece.device)
        for count in heads
    )
    operands, grad = [operand.bfloat16() for operand in operands], grad.bfloat16().transpose(1, 2)
    mask = block_mask(case, piece.device)
    exact = partial(masked, mask=mask)
    expected = outputs_and_gradients(exact, [operand.float() for operand in operands], grad.float())
    for name in NAMES:
        what = f"{name}, {case.length} tokens, {len(case.sizes)} documents" + (
            f", window {case.window}" if case.window else ""
        )
        try:
            attend = attention(name, case, mask, piece)
        except ValueError as error:
            if f"not here: {error}" not in piece.notes:
                piece.note(f"not here: {error}")
            continue
        if piece.reach(what, 15):
            show(piece, what, case, attend, operands, grad, expected)


def show(
    piece: Piece,
    what: str,
    case: Case,
    attend: Attend,
    operands: list[Tensor],
    grad: Tensor,
    expected: list[Tensor],
) -> None:
    found = outputs_and_gradients(attend, operands, grad)
    off = dict(zip(("output", "query", "key", "value"), map(apart, found, expected), strict=True))
    forward = milliseconds(lambda: attend(*operands), piece.device)
    both = milliseconds(lambda: outputs_and_gradients(attend, operands, grad), piece.device)
    name, *_ = what.split(",")
    cells: dict[str, Any] = {
        "attention": name,
        "tokens": case.length,
        "documents": len(case.sizes),
        "window": case.window,
    }
    cells |= {
        "forward ms": forward,
        "forward and backward ms": both,
        "TFLOP/s": 3 * flops(case) / both / 1e9,
    }
    piece.row("Kernels in bf16", cells | {f"{part} off": value for part, value in off.items()})
    piece.check(what, max(off.values()), LIMIT)
    if len(case.sizes) > 1:
        piece.check(
            f"{name}: numbers that change when another document does",
            leaked(attend, case, operands),
            0,
        )


def attention(name: str, case: Case, mask: Tensor, piece: Piece) -> Attend:
    """What a model calls, with what a model gives it. Raises ValueError, saying why, for one that
    this machine has not.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    trainer = TrainerConfig(
        accelerator="cpu" if piece.smoke else "gpu",
        precision="bf16-true",
        attn_implementation=name,
    )
    resolve_attention(trainer)
    width = case.heads * case.head_size
    architecture = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    architecture |= {"num_attention_heads": case.heads, "num_key_value_heads": case.key_heads}
    module = (
        build_model(Config(architecture=architecture, trainer=trainer))
        .to(piece.device)
        .model.layers[0]
        .self_attn
    )
    implementation = module.config._attn_implementation
    options: dict[str, Any] = {"attention_mask": mask}
    if takes_cu_seqlens(implementation):
        starts = torch.tensor([0, *case.sizes], device=piece.device).cumsum(0, dtype=torch.int32)
        batch = {"document_sizes": case.sizes, "cu_seq_lens": starts, "max_length": max(case.sizes)}
        options = {
            "attention_mask": None,
            "sliding_window": case.window,
            **cu_seqlens_kwargs(batch, implementation),
        }
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    return lambda *operands: function(
        module, *operands, scaling=module.scaling, dropout=0.0, **options
    )[0]


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)


def block_mask(case: Case, device: torch.device) -> Tensor:
    """True [1, 1, T, T] where a token is seen: of the same document, not later, and within the
    window.
    """
    document = torch.repeat_interleave(
        torch.arange(len(case.sizes), device=device), torch.tensor(case.sizes, device=device)
    )
    place = torch.arange(case.length, device=device)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0)
    return (seen & (distance < (case.window or case.length)))[None, None]


def outputs_and_gradients(attend: Attend, operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [operand.detach().requires_grad_() for operand in operands]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.view(output.shape))]


def leaked(attend: Attend, case: Case, operands: list[Tensor]) -> int:
    """Outputs of later documents that are not the same to the bit after the first document was
    replaced.
    """
    first = case.sizes[0]
    others = [
        torch.cat([operand[:, :, :first].flip(2) + 1, operand[:, :, first:]], 2)
        for operand in operands
    ]
    with torch.no_grad():
        before, after = attend(*operands), attend(*others)
    assert not torch.equal(before[:, :first], after[:, :first])
    return int((before[:, first:] != after[:, first:]).sum())


def flops(case: Case) -> float:
    """Of a forward pass: two products over what is really seen; with the backward pass three times
    as many.
    """
    window = case.window or case.length
    seen = sum(min(place + 1, window) for size in case.sizes for place in range(size))
    return 4.0 * case.heads * case.head_size * seen


if __name__ == "__main__":
    run("attention", measure)
