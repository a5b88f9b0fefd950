"""Texts as token rows: what goes through the model in one row, and which of its outputs predict which token."""

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
    """The tokens that all options share, and the rest of each option. A rest is never empty."""

    prompt: list[int]
    options: list[list[int]]
    truncated: bool  # the prompt lost tokens on its left


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

    def question(self, prompt: str, options: list[str]) -> Question:
        """Tokenise prompt + option as whole strings; the shared prompt is the longest prefix of tokens common to all of
        them and to the prompt alone. So a token that straddles the border is scored, and scored for every option.
        """
        prompt_ids, *wholes = self._tokenize([prompt, *(prompt + option for option in options)])
        border = common_prefix([prompt_ids, *wholes])
        rests = [whole[border:] for whole in wholes]
        empty = next((option for option, rest in zip(options, rests, strict=True) if not rest), None)
        if empty is not None:
            raise ValueError(f"option {empty!r} after {prompt[-40:]!r} adds no token: nothing of it can be scored")
        start = self.start or ([] if border else [self._fallback_start()])
        room = self.max_length - len(start) - max(len(rest) for rest in rests)
        if room < 1:
            raise ValueError(f"an option after {prompt[-40:]!r} fills all {self.max_length} tokens: raise evaluation.max_length")
        return Question(start + prompt_ids[max(0, border - room) : border], rests, truncated=border > room)

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

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: transformers warns of long texts, which we cut ourselves
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _fallback_start(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("a prompt is empty and the tokenizer has neither BOS nor EOS to begin with: give the task a prompt")


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
    for branch, option in enumerate(question.options, start=1):
        reads += [trunk - 1, *range(len(ids), len(ids) + len(option) - 1)]
        targets += option
        ids += option[:-1]
        positions += range(trunk, trunk + len(option) - 1)
        segments += [branch] * (len(option) - 1)
    return Row(ids, positions, segments, reads, targets)


def plain_rows(question: Question) -> list[Row]:
    """One row for each option: the prompt and the option alone."""
    rows = [tree_row(Question(question.prompt, [option], question.truncated)) for option in question.options]
    return [row._replace(segments=[0] * len(row.ids)) for row in rows]  # a trunk with one branch is a trunk


def common_prefix(sequences: list[list[int]]) -> int:
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
