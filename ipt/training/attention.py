"""Attention over packed documents: each document attends to itself alone.

Which implementation runs is resolved once, at the start, by `resolve_attention`; one that cannot be had is an error and never replaced
by another. All of them are told where documents begin (`ipt.mixture.batches`), but for transformers' sdpa, which finds it out from the
positions and is the oracle of the tests:

- `packed`: torch's causal attention document by document, which needs no mask and on a CPU costs the sum of squares of the documents'
  lengths instead of the square of the sequence's.
- `varlen`: torch's own kernel for sequences of various lengths, `torch.nn.attention.varlen`; nothing to install.
- `flash_attention_2|3|4`: the flash-attn packages, through transformers.
"""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ipt.config import TrainerConfig

PACKED, VARLEN = "ipt_packed", "ipt_varlen"  # as transformers knows them
FASTEST = ("flash_attention_3", "flash_attention_4", "varlen")  # what `auto` looks for on a GPU, in this order


class FlashPackage(NamedTuple):
    """A package of flash attention: where it is found, the GPUs it is for, and how to get it."""

    module: str
    distribution: str
    oldest: int  # major compute capability
    newest: int | None
    source: str


FLASH = {
    "flash_attention_2": FlashPackage("flash_attn", "flash-attn", 8, None, "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": FlashPackage(
        "flash_attn_interface", "flash-attn-3", 8, 9, "build it from the folder hopper/ of the flash-attention repository"
    ),
    "flash_attention_4": FlashPackage("flash_attn.cute", "flash-attn-4", 9, None, "pip install flash-attn-4"),
}


def resolve_attention(trainer: TrainerConfig) -> str:
    """What `trainer.attention` comes to on this machine: a name of the config's other than `auto`.

    Raises ValueError, saying what is missing and how to get it, for one that this machine, its packages or the precision do not allow.
    """
    if trainer.attention != "auto":
        if missing := _missing(trainer.attention, trainer):
            raise ValueError(f"trainer.attention={trainer.attention}: {missing}")
        return trainer.attention
    return next(name for name in (*FASTEST, "packed", "sdpa") if not _missing(name, trainer))


def implementation(name: str) -> str:
    """The name under which transformers knows a resolved one; registers our own with it."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
    return {"packed": PACKED, "varlen": VARLEN}.get(name, name)


def takes_bounds(implementation: str) -> bool:
    """Whether an implementation is told where documents begin, instead of finding it out from the positions."""
    return implementation in (PACKED, VARLEN) or "flash" in implementation


def bounds(batch: dict[str, Any], implementation: str) -> dict[str, Any]:
    """The keyword arguments that tell it: of a batch as ipt.mixture.batches makes it, flattened to one row."""
    if implementation == PACKED:
        return {"document_sizes": batch["document_sizes"]}  # only here: to a compiled block each new list is a new program
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["cu_seq_lens"]),
        **dict.fromkeys(("max_length_q", "max_length_k"), batch["max_length"]),
    }


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers: query [1, heads, T, head_dim], output [1, T, heads, head_dim].

    `options["document_sizes"]` are the lengths of the documents as a list, so that no device is asked for them; without it the
    sequence is one document.
    """
    _refuse_what_is_not_done("packed", options)
    sizes = options.get("document_sizes") or [query.shape[2]]
    window = options.get("sliding_window")
    outputs = []
    for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        mask = _window_mask(q.shape[2], window, q.device) if window and q.shape[2] > window else None
        output = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.get("scaling"),
            dropout_p=options.get("dropout", 0.0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `packed_attention`, in one kernel: documents by `cu_seq_lens_q` int32 [documents + 1], the longest by `max_length_q`."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_what_is_not_done("varlen", options)
    if options.get("dropout"):
        raise ValueError("trainer.attention=varlen: torch's kernel has no dropout, and this model has an attention_dropout; use packed")
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    window = options.get("sliding_window")
    query_THD, key_THD, value_THD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    output_THD: Any = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        starts,
        starts,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query_THD.shape[1] != key_THD.shape[1],
    )
    return output_THD[None], None


def _refuse_what_is_not_done(name: str, options: dict[str, Any]) -> None:
    """Options of models that these functions would leave out without a word: soft-capped scores, learned sinks."""
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise ValueError(f"trainer.attention={name}: this model's attention has {option}, which it cannot do; use flash_attention_2")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True [T, T] where a token is seen: itself and the `window - 1` before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _missing(name: str, trainer: TrainerConfig) -> str | None:
    """What keeps `name` from running here, and how to get it; None if nothing does."""
    if name == "sdpa":
        return None
    if name == "packed":
        return "compiled blocks would be compiled anew for each batch, use sdpa, or varlen on a GPU" if trainer.compile else None
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and this run has none; on a CPU use packed"
    if trainer.precision != "bf16":
        return "its kernel computes in bf16 only, set trainer.precision=bf16, or use packed"
    capability = torch.cuda.get_device_capability()
    kind = f"{torch.cuda.get_device_name()} of compute capability {capability[0]}.{capability[1]}"
    if name == "varlen":
        return None if capability[0] >= 8 else f"torch's kernel needs compute capability 8.0, and this is {kind}; use packed"
    package = FLASH[name]
    if not package.oldest <= capability[0] <= (package.newest or capability[0]):
        span = f"to {package.newest}.x" if package.newest else "and newer"
        return f"it is for GPUs of compute capability {package.oldest}.0 {span}, and this is {kind}; use varlen or packed"
    return _missing_package(name, package)


def _missing_package(name: str, package: FlashPackage) -> str | None:
    """transformers would fetch a kernel from a hub where the package is not installed: then this says no first."""
    from transformers import utils

    try:
        version(package.distribution)
        found = importlib.util.find_spec(package.module) is not None
    except (PackageNotFoundError, ModuleNotFoundError):
        found = False
    if not found:
        return f"the package {package.distribution} is not installed: {package.source}; or use varlen, which needs no package"
    if not getattr(utils, f"is_flash_attn_{name[-1]}_available")():
        return f"transformers does not take this version of {package.distribution} ({version(package.distribution)}); or use varlen"
    return None
