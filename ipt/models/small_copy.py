"""A small random copy of a model: the same class and features, at sizes that run in a fraction of a
second.

Its weights and window lengths are chosen so that every feature acts on documents of a few dozen
tokens: soft-caps, sinks, biases, sliding windows, logit scales.
"""

import copy
import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

log = logging.getLogger(__name__)

LENGTHS = (29, 18)  # tokens of the documents that a small copy is run on
# nats a token in fp32; a feature that is ignored moves losses by more
# (tests/training/test_probe.py)
TOLERANCE = 2e-3
VOCABULARY = 320
WINDOW = 8  # tokens, for sliding windows and attention chunks
MOST_PARAMETERS = 100_000_000
FEW_PARAMETERS = 5_000_000  # models below keep their widths and depth
MATRIX_GAIN = 1.5  # standard deviation of a matrix product of normalised inputs
EMBEDDING_STD = 1.0
PROJECTION_GAIN = 4.0  # and of the logits
WIDTHS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
)
# in proportion to the hidden size
STATE_SIZES = (
    "mamba_n_heads",
    "mamba_num_heads",
    "mamba_d_ssm",
    "num_heads",
    "n_groups",
    "mamba_n_groups",
    "lru_width",
)
HIDDEN_SIZE = 128  # of models without attention
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def small_copies(architecture: Any) -> list[Any]:
    """Configs of smaller models with the features of `architecture`, a transformers config, best
    first.

    Sizes that a class does not accept are possible, so callers take the first that runs.
    """
    whole = _with_acting_windows(_with_few_tokens(copy.deepcopy(architecture)))
    if is_small(whole):
        return [whole, *_made(_shallow, whole)]
    made: list[Any] = []
    for shallow in (*_made(_shallow_parts, whole), *_made(_shallow, whole)):
        made += [*_made(_narrow, shallow), *_made(_narrow_with_four_heads, shallow), shallow]
    sizes = [(small, _parameters(small)) for small in (*made, whole)]
    return [small for small, size in sizes if size is not None and size <= MOST_PARAMETERS]


def is_small(architecture: Any) -> bool:
    """Whether a model is small enough to be compared as it is."""
    size = _parameters(architecture)
    return size is not None and size <= FEW_PARAMETERS


def _made(change: Callable[[Any], Any], architecture: Any) -> list[Any]:
    """The changed config, or nothing for a class whose config lacks what the change needs."""
    try:
        return [change(architecture)]
    except Exception as error:  # configs check their values in their own ways
        log.debug("no small copy of %s by %s: %s", architecture.model_type, change.__name__, error)
        return []


def random_model(architecture: Any, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM of a config in evaluation mode, its weights drawn so that features act; always
    the same.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                _draw(parameter)
            _draw(model.get_input_embeddings().weight, EMBEDDING_STD)
            projection = getattr(model.get_output_embeddings(), "weight", None)
            if projection is not None:
                _draw(projection, PROJECTION_GAIN / math.sqrt(projection.shape[1]))
    return model.to(dtype).eval()


def random_documents(architecture: Any) -> list[Tensor]:
    """Two documents of ordinary tokens, the same for every process: token ids [29] and [18], fewer
    if positions are.
    """
    text = architecture.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or max(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    low = min(5, text.vocab_size - 1)
    lengths = [min(length, positions) for length in LENGTHS]
    return [
        torch.randint(low, text.vocab_size, (length,), generator=generator) for length in lengths
    ]


@torch.no_grad()
def losses_alone(model: Any, documents: list[Tensor]) -> list[Tensor]:
    """The loss of each token but the first [length - 1], from the model's own logits, document by
    document.
    """
    losses = []
    for document in documents:
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1].float()
        losses.append(cross_entropy(logits, document[1:], reduction="none"))
    return losses


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference between losses, infinite where one is not finite."""
    differences = [(ours - other).abs().max() for ours, other in zip(found, expected, strict=True)]
    largest = torch.stack(differences).max()
    return float(largest) if largest.isfinite() else float("inf")


def plain_attention(architecture: Any) -> str:
    """The attention of transformers that is right for a model of this config: sdpa, or eager.

    The sdpa function ignores what it does not know, such as the soft-cap of Gemma-2's scores,
    without an error.
    """
    return _plain_attention(CachedConfig.of(architecture))


@dataclass(frozen=True)
class CachedConfig:
    """A transformers config as the argument of a cached function: equal to others of its class that
    say the same.
    """

    kind: type
    settings: str  # as JSON
    config: Any = field(compare=False)

    @classmethod
    def of(cls, config: Any) -> Self:
        settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
        return cls(type(config), settings, copy.deepcopy(config))


@functools.lru_cache(maxsize=32)
def _plain_attention(cached: CachedConfig) -> str:
    for small in small_copies(cached.config):
        try:
            documents = random_documents(small)
            expected = losses_alone(random_model(small, "eager"), documents)
        except Exception as error:  # whatever a class raises for sizes that it does not accept
            log.debug("a small copy of %s does not run: %s", small.model_type, error)
            continue
        try:
            found = losses_alone(random_model(small, "sdpa"), documents)
        except Exception as error:  # the class has no sdpa
            log.debug("%s does not run with sdpa: %s", small.model_type, error)
            return "eager"
        return "sdpa" if distance(found, expected) <= TOLERANCE else "eager"
    return "eager"


def _draw(parameter: Tensor, std: float | None = None) -> None:
    if not parameter.is_floating_point():
        return
    if parameter.ndim < 2:
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return
    fan_in = parameter.numel() // parameter.shape[0] if parameter.ndim == 2 else parameter.shape[-1]
    parameter.normal_(0, std or MATRIX_GAIN / math.sqrt(fan_in))


def _parameters(architecture: Any) -> int | None:
    """Number of parameters, or None if the class rejects these sizes."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
    except Exception as error:
        log.debug("no small copy of %s with these sizes: %s", architecture.model_type, error)
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _shallow(architecture: Any) -> Any:
    """At least four layers, if the model has them, and one of each kind."""
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list) and len(value) == layers
    }
    kept = min(layers, 4)
    for values in lists.values():
        kinds = {str(value) for value in values}
        while len({str(value) for value in values[:kept]}) < len(kinds):
            kept += 1
    for name, values in lists.items():
        setattr(text, name, values[:kept])
    text.num_hidden_layers = kept
    return small


def _shallow_parts(architecture: Any) -> Any:
    """As `_shallow`, with one layer in each part other than the language model, such as a vision
    tower.
    """
    small = _shallow(architecture)
    for name in small.sub_configs:
        part: Any = getattr(small, name, None)
        if part is not small.get_text_config() and getattr(part, "num_hidden_layers", None):
            part.num_hidden_layers = 1
    return small


def _narrow(architecture: Any, least_heads: int = 1) -> Any:
    """Fewer heads of the same size and a hidden size in proportion, so that lists for each
    dimension of a head stay valid.
    """
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    share = (
        _fewer_heads(text, heads, least_heads)
        if heads
        else min(1.0, HIDDEN_SIZE / text.hidden_size)
    )
    text.hidden_size = _multiple_of_8(text.hidden_size * share)
    for name in WIDTHS:
        width = getattr(text, name, None)
        if isinstance(width, int) and width:
            setattr(text, name, min(text.hidden_size, _multiple_of_8(width * share)))
    for name in STATE_SIZES:
        size = getattr(text, name, None)
        if isinstance(size, int) and size:
            setattr(text, name, max(1, round(size * share)))
    for name in EXPERTS:
        experts = getattr(text, name, None)
        if isinstance(experts, int):
            setattr(text, name, min(experts, 2 * (getattr(text, "num_experts_per_tok", None) or 4)))
    return small


def _narrow_with_four_heads(architecture: Any) -> Any:
    """For classes that divide their heads among four, such as CodeGen."""
    return _narrow(architecture, least_heads=4)


def _fewer_heads(text: Any, heads: int, least: int) -> float:
    """Give the config fewer attention heads; returns their share of the heads that it had."""
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    group = max(1, heads // key_heads)
    few_key_heads = 2 if key_heads % 2 == 0 and group <= 2 else 1
    few_key_heads = min(key_heads, max(few_key_heads, math.ceil(least / group)))
    text.num_attention_heads = few_key_heads * group
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = few_key_heads
    return text.num_attention_heads / heads


def _with_few_tokens(small: Any) -> Any:
    text = small.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if getattr(text, name, None):
            setattr(text, name, min(getattr(text, name), VOCABULARY))
    for number, name in enumerate(SPECIAL_TOKENS):
        if getattr(text, name, None) is not None:
            setattr(text, name, number)
    return small


def _with_acting_windows(small: Any) -> Any:
    text = small.get_text_config()
    for name in WINDOWS:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > WINDOW:
            setattr(text, name, WINDOW)
    return small


def _multiple_of_8(value: float) -> int:
    return max(8, 8 * round(value / 8))
