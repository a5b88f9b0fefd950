"""The synthesizer's text format and its parser (paper section 3.1; data format of the released synthesizer).

One example is `<s> <CON> {context} </CON>\\n\\n<QUE> {question} <ANS> {answer} </END>\\n\\n<QUE> … </END></s>`, where `<s>` and
`</s>` stand for the model's own BOS and EOS tokens. The tags are plain text, not added vocabulary. An M-shot prompt is
M - 1 whole examples followed by the beginning of another one.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

CONTEXT_START, CONTEXT_END, QUESTION, ANSWER, END = "<CON>", "</CON>", "<QUE>", "<ANS>", "</END>"

# Reasons that the published rules do not have: they take an empty question, and a question or answer with another tag in it, of which
# they take out question tags only.
STRICTER = ("empty_question", "tag_inside")

# A pair as the format has it, behind another one or at the beginning; its question and answer are stripped.
_PAIR = re.compile(rf"(?:\A|(?<={END}))\s*{QUESTION} ([^\s<][^<]*[^\s<]) {ANSWER} ([^\s<][^<]*[^\s<]) {END}")


class Pair(NamedTuple):
    question: str
    answer: str


class Parsed(NamedTuple):
    """Pairs in the order of the output, and how many pieces were rejected for which reason."""

    pairs: list[Pair]
    rejected: Counter[str]
    rewrite: str = ""  # a text that was written in place of pairs or beside them, by formats that have such

    @property
    def found(self) -> bool:
        """Whether the output gave anything."""
        return bool(self.pairs or self.rewrite)


def context_text(context: str) -> str:
    """What follows BOS: the document between its tags. The model's output continues this text."""
    return f" {CONTEXT_START} {context} {CONTEXT_END}\n\n"


def pairs_text(pairs: Iterable[Pair]) -> str:
    """The pairs as the model writes them. EOS follows with nothing between."""
    return "\n\n".join(f"{QUESTION} {pair.question} {ANSWER} {pair.answer} {END}" for pair in pairs)


def parse(output: str) -> Parsed:
    """Read the pairs from a generation by the published rules, and reject what those would let into training texts.

    The output is cut at each end tag. A piece counts when it holds exactly one answer tag, begins with a question tag and
    its answer is not empty. Of pairs with the same question, upper and lower case alike, the first is kept. A last piece
    without its end tag is a truncated generation. Ours alone are the reasons in STRICTER.
    """
    found = _PAIR.findall(output)
    only_pairs = output.endswith(END) and output.count("<") == 3 * len(found)
    if only_pairs and len({question.lower() for question, _ in found}) == len(found):  # the common case, twice as fast
        return Parsed([Pair(*pair) for pair in found], Counter())
    return _parse_pieces(output)


def _parse_pieces(output: str) -> Parsed:
    pairs: list[Pair] = []
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    *pieces, tail = output.split(END)
    if tail.strip():
        rejected["truncated"] += 1
    for piece in pieces:
        reason, pair = _parse_piece(piece)
        if pair is not None and pair.question.lower() in seen:
            reason, pair = "repeated_question", None
        if pair is None:
            rejected[reason] += 1
        else:
            seen.add(pair.question.lower())
            pairs.append(pair)
    return Parsed(pairs, rejected)


def _parse_piece(piece: str) -> tuple[str, Pair | None]:
    if piece.count(ANSWER) != 1:
        return "no_answer_tag" if ANSWER not in piece else "several_answer_tags", None
    question, answer = (side.strip() for side in piece.split(ANSWER))
    if not question.startswith(QUESTION):
        return "no_question_tag", None
    question = question.removeprefix(QUESTION).strip()
    if not answer:
        return "empty_answer", None
    if not question:
        return "empty_question", None
    if any(tag in piece for tag in (CONTEXT_START, CONTEXT_END)) or QUESTION in question or QUESTION in answer:
        return "tag_inside", None
    return "", Pair(question, answer)
