"""Prompts as token ids: how a document begins, and how a finished shot is put before the next document.

A format (`synthesis.format`) is a class with the methods of `PromptFormat`; what runs the chains knows no format.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ipt.synthesis.format import Pair, Parsed, context_text, pairs_text, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """Text to token ids and back, with nothing added, nothing left out and no special token read from a document's text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer of {tokenizer.name_or_path}: it has no EOS token, which ends each generation: set eos_token")
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: int = tokenizer.eos_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        # Some tokenizers put a space before the first word of what they encode and take it away from the first word of what
        # they decode. Text that continues other text is therefore encoded and decoded behind a line break.
        self._anchor = self.encode("\n")
        self._anchor_length = len(self._decode(self._anchor))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. A special token that is spelt out in a document is plain text here."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` where it follows other text, so that it decodes to itself there."""
        ids = self.encode("\n" + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else self.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of token ids that follow others; special tokens leave no text."""
        return self._decode([*self._anchor, *ids])[self._anchor_length :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class PromptFormat(Protocol):
    """What a chain needs to know of a prompt format."""

    stop_ids: list[int]

    def begin(self, document: str) -> list[int]:
        """Token ids of the prompt of `document` alone."""
        ...

    def parse(self, output: str) -> Parsed: ...

    def finish(self, prompt: list[int], output_ids: list[int], output: str, pairs: list[Pair]) -> list[int]:
        """Token ids that go before the next document: this prompt, and of its output the accepted pairs only."""
        ...


class IptFormat:
    """The format of the published synthesizer: each shot is BOS, the document, its pairs, EOS (paper section 3.1)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.stop_ids = [vocabulary.eos]
        self._vocabulary = vocabulary

    def begin(self, document: str) -> list[int]:
        return self._vocabulary.bos + self._vocabulary.encode(context_text(document))

    def parse(self, output: str) -> Parsed:
        return parse(output)

    def finish(self, prompt: list[int], output_ids: list[int], output: str, pairs: list[Pair]) -> list[int]:
        """The output's own ids where they say exactly the accepted pairs, so that the engine finds them in its prefix cache.

        Otherwise (a piece was rejected, a space was doubled, a special token stood in between) the pairs are rendered and encoded anew.
        """
        text = pairs_text(pairs)
        ids = self._prefix(output_ids, text) if output.startswith(text) else None
        return [*prompt, *(self._vocabulary.encode_continuation(text) if ids is None else ids), self._vocabulary.eos]

    def _prefix(self, ids: list[int], text: str) -> list[int] | None:
        """The first of `ids` that say exactly `text`; None if a token reaches beyond it or a special token is among them."""

        def length(end: int) -> int:
            return len(self._vocabulary.decode_continuation(ids[:end]))

        end = bisect_left(range(len(ids) + 1), len(text), key=length)
        found = ids[:end]
        if self._vocabulary.special.intersection(found) or self._vocabulary.decode_continuation(found) != text:
            return None
        return found


FORMATS: dict[str, type[IptFormat]] = {"ipt": IptFormat}
