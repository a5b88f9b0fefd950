"""Prompts as token ids: how a document begins, and how a finished shot is put before the next
document.

A format (`synthesis.format`) is a class with the methods of `PromptFormat`; what runs the chains
knows no format.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ipt.errors import UserError
from ipt.synthesis.formats.tags import END, Parsed, context_text, grammar, pairs_text, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import SynthesisConfig


RULE_BASED = "rule_based"  # the format without a model, and so without a vocabulary


class Message(NamedTuple):
    role: str  # system | user | assistant
    content: str


class Prompt(NamedTuple):
    """What a model is given, as token ids; for chat models also as the conversation that the ids
    spell.
    """

    ids: list[int]
    messages: tuple[Message, ...] = ()


class Vocabulary:
    """Text to token ids and back, with nothing added, nothing left out and no special token read
    from a document's text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {tokenizer.name_or_path}: it has no EOS token, which ends each "
                "generation: set eos_token"
            )
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: int = tokenizer.eos_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.tokenizer = tokenizer
        # Some tokenizers put a space before the first word of what they encode and take it away
        # from the first word of what they decode. Text that continues other text is therefore
        # encoded and decoded behind a line break.
        self._anchor = self.encode("\n")
        self._anchor_length = len(self._decode(self._anchor))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. A special token that is spelt out in a document is plain text here."""
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` where it follows other text, so that it decodes to itself there."""
        ids = self.encode("\n" + text)
        return (
            ids[len(self._anchor) :]
            if ids[: len(self._anchor)] == self._anchor
            else self.encode(text)
        )

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of token ids that follow others; special tokens leave no text."""
        return self._decode([*self._anchor, *ids])[self._anchor_length :]

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class PromptFormat(Protocol):
    """What chains and engines need to know of a prompt format."""

    stop_ids: list[int]  # tokens that end a generation
    pair_end: str  # what an output says at the end of each pair
    # What engines hold the output to, if they can: a JSON schema or a grammar in xgrammar's EBNF,
    # one of them at most.
    schema: dict[str, Any] | None
    grammar: str | None

    def begin(self, document: str) -> Prompt:
        """The prompt of `document` alone."""
        ...

    def follow(self, history: Prompt, document: str) -> Prompt:
        """The prompt of `document` behind what `finish` gave for the shot before it; begins with
        the ids of `history`.
        """
        ...

    def parse(self, output: str) -> Parsed: ...

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        """What goes before the next document: this prompt, and of its output what was accepted."""
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
        """The output's own ids where they say exactly the accepted pairs, so that the engine finds
        them in its prefix cache.

        Otherwise (a piece was rejected, a space was doubled, a special token stood in between) the
        pairs are rendered and encoded anew.
        """
        text = pairs_text(parsed.pairs)
        ids = self._prefix(output_ids, text) if output.startswith(text) else None
        said = self._vocabulary.encode_continuation(text) if ids is None else ids
        return Prompt([*prompt.ids, *said, self._vocabulary.eos])

    def _prefix(self, ids: list[int], text: str) -> list[int] | None:
        """The first of `ids` that say exactly `text`; None if a token reaches beyond it or a
        special token is among them.
        """

        def length(end: int) -> int:
            return len(self._vocabulary.decode_continuation(ids[:end]))

        end = bisect_left(range(len(ids) + 1), len(text), key=length)
        found = ids[:end]
        if (
            self._vocabulary.special.intersection(found)
            or self._vocabulary.decode_continuation(found) != text
        ):
            return None
        return found
