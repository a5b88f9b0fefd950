"""Special tokens that a text spells out: in documents and prompts they are text, in what a chat
template writes they are tokens.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FENCE = (
    "\ue0f7"  # of private use: stands on both sides of the number of a special token that is text
)
# some tokenizers put a space before the first word of what they encode: see
# ipt.synthesis.formats.base.Vocabulary
ANCHOR = "\n"


class SpecialTokens:
    """Fences off special tokens in a user's text, so that they stay text inside a chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = (
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._texts = [*filter(None, longest_first), FENCE]
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))

    def fence(self, text: str) -> str:
        """`text` with a mark in place of each special token that it spells out."""
        return self._pattern.sub(lambda found: f"{FENCE}{self._texts.index(found[0])}{FENCE}", text)

    def in_text(self, texts: Iterable[str]) -> str | None:
        """A special token that one of the texts spells out."""
        found = next(filter(None, map(self._pattern.search, texts)), None)
        return found and found[0]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts in which special tokens are text."""
        return self._encode(texts, split=True)

    def rendered_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts in which special tokens are tokens, and fenced ones text."""
        return [
            self._pieces(text) if FENCE in text else ids
            for text, ids in zip(texts, self._encode(texts, split=False), strict=True)
        ]

    def _pieces(self, text: str) -> list[int]:
        first, *rest = re.split(f"{FENCE}(\\d+){FENCE}", text)
        ids = self._encode([first], split=False)[0]
        for number, piece in zip(rest[::2], rest[1::2], strict=True):
            ids = (
                ids
                + self._continuation(self._texts[int(number)], split=True)
                + self._continuation(piece, split=False)
            )
        return ids

    def _continuation(self, text: str, split: bool) -> list[int]:
        """Token ids of `text` where it follows other text."""
        if not text:
            return []
        anchor, anchored, alone = self._encode([ANCHOR, ANCHOR + text, text], split)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone

    def _encode(self, texts: list[str], split: bool) -> list[list[int]]:
        # verbose=False: transformers warns of long texts, which the encoder cuts itself
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=split, verbose=False
        )["input_ids"]
