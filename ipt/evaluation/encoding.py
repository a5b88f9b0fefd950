"""Texts as token rows: what goes through the model in one row, and which of its outputs predict which token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(NamedTuple):
    """A tree of tokens laid out in one row: a trunk, then its branches one after another.

    A token sees the trunk and its own branch, as far as they lie before it. `segments` is 0 in the trunk and the number of
    the branch elsewhere; `positions` go on from the trunk's end in each branch. The output at `reads[i]` predicts `targets[i]`.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    reads: list[int]
    targets: list[int]


class Question(NamedTuple):
    """The tokens that all texts of a question share, and the rest of each: what is left of its prompt, then the option."""

    prompt: list[int]
    options: list[list[int]]
    truncated: bool  # the prompt lost tokens on its left
    scored: list[int] | None = None  # how many tokens of each rest are the option's: its last ones; None: all
    published: list[int] | None = None  # how many of these the published scorer takes for the option's; None: all

    @property
    def lengths(self) -> list[int]:
        """Scored tokens of each option."""
        return self.scored or [len(option) for option in self.options]


class Document(NamedTuple):
    """Windows of a document that together score each of its tokens once; `n_bytes` of text are scored."""

    windows: list[Row]
    n_bytes: int


@dataclass
class Encoder:
    """Tokenises prompts and documents.

    Every text begins with `start`: the BOS token or nothing. Where nothing stands before the first token to score, a BOS token
    (or EOS where there is none) is put there. No text is longer than `max_length` tokens.
    """

    tokenizer: "PreTrainedTokenizerBase"
    start: list[int]
    max_length: int
    chat: bool = False  # prompts are the user's turn of the tokenizer's chat template, options the answer to it

    def question(self, prompt: str | Sequence[str], options: Sequence[str]) -> Question:
        """Tokenise prompt + option as whole strings, `prompt` being one for all options or one for each.

        What counts as prompt is the longest run of tokens common to the prompt alone and to the prompt with its options. So a token
        that straddles the border is scored, and scored for every option of that prompt. The published scorer takes as many tokens
        for the option's as the whole has more than the prompt alone.
        """
        options = [option.lstrip() for option in options] if self.chat else list(options)
        prompts = [self._turn(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        begin = prompts * len(options) if len(prompts) == 1 else prompts
        ids = self._tokenize([*prompts, *(text + option for text, option in zip(begin, options, strict=True))])
        alone, wholes = ids[: len(prompts)], ids[len(prompts) :]
        if len(prompts) == 1:
            borders, sizes = [common_prefix(ids)] * len(wholes), [len(alone[0])] * len(wholes)
        else:
            borders, sizes = [common_prefix(pair) for pair in zip(alone, wholes, strict=True)], [len(one) for one in alone]
        scored = [len(whole) - border for whole, border in zip(wholes, borders, strict=True)]
        if 0 in scored:
            raise ValueError(f"option {options[scored.index(0)]!r} after {begin[0][-40:]!r} adds no token: nothing of it can be scored")
        published = [max(0, len(whole) - size) or count for whole, size, count in zip(wholes, sizes, scored, strict=True)]
        return self._fitted(wholes, borders, len(prompts) == 1)._replace(scored=scored, published=published)

    def prompt(self, text: str, room: int) -> tuple[list[int], bool]:
        """Tokens of a prompt to be continued by up to `room` tokens, and whether it had to lose its beginning for them."""
        (ids,) = self._tokenize([self._turn(text)])
        start = self.start or ([] if ids else [self._fallback_start()])
        kept = self.max_length - len(start) - room
        if kept < 1:
            raise ValueError(f"{room} new tokens leave no room for a prompt in {self.max_length}: lower max_new_tokens of the task")
        return start + ids[-kept:], len(ids) > kept

    def document(self, text: str) -> Document:
        """All tokens of a document. One that is longer than `max_length` is read in windows: each later window sees half a
        window of tokens that are scored already, and scores the rest. Without BOS the first token cannot be scored.
        """
        (tokens,) = self._tokenize([text])
        ids = self.start + tokens
        if len(ids) < 2:
            return Document([], 0)
        unscored = "" if self.start else str(self.tokenizer.decode(ids[:1]))
        return Document(_windows(ids, self.max_length), len(text.encode()) - len(unscored.encode()))

    def _fitted(self, wholes: list[list[int]], borders: list[int], shared: bool) -> Question:
        """The texts as one tree, cut on the left to what fits; those that share their prompt (`shared`) lose the same tokens of it."""
        start = self.start or ([] if min(borders) else [self._fallback_start()])
        cuts = [max(0, len(start) + len(whole) - self.max_length) for whole in wholes]
        cuts = [max(cuts)] * len(cuts) if shared else cuts
        for whole, border, cut in zip(wholes, borders, cuts, strict=True):
            if cut and cut >= border:
                end = self.tokenizer.decode(whole[-8:])
                raise ValueError(f"the option that ends in {end!r} fills all {self.max_length} tokens: raise evaluation.max_length")
        wholes = [whole[cut:] for whole, cut in zip(wholes, cuts, strict=True)]
        trunk = min(common_prefix(wholes), *(border - cut for border, cut in zip(borders, cuts, strict=True)))
        return Question(start + wholes[0][:trunk], [whole[trunk:] for whole in wholes], truncated=any(cuts))

    def _turn(self, prompt: str) -> str:
        """The prompt as the model is to read it, without the BOS that `start` puts before it."""
        if not self.chat:
            return prompt
        turn = str(self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
        return turn.removeprefix(str(self.tokenizer.bos_token)) if self.start else turn

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: transformers warns of long texts, which we cut ourselves
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _fallback_start(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("a prompt is empty and the tokenizer has neither BOS nor EOS to begin with: give the task a prompt")


def check_chat(tokenizer: "PreTrainedTokenizerBase", chat: bool) -> bool:
    """`chat`, if the tokenizer allows it."""
    if chat and not tokenizer.chat_template:
        raise ValueError("evaluation.chat is true, but the model's tokenizer has no chat template: set it to false")
    return chat


def start_tokens(tokenizer: "PreTrainedTokenizerBase", bos: bool | None) -> list[int]:
    """[BOS] or []; `bos=None` asks the tokenizer whether it begins texts with BOS by itself."""
    token = tokenizer.bos_token_id
    if bos is None:
        bos = token is not None and tokenizer("a")["input_ids"][:1] == [token]
    if bos and token is None:
        raise ValueError("evaluation.bos is true, but the model's tokenizer has no BOS token: set it to false or null")
    return [int(token)] if bos else []


def tree_row(question: Question) -> Row:
    """All options of a question in one row. The last token of an option is not fed: nothing is read from it."""
    ids, positions = list(question.prompt), list(range(len(question.prompt)))
    segments, reads, targets = [0] * len(ids), [], []
    trunk = len(ids)
    for branch, (option, scored) in enumerate(zip(question.options, question.lengths, strict=True), start=1):
        outputs = [trunk - 1, *range(len(ids), len(ids) + len(option) - 1)]
        reads += outputs[-scored:]
        targets += option[-scored:]
        ids += option[:-1]
        positions += range(trunk, trunk + len(option) - 1)
        segments += [branch] * (len(option) - 1)
    return Row(ids, positions, segments, reads, targets)


def plain_rows(question: Question) -> list[Row]:
    """One row for each option: the prompt and the option alone."""
    rows = [
        tree_row(Question(question.prompt, [option], question.truncated, [scored]))
        for option, scored in zip(question.options, question.lengths, strict=True)
    ]
    return [row._replace(segments=[0] * len(row.ids)) for row in rows]  # a trunk with one branch is a trunk


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens at the beginning are the same in all sequences."""
    length = 0
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _windows(ids: list[int], max_length: int) -> list[Row]:
    rows, scored = [], 1  # ids[:scored] are scored or need not be
    while scored < len(ids):
        begin = 0 if scored == 1 else scored - max(1, max_length // 2)
        end = min(len(ids), begin + max_length + 1)  # the last token of a window is not fed
        rows.append(Row(ids[begin : end - 1], *_causal(end - 1 - begin), list(range(scored - 1 - begin, end - 1 - begin)), ids[scored:end]))
        scored = end
    return rows


def _causal(length: int) -> tuple[list[int], list[int]]:
    """Positions and segments of a row without branches."""
    return list(range(length)), [0] * length
