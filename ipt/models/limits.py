"""Checks that a model has enough token ids and positions for a command.

They use the config, the tokenizer and the model on the meta device; no weights are read.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ipt.distributed import rank
from ipt.errors import UserError
from ipt.models import load_tokenizer, resolve_model
from ipt.models.checks import local_folder, meta_model, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OFFSET = 8  # maximum extra rows of a position table (OPT has 2)
LENGTHENING = ("linear", "dynamic", "yarn")  # RoPE scalings that extend the stated positions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The input that a model accepts."""

    name: str  # for messages: model=NAME or architecture
    vocabulary: int  # rows of the embedding table, or of the output projection if it has fewer
    positions: int | None  # None: unlimited
    table: str | None  # module with learned positions; None: rotary or no positions


def check_model_limits(
    name: str, architecture: dict[str, Any] | None, lengths: dict[str, int | None]
) -> Limits | None:
    """Check the tokenizer of the model `name`, and `lengths` (config key -> tokens).

    Returns the model's limits; None for a hub model that is not in the local cache.
    """
    limits = model_limits(name, architecture)
    if limits is None:
        return None
    check_vocabulary(limits, name, load_tokenizer(name))
    for key, length in lengths.items():
        if length is not None:
            check_positions(limits, key, length)
    return limits


def model_limits(name: str, architecture: dict[str, Any] | None = None) -> Limits | None:
    """The limits of a model, or of an `architecture` that is trained from scratch.

    None for a hub model that is not in the local cache. Raises UserError if transformers cannot
    build the model.
    """
    if architecture:
        config = _architecture_config(architecture)
        return _limits("architecture", config, meta_model(config, "architecture"))
    source = resolve_model(name)
    if local_folder(source) is None:
        return None
    config = read_config(source)
    return _limits(f"model={name}", config, meta_model(config, name))


def check_vocabulary(limits: Limits, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the model has an embedding for every token id of the tokenizer `name`.

    Raises UserError that names the first token beyond the table. Special tokens other than BOS,
    EOS, PAD and those in the chat template never occur in texts and are only logged: published
    models have such tokens for images.
    """
    rows = limits.vocabulary
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= rows}
    if not beyond:
        return
    unused = {id for id in beyond if _is_unused(tokenizer, id)}
    used = sorted(beyond.keys() - unused)
    if used:
        raise UserError(
            f"{limits.name}: the embedding table has {rows} rows, but the tokenizer of model={name}"
            f" maps {beyond[used[0]]!r} to id {used[0]} ({len(used)} such tokens): use the model's "
            f"own tokenizer, or vocab_size={max(beyond) + 1}"
        )
    token = min(unused)
    _warn_once(
        f"model={name}: special token {beyond[token]!r} has id {token}, beyond the {rows} rows of "
        "the embedding table; it never occurs in texts"
    )


def check_positions(limits: Limits, key: str, length: int) -> None:
    """Check the value of the config's `key`, a length in tokens, against the model's positions.

    Raises UserError beyond learned positions. Beyond rotary positions, which can be computed for
    any length, it logs that the model was not trained on such lengths.
    """
    if limits.positions is None or length <= limits.positions:
        return
    if limits.table is not None:
        raise UserError(
            f"{key}={length}: {limits.name} has {limits.positions} learned positions "
            f"({limits.table}): set {key}={limits.positions} or less"
        )
    _warn_once(
        f"{key}={length}: {limits.name} was trained on {limits.positions} positions (RoPE scaling "
        "included), not on more"
    )


def check_window(name: str, key: str, length: int) -> None:
    """Raises UserError if a context window of `length` tokens exceeds the model's positions."""
    source = resolve_model(name)
    window = stated_positions(read_config(source)) if local_folder(source) is not None else None
    if window is not None and length > window:
        raise UserError(f"{key}={length}: the model {name} supports at most {window} tokens")


def stated_positions(config: "PretrainedConfig") -> int | None:
    """The positions in a config, RoPE scaling included; None if the config has none.

    A scaling that extends the positions multiplies its `original_max_position_embeddings`, or else
    the stated ones.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return stated
    kind = rope.get("rope_type", rope.get("type"))
    factor = rope.get("factor")
    if kind not in LENGTHENING or not isinstance(factor, int | float):
        return stated
    original = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(original * factor))


def positions_before_rope_changes(config: "PretrainedConfig") -> int | None:
    """The length beyond which a model changes the rotation of all tokens of a batch; None if it
    never does.

    LongRoPE (Phi-3 with 128k tokens) switches to its long factors, dynamic scaling to a larger
    base.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    # some models have one per kind of layer
    each = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    lengths = [_last_position(part, text) for part in each]
    return min((length for length in lengths if length), default=None)


def _last_position(rope: dict[str, Any], text: Any) -> int | None:
    kind = rope.get("rope_type", rope.get("type"))
    stated = getattr(text, "max_position_embeddings", None)
    if kind == "longrope":
        return (
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or stated
        )
    return stated if kind == "dynamic" else None


def _architecture_config(architecture: dict[str, Any]) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**architecture)
    except Exception as error:  # each config class validates differently
        message = " ".join(str(error).split())
        raise UserError(f"architecture: transformers does not accept it: {message}") from error


def _limits(name: str, config: "PretrainedConfig", model: "PreTrainedModel") -> Limits:
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = int(embeddings.weight.shape[0])
    if getattr(head, "weight", None) is not None:
        rows = min(rows, int(head.weight.shape[0]))
    for table, positions in _position_tables(model, config):
        return Limits(name, rows, positions, table)
    return Limits(name, rows, stated_positions(config), None)


def _position_tables(
    model: "PreTrainedModel", config: "PretrainedConfig"
) -> Iterator[tuple[str, int]]:
    """Name and positions of each table in the decoder with one row per position."""
    from torch import nn

    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None) or 0
    decoder = model.get_decoder()
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            continue
        rows = module.num_embeddings
        if stated and stated <= rows <= stated + OFFSET:
            yield name, stated
        elif module.embedding_dim == text.hidden_size and "pos" in name:
            yield name, rows - getattr(module, "offset", 0)
    for name, buffer in decoder.named_buffers():
        if "pos" in name and buffer.ndim > 1 and stated and buffer.shape[0] == stated:
            yield name, stated


def _is_unused(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> bool:
    """Whether a token is special and ipt never adds it to a text."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return False
    if token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return False
    return added.content not in str(tokenizer.chat_template or "")


@cache  # checked before the stages and again at the start of training
def _warn_once(message: str) -> None:
    if rank() == 0:
        logger.warning("%s", message)
