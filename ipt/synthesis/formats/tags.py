"""The synthesizer's text format and its parser (paper section 3.1; data format of the released
synthesizer).

One example, with `<s>` and `</s>` for the model's own BOS and EOS tokens:

    <s> <CON> {context} </CON>

    <QUE> {question} <ANS> {answer} </END>

    <QUE> {question} <ANS> {answer} </END></s>

The tags are plain text, not special tokens. An M-shot prompt is M - 1 complete examples and the
beginning of another one.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

CONTEXT_START, CONTEXT_END, QUESTION, ANSWER, END = "<CON>", "</CON>", "<QUE>", "<ANS>", "</END>"

# Reasons of ours: the published rules accept an empty question, and a question or answer that
# contains another tag.
STRICTER = ("empty_question", "tag_inside")

_FIRST, _MIDDLE, _NEXT, _LAST = f"{QUESTION} ", f" {ANSWER} ", f" {END}\n\n{QUESTION} ", f" {END}"
_NOTHING: Counter[str] = Counter()  # shared, because nobody changes the result of the parser


class Pair(NamedTuple):
    question: str
    answer: str


class Parsed(NamedTuple):
    """Pairs in the order of the output, and the number of rejected pieces by reason."""

    pairs: list[Pair]
    rejected: Counter[str]
    rewrite: str = ""  # a text instead of pairs or in addition to them (chat prompts)

    @property
    def found(self) -> bool:
        """Whether the output contained anything."""
        return bool(self.pairs or self.rewrite)


def context_text(context: str) -> str:
    """The text after BOS: the document between its tags. The model continues it with pairs."""
    return f" {CONTEXT_START} {context} {CONTEXT_END}\n\n"


def pairs_text(pairs: Iterable[Pair]) -> str:
    """The pairs as the model writes them. EOS follows immediately."""
    return "\n\n".join(f"{QUESTION} {pair.question} {ANSWER} {pair.answer} {END}" for pair in pairs)


def grammar(max_pairs: int) -> str:
    """A grammar in xgrammar's EBNF for outputs of 1 to `max_pairs` pairs that `parse` accepts
    completely. Questions and answers contain no `<`.
    """
    return f"""root ::= pair ("\\n\\n" pair){{0,{max_pairs - 1}}}
pair ::= "{QUESTION} " text " {ANSWER} " text " {END}"
text ::= [^< \\n\\t] [^<]*"""


def parse(output: str) -> Parsed:
    """The pairs of an output by the published rules, with the additional checks of STRICTER.

    The output is split at each end tag. A piece is a pair if it has exactly one answer tag, begins
    with a question tag and has an answer. Among pairs with the same question (ignoring case) the
    first is kept. A last piece without an end tag counts as truncated.
    """
    return _parse_clean(output) or _parse_pieces(output)


def _parse_clean(output: str) -> Parsed | None:
    """A fast path, three times as fast, for outputs that are the `pairs_text` of distinct
    questions; None for other outputs.
    """
    if not (output.startswith(_FIRST) and output.endswith(_LAST)):
        return None
    pairs: list[Pair] = []
    seen: set[str] = set()
    for piece in output[len(_FIRST) : -len(_LAST)].split(_NEXT):
        question, _, answer = piece.partition(_MIDDLE)
        question, answer = question.strip(), answer.strip()
        if question and answer:
            pairs.append(tuple.__new__(Pair, (question, answer)))  # faster than Pair(...)
            seen.add(question.lower())
    has_only_its_tags = output.count("<") == 3 * len(pairs)
    return Parsed(pairs, _NOTHING) if len(seen) == len(pairs) and has_only_its_tags else None


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
    has_context_tag = CONTEXT_START in piece or CONTEXT_END in piece
    if has_context_tag or QUESTION in question or QUESTION in answer:
        return "tag_inside", None
    return "", Pair(question, answer)
