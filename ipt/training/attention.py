"""Attention over packed documents: each document attends to itself alone.

`candidates` lists the implementations that this machine can run; `ipt.training.probe` takes the
first that is right for the model. An implementation that was requested by name and is not available
raises an error. Most implementations take the bounds of the documents from the batch
(`ipt.mixture.batches`); sdpa and eager, which transformers provides, derive a block mask from the
positions:

- `packed`: torch's causal attention document by document, without a mask. On a CPU it costs the sum
  of squares of the document lengths instead of the square of the sequence length. Also computes
  soft-caps and attention sinks.
- `varlen`: torch's own kernel for sequences of different lengths, `torch.nn.attention.varlen`;
  needs no package.
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

PACKED, VARLEN = "ipt_packed", "ipt_varlen"  # as transformers knows them
RECORDED = "ipt_packed_recorded"  # packed attention that notes the features a model uses
FASTEST = (
    "flash_attention_3",
    "flash_attention_4",
    "varlen",
)  # what `auto` looks for on a GPU, in this order


class FlashPackage(NamedTuple):
    """A package of flash attention: where it is found, the GPUs it is for, and how to get it."""

    module: str
    distribution: str
    oldest: int  # major compute capability
    newest: int | None
    source: str


# Features of a model's attention, by the option of transformers' attention interface, and the
# kernels that compute them. flash-attn 2 and 3 ignore `s_aux`, 3 and 4 ignore `dropout`, sdpa
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
    """Names of `trainer.attn_implementation` that can run here for a model with `features`, the preferred one
    first.

    Without `auto` that is the name itself. Raises UserError, saying what is missing and how to get
    it, for a name that this machine, its packages, the precision or the model rules out.
    """
    if trainer.attn_implementation != "auto":
        if missing := _missing(trainer.attn_implementation, trainer) or _not_computed(
            trainer.attn_implementation, features
        ):
            raise UserError(f"trainer.attn_implementation={trainer.attn_implementation}: {missing}")
        return [trainer.attn_implementation]
    names = (*FASTEST, "packed", "sdpa", "eager")
    return [
        name for name in names if not (_missing(name, trainer) or _not_computed(name, features))
    ]


def resolve_attention(trainer: TrainerConfig) -> str:
    """The first of `candidates`, whatever the model."""
    return candidates(trainer)[0]


def implementation(name: str) -> str:
    """The name under which transformers knows a resolved one; registers our own with it."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(RECORDED, _recorded_attention)
    return {"packed": PACKED, "varlen": VARLEN}.get(name, name)


def takes_bounds(implementation: str) -> bool:
    """Whether an implementation is told where documents begin, instead of finding it out from the
    positions.
    """
    return implementation in (PACKED, VARLEN, RECORDED) or "flash" in implementation


def bounds(batch: dict[str, Any], implementation: str) -> dict[str, Any]:
    """The keyword arguments that tell it: of a batch as ipt.mixture.batches makes it, flattened to
    one row.
    """
    if implementation in (PACKED, RECORDED):
        return {
            "document_sizes": batch["document_sizes"]
        }  # only here: to a compiled block each new list is a new program
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["cu_seq_lens"]),
        **dict.fromkeys(("max_length_q", "max_length_k"), batch["max_length"]),
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

    `options["document_sizes"]` are the lengths of the documents as a list, which avoids a
    host-device sync; without it the sequence is one document. Computes `sliding_window`, `softcap`
    (a bound on the scores) and `s_aux`, attention sinks [heads]: a score a head that takes part in
    the softmax and has no value.
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
    seen = _window_mask(length, options.get("sliding_window") or length, query.device)
    scores = scores.masked_fill(~seen, -torch.inf).float()
    sinks = options.get("s_aux")
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.float().view(1, heads, 1, 1).expand(-1, -1, length, 1)], -1
        )
    weights = scores.softmax(-1)[..., :length].to(value.dtype)
    return (
        torch.dropout(weights, options.get("dropout", 0.0), train=True) @ value
    )  # 0 in evaluation mode


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `packed_attention`, in one kernel: documents by `cu_seq_lens_q` int32 [documents + 1], the
    longest by `max_length_q`.
    """
    from torch.nn.attention.varlen import varlen_attn

    for feature in FEATURES:
        option = options.get(feature)
        if option is not None and not (feature == "dropout" and option == 0):
            raise UserError(
                f"trainer.attn_implementation=varlen: {_not_computed('varlen', [feature])}"
            )
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    window = options.get("sliding_window")
    query_THD, key_THD, value_THD = (
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
    )
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
    """The set to which the implementation RECORDED adds the names of FEATURES that a model uses,
    emptied.
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


def _not_computed(name: str, features: Collection[str]) -> str | None:
    """Why `name` is wrong for a model with `features`, and what computes them; None if nothing is."""
    for feature in features:
        if name not in COMPUTED_BY[feature]:
            return (
                f"{name} ignores the {FEATURES[feature]} of this model; use "
                f"{', '.join(COMPUTED_BY[feature])}"
            )
    return None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True [T, T] where a token is seen: itself and the `window - 1` before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _missing(name: str, trainer: TrainerConfig) -> str | None:
    """What keeps `name` from running here, and how to get it; None if nothing does."""
    if name in ("sdpa", "eager"):
        return None
    if name == "packed":
        return (
            "compiled blocks would be compiled anew for each batch, use sdpa, or varlen on a GPU"
            if trainer.compile
            else None
        )
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and this run has none; on a CPU use packed"
    if not trainer.bf16_arithmetic:
        return "its kernel computes in bf16 only, set trainer.precision=bf16-mixed, or use packed"
    capability = torch.cuda.get_device_capability()
    kind = f"{torch.cuda.get_device_name()} of compute capability {capability[0]}.{capability[1]}"
    if name == "varlen":
        return (
            None
            if capability[0] >= 8
            else f"torch's kernel needs compute capability 8.0, and this is {kind}; use packed"
        )
    package = FLASH[name]
    if not package.oldest <= capability[0] <= (package.newest or capability[0]):
        span = f"to {package.newest}.x" if package.newest else "and newer"
        return (
            f"it is for GPUs of compute capability {package.oldest}.0 {span}, and this is {kind}; "
            "use varlen or packed"
        )
    return _missing_package(name, package)


def _missing_package(name: str, package: FlashPackage) -> str | None:
    """transformers would fetch a kernel from a hub where the package is not installed: then this
    says no first.
    """
    from transformers import utils

    try:
        version(package.distribution)
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
            f"transformers does not take this version of {package.distribution} "
            f"({version(package.distribution)}); or use varlen"
        )
    return None
