"""Texts as token rows, and which outputs of the model predict which tokens."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ipt.chat_templates import render
from ipt.errors import UserError
from ipt.evaluation.backends.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import EvaluationConfig


log = logging.getLogger(__name__)
SPACE = "Ġ"  # a space in byte-level token names
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte in SentencePiece vocabularies


class EncodedRow(NamedTuple):
    """A tree of tokens in one row: a trunk, then its branches one after another.

    A token attends to earlier tokens of the trunk and of its own branch. `segments` is 0 in the
    trunk and the number of the branch elsewhere. In each branch `positions` continue from the end
    of the trunk. The output at `reads[i]` predicts `targets[i]`.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    reads: list[int]
    targets: list[int]


class Question(NamedTuple):
    """The tokens that all texts of a question share, and the rest of each text: the rest of its
    prompt, then the option.
    """

    prompt: list[int]
    options: list[list[int]]
    truncated: bool  # the prompt lost its beginning
    # number of tokens at the end of each rest that are scored; None: all
    scored: list[int] | None = None
    # number of these that the published scorer counts as the option; None: all
    published: list[int] | None = None

    @property
    def lengths(self) -> list[int]:
        """Number of scored tokens of each option."""
        return self.scored or [len(option) for option in self.options]


class EncodedDocument(NamedTuple):
    """Windows that together score each token of a document once; `n_bytes`: scored text."""

    windows: list[EncodedRow]
    n_bytes: int


@dataclass
class Encoder:
    """Tokenises prompts and documents.

    Every text begins with `start`: the BOS token or nothing. BOS (or EOS if there is none) is also
    added where no token precedes the first scored one. No text has more than `max_length` tokens.

    Special tokens in a text are encoded as text, as in training; those of a chat template are
    tokens. A prompt that begins with the text of BOS begins with BOS, without a second one.
    """

    tokenizer: "PreTrainedTokenizerBase"
    start: list[int]
    max_length: int
    # prompts are the user's turn in the chat template, options the assistant's answer
    chat: bool = False
    # variables of the chat template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _has_warned: bool = field(default=False, init=False, repr=False)

    def question(self, prompt: str | Sequence[str], options: Sequence[str]) -> Question:
        """Tokenise prompt + option as one string; `prompt` is one for all options or one for each.

        The longest common prefix of the tokens of the prompt alone and with its options counts as
        the prompt. So a token across the border is scored, for every option of the prompt. For the
        published scorer, the option has as many tokens as the whole has more than the prompt.
        """
        if self.chat:
            options = [self._special.fence(option.lstrip()) for option in options]
        prompts = [self._turn(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        begin = prompts * len(options) if len(prompts) == 1 else prompts
        texts = [text + option for text, option in zip(begin, options, strict=True)]
        ids = self._prompt_ids([*prompts, *texts], self.chat)
        alone, wholes = ids[: len(prompts)], ids[len(prompts) :]
        if len(prompts) == 1:
            borders = [common_prefix(ids)] * len(wholes)
            sizes = [len(alone[0])] * len(wholes)
        else:
            borders = [common_prefix(pair) for pair in zip(alone, wholes, strict=True)]
            sizes = [len(one) for one in alone]
        scored = [len(whole) - border for whole, border in zip(wholes, borders, strict=True)]
        if 0 in scored:
            raise UserError(
                f"option {options[scored.index(0)]!r} after {begin[0][-40:]!r} adds no token: "
                "it cannot be scored"
            )
        published = [
            max(0, len(whole) - size) or count
            for whole, size, count in zip(wholes, sizes, scored, strict=True)
        ]
        return self._fitted(wholes, borders, len(prompts) == 1)._replace(
            scored=scored, published=published
        )

    def prompt(self, text: str, room: int) -> tuple[list[int], bool]:
        """Tokens of a prompt before up to `room` new tokens, and whether it lost its beginning."""
        return self._fitted_prompt(self._turn(text), self.chat, room)

    def conversation(
        self, messages: Sequence[Mapping[str, str]], room: int
    ) -> tuple[list[int], bool]:
        """As `prompt`, for a conversation in the chat template."""
        return self._fitted_prompt(self._rendered(messages), True, room)

    def _fitted_prompt(self, text: str, rendered: bool, room: int) -> tuple[list[int], bool]:
        (ids,) = self._prompt_ids([text], rendered)
        start = self.start or ([] if ids else [self._fallback_start()])
        kept = self.max_length - len(start) - room
        if kept < 1:
            raise UserError(
                f"{room} new tokens leave no tokens for a prompt in {self.max_length}: lower "
                "max_new_tokens of the task"
            )
        return start + ids[-kept:], len(ids) > kept

    def document(self, text: str) -> EncodedDocument:
        """All tokens of a document, in windows of `max_length`. The first half of each later window
        is context that is already scored. Without BOS the first token cannot be scored.
        """
        (tokens,) = self._special.text_ids([text])
        ids = self.start + tokens
        if len(ids) < 2:
            return EncodedDocument([], 0)
        unscored = 0 if self.start else self._first_bytes(text, tokens[0])
        return EncodedDocument(_windows(ids, self.max_length), len(text.encode()) - unscored)

    def _first_bytes(self, text: str, token: int) -> int:
        """Number of bytes of a text that its first token covers, possibly a part of a character.

        >>> encoder._first_bytes("① one", token)  # the token is the first two of three bytes of ①
        2
        """
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if self._pieces_are_bytes and token not in self.tokenizer.added_tokens_decoder:
            # some tokenizers add a space before a text
            size = len(piece) - (piece.startswith(SPACE) and not text.startswith(" "))
        elif BYTE.fullmatch(piece):
            size = 1
        else:
            size = self._first_characters(text, token)
        return min(size, len(text.encode()))

    def _first_characters(self, text: str, token: int) -> int:
        """As `_first_bytes` for a token of whole characters, which may be normalised or unknown."""
        written = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if not written or not self.tokenizer.is_fast:
            return len(written.encode())
        found = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return len(text[: found["offset_mapping"][0][1]].encode())

    @cached_property
    def _pieces_are_bytes(self) -> bool:
        """Whether characters of token names are bytes, as in GPT-2 and most later vocabularies."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and '"ByteLevel"' in json.dumps(
            json.loads(backend.to_str())["decoder"]
        )

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    def _fitted(self, wholes: list[list[int]], borders: list[int], shared: bool) -> Question:
        """The texts as one tree, truncated on the left; texts with a shared prompt lose the same
        tokens.
        """
        start = self.start or ([] if min(borders) else [self._fallback_start()])
        cuts = [max(0, len(start) + len(whole) - self.max_length) for whole in wholes]
        cuts = [max(cuts)] * len(cuts) if shared else cuts
        for whole, border, cut in zip(wholes, borders, cuts, strict=True):
            if cut and cut >= border:
                end = self.tokenizer.decode(whole[-8:])
                raise UserError(
                    f"the option that ends in {end!r} fills all {self.max_length} tokens: raise "
                    "evaluation.max_length"
                )
        wholes = [whole[cut:] for whole, cut in zip(wholes, cuts, strict=True)]
        trunk = min(
            common_prefix(wholes),
            *(border - cut for border, cut in zip(borders, cuts, strict=True)),
        )
        return Question(
            start + wholes[0][:trunk], [whole[trunk:] for whole in wholes], truncated=any(cuts)
        )

    def _turn(self, prompt: str) -> str:
        """The prompt, in the chat template if `chat` is set."""
        return self._rendered([{"role": "user", "content": prompt}]) if self.chat else prompt

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        fenced = [
            {**message, "content": self._special.fence(message["content"])} for message in messages
        ]
        return render(self.tokenizer, fenced, self.chat_template_kwargs)

    def _prompt_ids(self, texts: Sequence[str], rendered: bool) -> list[list[int]]:
        """Tokens, without `start`, of prompts or of texts that begin with one. `rendered`: by a
        chat template.
        """
        bos = str(self.tokenizer.bos_token or "")
        spelt_out = [bool(bos) and text.startswith(bos) for text in texts]
        rest = [
            text[len(bos) :] if has_bos else text
            for text, has_bos in zip(texts, spelt_out, strict=True)
        ]
        ids = self._special.rendered_ids(rest) if rendered else self._special.text_ids(rest)
        if not rendered and not self._has_warned and (token := self._special.in_text(rest)):
            self._has_warned = True
            log.warning(f"a prompt contains {token}: special tokens in prompts are encoded as text")
        if not self.start:
            ids = [
                [self._fallback_start(), *one] if has_bos else one
                for one, has_bos in zip(ids, spelt_out, strict=True)
            ]
        return ids

    def _fallback_start(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(
            "a prompt is empty and the tokenizer has neither BOS nor EOS: give the task a prompt"
        )


def check_chat(
    tokenizer: "PreTrainedTokenizerBase", chat: bool, kwargs: Mapping[str, Any] | None = None
) -> bool:
    """`chat`. Raises UserError if it is set and the chat template is missing or fails."""
    if chat and not tokenizer.chat_template:
        raise UserError(
            "evaluation.apply_chat_template is true, but the model's tokenizer has no chat template"
            ": set it to false"
        )
    if chat:
        render(tokenizer, [{"role": "user", "content": "a"}], kwargs or {})
    return chat


def make_encoder(
    tokenizer: "PreTrainedTokenizerBase", config: "EvaluationConfig", max_length: int
) -> Encoder:
    """The encoder of a model. Raises UserError for settings that its tokenizer does not support."""
    kwargs = dict(config.chat_template_kwargs)
    return Encoder(
        tokenizer,
        start_tokens(tokenizer, config.add_bos_token),
        max_length,
        check_chat(tokenizer, config.apply_chat_template, kwargs),
        kwargs,
    )


def start_tokens(tokenizer: "PreTrainedTokenizerBase", bos: bool | None) -> list[int]:
    """[BOS] or []; `bos=None`: as the tokenizer does by default."""
    token = tokenizer.bos_token_id
    if bos is None:
        bos = token is not None and tokenizer("a")["input_ids"][:1] == [token]
    if bos and token is None:
        raise UserError(
            "evaluation.add_bos_token is true, but the model's tokenizer has no BOS token: set it "
            "to false or null"
        )
    return [int(token)] if bos else []


def tree_row(question: Question) -> EncodedRow:
    """All options of a question in one row. The last token of an option is no input: its output is
    not used.
    """
    ids, positions = list(question.prompt), list(range(len(question.prompt)))
    segments, reads, targets = [0] * len(ids), [], []
    trunk = len(ids)
    for branch, (option, scored) in enumerate(
        zip(question.options, question.lengths, strict=True), start=1
    ):
        outputs = [trunk - 1, *range(len(ids), len(ids) + len(option) - 1)]
        reads += outputs[-scored:]
        targets += option[-scored:]
        ids += option[:-1]
        positions += range(trunk, trunk + len(option) - 1)
        segments += [branch] * (len(option) - 1)
    return EncodedRow(ids, positions, segments, reads, targets)


def plain_rows(question: Question) -> list[EncodedRow]:
    """A row for each option: the prompt and the option."""
    rows = [
        tree_row(Question(question.prompt, [option], question.truncated, [scored]))
        for option, scored in zip(question.options, question.lengths, strict=True)
    ]
    # a trunk with one branch is a trunk
    return [row._replace(segments=[0] * len(row.ids)) for row in rows]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _windows(ids: list[int], max_length: int) -> list[EncodedRow]:
    rows, scored = [], 1  # ids[:scored] are scored, except for the first
    while scored < len(ids):
        begin = 0 if scored == 1 else scored - max(1, max_length // 2)
        end = min(len(ids), begin + max_length + 1)  # the last token of a window is no input
        rows.append(
            EncodedRow(
                ids[begin : end - 1],
                *_causal(end - 1 - begin),
                list(range(scored - 1 - begin, end - 1 - begin)),
                ids[scored:end],
            )
        )
        scored = end
    return rows


def _causal(length: int) -> tuple[list[int], list[int]]:
    """Positions and segments of a row without branches."""
    return list(range(length)), [0] * length
