"""What a training step keeps in memory, found by running it on the meta device, where tensors have
shapes but no numbers.
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipt.training.loss import chunked_cross_entropy
from ipt.training.model import decoder_of
from ipt.training.objective import logit_transform

FUSED, BY_DOCUMENT, MASKED = "ipt_traced", "ipt_traced_by_document", "ipt_traced_masked"


class Traced(NamedTuple):
    """Bytes of one forward and backward pass of a micro-batch, beside weights and their gradients."""

    activations: int  # kept by the decoder for the backward pass
    loss: int  # on top of them at most while the loss and its gradients are computed
    # on top of them at most in the backward pass: what is recomputed, gradients of activations
    backward: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from their making until nothing refers to
    them.
    """

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
    """Follow a micro-batch, all of its tokens targets, through a causal LM on the meta device that
    computes in `dtype`.

    The model is run as it is, with its checkpointing; its attention must be one of FUSED,
    BY_DOCUMENT and MASKED. `model` stays unchanged.
    """
    model = copy.deepcopy(model).to(dtype)
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.zeros(rows, seq_len, dtype=torch.long, device="meta")
    with live:
        hidden = decoder_of(base)(
            input_ids=ids, position_ids=ids, use_cache=False
        ).last_hidden_state.flatten(0, 1)
        activations = live.now
        live.peak = live.now
        labels = ids.flatten()
        projection = base.get_output_embeddings()
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


# Keeps what flash attention keeps: its inputs, its output and, of each row, the logarithm of the
# sum of exponentials. An operation with `attention` in its name, so that selective checkpointing
# treats it as it treats the kernels.
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
    return query_BHTD.new_empty(batch, length, heads, size), query_BHTD.new_empty(
        batch, heads, length, dtype=torch.float32
    )


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
    """As ipt.training.attention.packed_attention: the outputs of documents are kept, and once more
    as one tensor.
    """
    return _attention(query, key, value, None)[0].clone(), None


def _masked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """torch's attention with a mask: each layer keeps the mask as numbers to add, in the type that
    is computed in.
    """
    batch, _, length, _ = query.shape
    return _attention(query, key, value, query.new_empty(batch, 1, length, length))[0], None


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # those of weights are counted by ipt.training.memory_estimate
