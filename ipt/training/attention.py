"""Attention over packed documents: each document attends to itself alone.

`candidates` lists the implementations that this machine can run; `ipt.training.probe` takes the
first one that is correct for the model. Requesting an unavailable implementation raises an error.
Most implementations take `cu_seq_lens` or the document lengths from the batch
(`ipt.mixture.batches`), which avoids a host-device sync; sdpa and eager derive a block mask from
the positions:

- `packed`: torch's causal attention document by document, without a mask. On a CPU it costs the sum
  of squares of the document lengths instead of the square of the sequence length. Also computes
  soft-caps and attention sinks.
- `varlen`: torch's own kernel for sequences of different lengths, `torch.nn.attention.varlen`; no
  package is needed.
- `flash_attention_2|3|4`: the flash-attn packages, through transformers.
- `sdpa`, `eager`: the implementations of transformers.
"""

import importlib.util
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ipt.config import TrainerConfig
from ipt.errors import UserError

# Names under which our functions are registered in transformers.
PACKED, VARLEN = "ipt_packed", "ipt_varlen"
RECORDED = "ipt_packed_recorded"  # packed attention that records the features a model uses
FASTEST = ("flash_attention_3", "flash_attention_4", "varlen")  # order of preference on GPUs


class FlashPackage(NamedTuple):
    """A flash-attention package: its names, the GPUs it supports, and how to install it."""

    module: str
    distribution: str
    oldest: int  # major compute capability
    newest: int | None
    source: str


# Features of a model's attention, by their option in transformers' attention interface, and the
# kernels that support them. flash-attn 2 and 3 ignore `s_aux`, 3 and 4 ignore `dropout`, sdpa
# ignores all but dropout.
FEATURES = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "dropout": "attention dropout",
}
COMPUTED_BY = {
    "softcap": ("packed", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    "s_aux": ("packed", "eager", "flash_attention_4"),
    "dropout": ("packed", "sdpa", "eager", "flash_attention_2"),
}
_recorded: set[str] = set()

FLASH = {
    "flash_attention_2": FlashPackage(
        "flash_attn", "flash-attn", 8, None, "pip install flash-attn --no-build-isolation"
    ),
    "flash_attention_3": FlashPackage(
        "flash_attn_interface",
        "flash-attn-3",
        8,
        9,
        "build it from the folder hopper/ of the flash-attention repository",
    ),
    "flash_attention_4": FlashPackage(
        "flash_attn.cute", "flash-attn-4", 9, None, "pip install flash-attn-4"
    ),
}


def candidates(trainer: TrainerConfig, features: Collection[str] = ()) -> list[str]:
    """The implementations that can run here for a model with `features`, the preferred one first.

    If `trainer.attn_implementation` is not `auto`, its value is the only candidate. Raises
    UserError if the machine, its packages, the precision or the model rules that out.
    """
    name = trainer.attn_implementation
    if name != "auto":
        if problem := _unavailable(name, trainer) or _unsupported(name, features):
            raise UserError(f"trainer.attn_implementation={name}: {problem}")
        return [name]
    names = []
    for name in (*FASTEST, "packed", "sdpa", "eager"):
        if not (_unavailable(name, trainer) or _unsupported(name, features)):
            names.append(name)
    return names


def resolve_attention(trainer: TrainerConfig) -> str:
    """The first of `candidates` for a model without special features."""
    return candidates(trainer)[0]


def implementation(name: str) -> str:
    """The name of an implementation in transformers; registers our own functions there."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(RECORDED, _recorded_attention)
    return {"packed": PACKED, "varlen": VARLEN}.get(name, name)


def takes_cu_seqlens(implementation: str) -> bool:
    """Whether an implementation takes the starts or lengths of the documents, instead of deriving
    them from the positions.
    """
    return implementation in (PACKED, VARLEN, RECORDED) or "flash" in implementation


def cu_seqlens_kwargs(batch: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Keyword arguments of the model for the documents of a batch of ipt.mixture.batches that is
    flattened to one row.
    """
    if implementation in (PACKED, RECORDED):
        # A list only here: a compiled block is recompiled for each new list.
        return {"document_sizes": batch["document_sizes"]}
    return {
        "cu_seq_lens_q": batch["cu_seq_lens"],
        "cu_seq_lens_k": batch["cu_seq_lens"],
        "max_length_q": batch["max_length"],
        "max_length_k": batch["max_length"],
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: query [1, heads, T, head_dim], output [1, T, heads,
    head_dim].

    `options["document_sizes"]` is the list of document lengths; without it the sequence is one
    document. Supports `sliding_window`, `softcap` (a bound on the scores) and `s_aux`, attention
    sinks [heads]: one score per head that takes part in the softmax and has no value.
    """
    sizes = options.get("document_sizes") or [query.shape[2]]
    is_plain = options.get("softcap") is None and options.get("s_aux") is None
    attend = _attend if is_plain else _attend_by_scores
    documents = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = [attend(*document, options) for document in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Causal attention of one document by torch's kernel."""
    length, window = query.shape[2], options.get("sliding_window")
    mask = _window_mask(length, window, query.device) if window and length > window else None
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=options.get("scaling"),
        dropout_p=options.get("dropout", 0.0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_by_scores(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Causal attention of one document with soft-capped scores or sinks, softmax in fp32."""
    length, heads = query.shape[2], query.shape[1]
    key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = query @ key.transpose(2, 3) * scaling
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    visible = _window_mask(length, options.get("sliding_window") or length, query.device)
    scores = scores.masked_fill(~visible, -torch.inf).float()
    sinks = options.get("s_aux")
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(-1, -1, length, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :length].to(value.dtype)
    # The model passes dropout 0 in evaluation mode.
    return torch.dropout(weights, options.get("dropout", 0.0), train=True) @ value


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `packed_attention`, in one kernel. Options: `cu_seq_lens_q` int32 [documents + 1], and the
    length of the longest document, `max_length_q`.
    """
    from torch.nn.attention.varlen import varlen_attn

    for feature in FEATURES:
        option = options.get(feature)
        if option is not None and not (feature == "dropout" and option == 0):
            problem = _unsupported("varlen", [feature])
            raise UserError(f"trainer.attn_implementation=varlen: {problem}")
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    window = options.get("sliding_window")
    query_THD = query[0].transpose(0, 1)
    key_THD = key[0].transpose(0, 1)
    value_THD = value[0].transpose(0, 1)
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


def record_features() -> set[str]:
    """Empty and return the set to which the implementation RECORDED adds the FEATURES that a model
    uses.
    """
    _recorded.clear()
    return _recorded


def _recorded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    used = {name for name in FEATURES if options.get(name) is not None}
    _recorded.update(used - {"dropout"})
    return packed_attention(module, query, key, value, attention_mask, **options)


def _unsupported(name: str, features: Collection[str]) -> str | None:
    """Why `name` is wrong for a model with `features`; None if it is correct."""
    for feature in features:
        if name not in COMPUTED_BY[feature]:
            return (
                f"{name} ignores the {FEATURES[feature]} of this model; use "
                f"{', '.join(COMPUTED_BY[feature])}"
            )
    return None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True [T, T] where a token is visible: itself and the `window - 1` tokens before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _unavailable(name: str, trainer: TrainerConfig) -> str | None:
    """Why `name` cannot run here, and what to do about it; None if it can."""
    if name in ("sdpa", "eager"):
        return None
    if name == "packed":
        if trainer.compile:
            return (
                "compiled blocks would be recompiled for each batch; use sdpa, or varlen on a GPU"
            )
        return None
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and this run has none; on a CPU use packed"
    if not trainer.bf16_arithmetic:
        return "its kernel computes in bf16 only; set trainer.precision=bf16-mixed, or use packed"
    capability = torch.cuda.get_device_capability()
    gpu = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    if name == "varlen":
        if capability[0] < 8:
            return f"torch's kernel needs compute capability 8.0, and {gpu}; use packed"
        return None
    package = FLASH[name]
    if not package.oldest <= capability[0] <= (package.newest or capability[0]):
        newest = f"to {package.newest}.x" if package.newest else "or newer"
        return (
            f"it needs compute capability {package.oldest}.0 {newest}, and {gpu}; use varlen or "
            "packed"
        )
    return _missing_package(name, package)


def _missing_package(name: str, package: FlashPackage) -> str | None:
    """Why the package cannot be used; None if it can. Without this check transformers would
    download a kernel from the hub.
    """
    from transformers import utils

    try:
        installed = version(package.distribution)
        found = importlib.util.find_spec(package.module) is not None
    except (PackageNotFoundError, ModuleNotFoundError):
        found = False
    if not found:
        return (
            f"the package {package.distribution} is not installed: {package.source}; or use "
            "varlen, which needs no package"
        )
    if not getattr(utils, f"is_flash_attn_{name[-1]}_available")():
        return (
            f"transformers does not support {package.distribution} {installed}; install another "
            "version, or use varlen"
        )
    return None
