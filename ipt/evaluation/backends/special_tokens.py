"""Special tokens: text in documents and prompts, tokens in the output of a chat template."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# private use: before and after the number of a special token that is text
FENCE = "\ue0f7"
# some tokenizers add a space before the first word, see ipt.synthesis.formats.base.Vocabulary
ANCHOR = "\n"


class SpecialTokens:
    """Marks special tokens in a user's text, so that they stay text inside a chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = (
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._texts = [*filter(None, longest_first), FENCE]
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))

    def fence(self, text: str) -> str:
        """`text` with each special token replaced by a mark."""
        return self._pattern.sub(lambda found: f"{FENCE}{self._texts.index(found[0])}{FENCE}", text)

    def in_text(self, texts: Iterable[str]) -> str | None:
        """A special token in one of the texts, if there is one."""
        found = next(filter(None, map(self._pattern.search, texts)), None)
        return found and found[0]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids, with special tokens as text."""
        return self._encode(texts, split=True)

    def rendered_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids, with special tokens as tokens and marked ones as text."""
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
        """Token ids of `text` after other text."""
        if not text:
            return []
        anchor, anchored, alone = self._encode([ANCHOR, ANCHOR + text, text], split)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone

    def _encode(self, texts: list[str], split: bool) -> list[list[int]]:
        # verbose=False: no warning about long texts, which the encoder truncates
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=split, verbose=False
        )["input_ids"]
