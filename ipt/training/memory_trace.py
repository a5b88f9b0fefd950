"""Memory of the tensors of a training step, measured by running it on the meta device, where
tensors have shapes but no data.
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipt.training.loss import chunked_cross_entropy, logit_transform
from ipt.training.model import base_model, decoder_of

# Attention functions for the trace, by the tensors that they keep.
FUSED, BY_DOCUMENT, MASKED = "ipt_traced", "ipt_traced_by_document", "ipt_traced_masked"


class Traced(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass, without weights and their gradients."""

    activations: int  # kept by the decoder for the backward pass
    loss: int  # in addition, at most, while the loss and its gradients are computed
    backward: int  # in addition, at most, for recomputed activations and gradients of activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until nothing refers to them."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def trace_step(model: Any, rows: int, seq_len: int, dtype: torch.dtype, loss_chunk: int) -> Traced:
    """Run a micro-batch, whose tokens are all targets, through a causal LM on the meta device that
    computes in `dtype`.

    The attention of `model` must be one of FUSED, BY_DOCUMENT and MASKED; activation checkpointing
    is respected. `model` is not changed.
    """
    model = copy.deepcopy(model).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    base = base_model(model)
    projection = base.get_output_embeddings()
    ids = torch.zeros(rows, seq_len, dtype=torch.long, device="meta")
    with live:
        outputs = decoder_of(base)(input_ids=ids, position_ids=ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        del outputs
        activations = live.now
        live.peak = live.now
        labels = ids.flatten()
        loss, _ = chunked_cross_entropy(
            hidden[labels],
            projection.weight,
            labels,
            chunk=loss_chunk,
            bias_V=getattr(projection, "bias", None),
            transform=logit_transform(base.config),
        )
        del hidden
        during_loss = live.peak - activations
        live.peak = live.now
        loss.backward()
    return Traced(activations, during_loss, live.peak - activations)


def register_traced_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(FUSED, _fused)
    AttentionInterface.register(BY_DOCUMENT, _by_document)
    AttentionInterface.register(MASKED, _masked)


# Keeps the tensors that flash attention keeps: inputs, output and the log-sum-exp of each row. The
# operation has `attention` in its name so that selective checkpointing handles it like the kernels.
@torch.library.custom_op("ipt::traced_attention", mutates_args=())
def _attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    raise AssertionError("for tensors on the meta device only")


@_attention.register_fake
def _(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query_BHTD.shape
    output = query_BHTD.new_empty(batch, length, heads, size)
    return output, query_BHTD.new_empty(batch, heads, length, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, value, *_ = ctx.saved_tensors
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_attention.register_autograd(_backward, setup_context=_keep)


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    return _attention(query, key, value, None)[0], None


def _by_document(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """As ipt.training.attention.packed_attention, which keeps the outputs of the documents and
    their concatenation.
    """
    return _attention(query, key, value, None)[0].clone(), None


def _masked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """torch's attention with a mask, which each layer keeps as numbers in the compute dtype."""
    batch, _, length, _ = query.shape
    float_mask = query.new_empty(batch, 1, length, length)
    return _attention(query, key, value, float_mask)[0], None


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # ipt.training.memory_estimate counts the gradients of weights
