"""What a model has answered: its text, and where it ends. Every backend reads it so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generation(NamedTuple):
    """What a model has answered to one prompt."""

    text: str  # without the text or token that ended it
    tokens: int  # generated, with those that ended it
    finish: str  # stop: one of the texts given | eos: the model's own end | length: cut
    ids: tuple[int, ...] = ()  # of these tokens


def generated_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of generated tokens; special ones leave none."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the texts `stop`."""
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


def end_tokens(generation_config: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end a text, as the model's generation config and its tokenizer name them."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None)
