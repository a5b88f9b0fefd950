"""How much text goes through a model at once."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# keys of a batch per token of `batch_tokens`: rows behind a shared prefix attend to more than they
# hold
KEYS = 16
ALIKE = 0.8  # of the longest row's length: shorter ones would mostly be padding
UNLIMITED = 2**20  # context of a model that states no limit


def batches(lengths: Sequence[int], batch_tokens: int, prefix: int = 0) -> Iterator[list[int]]:
    """Indices of rows that go through the model together: longest first, at most `batch_tokens`
    with padding, or one row.

    Once a batch has an eighth of that, rows much shorter than its longest begin another one. Behind
    a shared prefix of so many tokens, rows have as many more keys each, which are limited too.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows, longest = len(batch) + 1, lengths[batch[0]] if batch else 0
        is_full = rows * longest > batch_tokens or rows * (longest + prefix) > KEYS * batch_tokens
        if batch and (
            is_full
            or (len(batch) * longest > batch_tokens / 8 and lengths[index] < ALIKE * longest)
        ):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def context_length(model: "PreTrainedModel") -> int:
    """Tokens that the model can read at once."""
    return int(
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED
    )


def full_attention_length(model: "PreTrainedModel") -> int:
    """Texts of at most so many tokens are seen whole by every layer; 0 where some layers do not
    attend at all.

    A mask that we pass replaces the model's own, so a row of branches must not need a sliding
    window.
    """
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return 0
    return int(getattr(config, "sliding_window", None) or UNLIMITED)
