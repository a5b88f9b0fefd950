"""Texts as token rows: what goes through the model in one row, and which of its outputs predict
which token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ipt.chat_templates import render
from ipt.console import console
from ipt.errors import UserError
from ipt.evaluation.backends.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipt.config import EvaluationConfig


SPACE = "Ġ"  # the byte of a space in names of tokens
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte in vocabularies made by SentencePiece


class EncodedRow(NamedTuple):
    """A tree of tokens laid out in one row: a trunk, then its branches one after another.

    A token sees the trunk and its own branch, as far as they lie before it. `segments` is 0 in the
    trunk and the number of the branch elsewhere; `positions` go on from the trunk's end in each
    branch. The output at `reads[i]` predicts `targets[i]`.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    reads: list[int]
    targets: list[int]


class Question(NamedTuple):
    """The tokens that all texts of a question share, and the rest of each: what is left of its
    prompt, then the option.
    """

    prompt: list[int]
    options: list[list[int]]
    truncated: bool  # the prompt lost tokens on its left
    scored: list[int] | None = (
        None  # how many tokens of each rest are the option's: its last ones; None: all
    )
    published: list[int] | None = (
        None  # how many of these the published scorer takes for the option's; None: all
    )

    @property
    def lengths(self) -> list[int]:
        """Scored tokens of each option."""
        return self.scored or [len(option) for option in self.options]


class EncodedDocument(NamedTuple):
    """Windows of a document that together score each of its tokens once; `n_bytes` of text are
    scored.
    """

    windows: list[EncodedRow]
    n_bytes: int


@dataclass
class Encoder:
    """Tokenises prompts and documents.

    Every text begins with `start`: the BOS token or nothing. Where nothing stands before the first
    token to score, a BOS token (or EOS where there is none) is put there. No text is longer than
    `max_length` tokens.

    Special tokens that a text spells out are text, as in training; those of a chat template are
    tokens. The text of BOS at the beginning of a prompt is BOS, and no second one is put before it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    start: list[int]
    max_length: int
    # prompts are the user's turn of the tokenizer's chat template, options the answer to it
    chat: bool = False
    # variables of the template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _has_warned: bool = field(default=False, init=False, repr=False)

    def question(self, prompt: str | Sequence[str], options: Sequence[str]) -> Question:
        """Tokenise prompt + option as whole strings, `prompt` being one for all options or one for
        each.

        What counts as prompt is the longest run of tokens common to the prompt alone and to the
        prompt with its options. So a token that straddles the border is scored, and scored for
        every option of that prompt. The published scorer takes as many tokens for the option's as
        the whole has more than the prompt alone.
        """
        options = (
            [self._special.fence(option.lstrip()) for option in options]
            if self.chat
            else list(options)
        )
        prompts = [self._turn(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        begin = prompts * len(options) if len(prompts) == 1 else prompts
        ids = self._prompt_ids(
            [*prompts, *(text + option for text, option in zip(begin, options, strict=True))],
            self.chat,
        )
        alone, wholes = ids[: len(prompts)], ids[len(prompts) :]
        if len(prompts) == 1:
            borders, sizes = [common_prefix(ids)] * len(wholes), [len(alone[0])] * len(wholes)
        else:
            borders, sizes = (
                [common_prefix(pair) for pair in zip(alone, wholes, strict=True)],
                [len(one) for one in alone],
            )
        scored = [len(whole) - border for whole, border in zip(wholes, borders, strict=True)]
        if 0 in scored:
            raise UserError(
                f"option {options[scored.index(0)]!r} after {begin[0][-40:]!r} adds no token: "
                "nothing of it can be scored"
            )
        published = [
            max(0, len(whole) - size) or count
            for whole, size, count in zip(wholes, sizes, scored, strict=True)
        ]
        return self._fitted(wholes, borders, len(prompts) == 1)._replace(
            scored=scored, published=published
        )

    def prompt(self, text: str, room: int) -> tuple[list[int], bool]:
        """Tokens of a prompt to be continued by up to `room` tokens, and whether it had to lose its
        beginning for them.
        """
        return self._fitted_prompt(self._turn(text), self.chat, room)

    def conversation(
        self, messages: Sequence[Mapping[str, str]], room: int
    ) -> tuple[list[int], bool]:
        """As `prompt`, of a conversation in the tokenizer's chat template."""
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
        """All tokens of a document. One that is longer than `max_length` is read in windows: each
        later window sees half a window of tokens that are scored already, and scores the rest.
        Without BOS the first token cannot be scored.
        """
        (tokens,) = self._special.text_ids([text])
        ids = self.start + tokens
        if len(ids) < 2:
            return EncodedDocument([], 0)
        unscored = 0 if self.start else self._first_bytes(text, tokens[0])
        return EncodedDocument(_windows(ids, self.max_length), len(text.encode()) - unscored)

    def _first_bytes(self, text: str, token: int) -> int:
        """The number of bytes of a text that its first token covers, possibly a part of a
        character.

        >>> encoder._first_bytes("① one", token)  # of the three bytes of ①, the first two are a token
        2
        """
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if self._pieces_are_bytes and token not in self.tokenizer.added_tokens_decoder:
            # some put a space before a text
            size = len(piece) - (piece.startswith(SPACE) and not text.startswith(" "))
        elif BYTE.fullmatch(piece):
            size = 1
        else:
            size = self._first_characters(text, token)
        return min(size, len(text.encode()))

    def _first_characters(self, text: str, token: int) -> int:
        """As `_first_bytes` for a token of whole characters, which may be written otherwise in the
        text or be unknown.
        """
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
        """Whether each character of a token's name is a byte, as in GPT-2's vocabulary and most
        later ones.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and '"ByteLevel"' in json.dumps(
            json.loads(backend.to_str())["decoder"]
        )

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    def _fitted(self, wholes: list[list[int]], borders: list[int], shared: bool) -> Question:
        """The texts as one tree, cut on the left to what fits; those that share their prompt
        (`shared`) lose the same tokens of it.
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
        """The prompt as the model is to read it."""
        return self._rendered([{"role": "user", "content": prompt}]) if self.chat else prompt

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        fenced = [
            {**message, "content": self._special.fence(message["content"])} for message in messages
        ]
        return render(self.tokenizer, fenced, self.chat_template_kwargs)

    def _prompt_ids(self, texts: Sequence[str], rendered: bool) -> list[list[int]]:
        """Tokens of prompts, or of texts that begin with one, without `start`. `rendered`: by a
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
            console.print(
                f"a prompt spells out {token}: special tokens in prompts are read as text, not as "
                "tokens",
                markup=False,
            )
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
            "a prompt is empty and the tokenizer has neither BOS nor EOS to begin with: give the "
            "task a prompt"
        )


def check_chat(
    tokenizer: "PreTrainedTokenizerBase", chat: bool, kwargs: Mapping[str, Any] | None = None
) -> bool:
    """`chat`, if the tokenizer has a chat template that shows a user's turn."""
    if chat and not tokenizer.chat_template:
        raise UserError(
            "evaluation.apply_chat_template is true, but the model's tokenizer has no chat template: set it to "
            "false"
        )
    if chat:
        render(tokenizer, [{"role": "user", "content": "a"}], kwargs or {})
    return chat


def make_encoder(
    tokenizer: "PreTrainedTokenizerBase", config: "EvaluationConfig", max_length: int
) -> Encoder:
    """The encoder of a model under the config; raises UserError, one line, for what its tokenizer
    cannot do.
    """
    kwargs = dict(config.chat_template_kwargs)
    return Encoder(
        tokenizer,
        start_tokens(tokenizer, config.add_bos_token),
        max_length,
        check_chat(tokenizer, config.apply_chat_template, kwargs),
        kwargs,
    )


def start_tokens(tokenizer: "PreTrainedTokenizerBase", bos: bool | None) -> list[int]:
    """[BOS] or []; `bos=None` asks the tokenizer whether it begins texts with BOS by itself."""
    token = tokenizer.bos_token_id
    if bos is None:
        bos = token is not None and tokenizer("a")["input_ids"][:1] == [token]
    if bos and token is None:
        raise UserError(
            "evaluation.add_bos_token is true, but the model's tokenizer has no BOS token: set it to false "
            "or null"
        )
    return [int(token)] if bos else []


def tree_row(question: Question) -> EncodedRow:
    """All options of a question in one row. The last token of an option is not fed: nothing is read
    from it.
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
    """One row for each option: the prompt and the option alone."""
    rows = [
        tree_row(Question(question.prompt, [option], question.truncated, [scored]))
        for option, scored in zip(question.options, question.lengths, strict=True)
    ]
    # a trunk with one branch is a trunk
    return [row._replace(segments=[0] * len(row.ids)) for row in rows]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens at the beginning are the same in all sequences."""
    length = 0
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _windows(ids: list[int], max_length: int) -> list[EncodedRow]:
    rows, scored = [], 1  # ids[:scored] are scored or need not be
    while scored < len(ids):
        begin = 0 if scored == 1 else scored - max(1, max_length // 2)
        end = min(len(ids), begin + max_length + 1)  # the last token of a window is not fed
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
