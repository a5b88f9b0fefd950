"""Prompt formats: how a document becomes a prompt in token ids, and how a finished shot precedes
the next document.

A format (`synthesis.format`) is a class with the methods of `PromptFormat`; chains and engines do
not depend on the format.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ipt.errors import UserError
from ipt.synthesis.formats.tags import END, Parsed, context_text, grammar, pairs_text, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import SynthesisConfig


RULE_BASED = "rule_based"  # the format without a model and a vocabulary


class Message(NamedTuple):
    role: str  # system | user | assistant
    content: str


class Prompt(NamedTuple):
    """The input of a model as token ids; for chat models also as messages."""

    ids: list[int]
    messages: tuple[Message, ...] = ()


class Vocabulary:
    """Converts text to token ids and back, without adding or dropping anything, and without
    reading special tokens from the text of a document.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no EOS token to end generations: "
                "set eos_token"
            )
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: int = tokenizer.eos_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.tokenizer = tokenizer
        # Some tokenizers add a space before the first word when they encode, and remove it when
        # they decode. Text that continues other text is therefore encoded and decoded after a line
        # break.
        self._anchor = self.encode("\n")
        self._anchor_length = len(self._decode(self._anchor))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens that a document spells out are plain text."""
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` that decode to `text` after other tokens."""
        ids = self.encode("\n" + text)
        length = len(self._anchor)
        return ids[length:] if ids[:length] == self._anchor else self.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of token ids that follow others, without special tokens."""
        return self._decode([*self._anchor, *ids])[self._anchor_length :]

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class PromptFormat(Protocol):
    """What chains and engines use of a prompt format."""

    stop_ids: list[int]  # tokens that end a generation
    pair_end: str  # the text at the end of each pair in an output
    # Constraint of the output, for engines that support it: a JSON schema, or a grammar in
    # xgrammar's EBNF, or neither.
    schema: dict[str, Any] | None
    grammar: str | None

    def begin(self, document: str) -> Prompt:
        """The prompt for `document` alone."""
        ...

    def follow(self, history: Prompt, document: str) -> Prompt:
        """The prompt for `document` after the result of `finish` for the previous shot. It begins
        with the ids of `history`.
        """
        ...

    def parse(self, output: str) -> Parsed: ...

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        """What precedes the next document: this prompt, and the accepted part of its output."""
        ...


class IptFormat:
    """The format of the published synthesizer: each shot is BOS, the document, its pairs, EOS
    (paper section 3.1).
    """

    pair_end = END
    schema: dict[str, Any] | None = None

    def __init__(self, vocabulary: Vocabulary, config: "SynthesisConfig") -> None:
        self.grammar = None if config.max_pairs is None else grammar(config.max_pairs)
        self.stop_ids = [vocabulary.eos]
        self._vocabulary = vocabulary

    def begin(self, document: str) -> Prompt:
        return Prompt(self._vocabulary.bos + self._vocabulary.encode(context_text(document)))

    def follow(self, history: Prompt, document: str) -> Prompt:
        return Prompt(history.ids + self.begin(document).ids)

    def parse(self, output: str) -> Parsed:
        return parse(output)

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        """See `PromptFormat`. The ids of the output are used if they decode to exactly the accepted
        pairs, because the engine has them in its prefix cache.

        Otherwise (a piece was rejected, there are double spaces or special tokens) the pairs are
        encoded again.
        """
        text = pairs_text(parsed.pairs)
        ids = self._prefix(output_ids, text) if output.startswith(text) else None
        if ids is None:
            ids = self._vocabulary.encode_continuation(text)
        return Prompt([*prompt.ids, *ids, self._vocabulary.eos])

    def _prefix(self, ids: list[int], text: str) -> list[int] | None:
        """The prefix of `ids` that decodes to `text`; None without one, or if it has a special
        token.
        """

        def length(end: int) -> int:
            return len(self._vocabulary.decode_continuation(ids[:end]))

        end = bisect_left(range(len(ids) + 1), len(text), key=length)
        found = ids[:end]
        is_exact = self._vocabulary.decode_continuation(found) == text
        return found if is_exact and not self._vocabulary.special.intersection(found) else None
