"""The synthesizer's text format and its parser (paper section 3.1; data format of the released
synthesizer).

One example is `<s> <CON> {context} </CON>\\n\\n<QUE> {question} <ANS> {answer} </END>\\n\\n<QUE> …
</END></s>`, where `<s>` and `</s>` stand for the model's own BOS and EOS tokens. The tags are plain
text, not added vocabulary. An M-shot prompt is M - 1 whole examples followed by the beginning of
another one.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

CONTEXT_START, CONTEXT_END, QUESTION, ANSWER, END = "<CON>", "</CON>", "<QUE>", "<ANS>", "</END>"

# Reasons that the published rules do not have: they take an empty question, and a question or
# answer with another tag in it, of which they take out question tags only.
STRICTER = ("empty_question", "tag_inside")

_FIRST, _MIDDLE, _NEXT, _LAST = f"{QUESTION} ", f" {ANSWER} ", f" {END}\n\n{QUESTION} ", f" {END}"
_NOTHING: Counter[str] = Counter()  # rejected; shared, as nobody changes what a parser gives


class Pair(NamedTuple):
    question: str
    answer: str


class Parsed(NamedTuple):
    """Pairs in the order of the output, and how many pieces were rejected for which reason."""

    pairs: list[Pair]
    rejected: Counter[str]
    rewrite: str = (
        ""  # a text that was written in place of pairs or beside them, by formats that have such
    )

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


def grammar(max_pairs: int) -> str:
    """The outputs of 1 to `max_pairs` pairs that `parse` takes whole, in xgrammar's EBNF. Questions
    and answers have no `<`.
    """
    return f"""root ::= pair ("\\n\\n" pair){{0,{max_pairs - 1}}}
pair ::= "{QUESTION} " text " {ANSWER} " text " {END}"
text ::= [^< \\n\\t] [^<]*"""


def parse(output: str) -> Parsed:
    """Read the pairs from a generation by the published rules, and reject what those would let into
    training texts.

    The output is cut at each end tag. A piece counts when it holds exactly one answer tag, begins
    with a question tag and its answer is not empty. Of pairs with the same question, upper and
    lower case alike, the first is kept. A last piece without its end tag is a truncated generation.
    Ours alone are the reasons in STRICTER.
    """
    return _parse_clean(output) or _parse_pieces(output)


def _parse_clean(output: str) -> Parsed | None:
    """The common case in a third of the time: an output that is `pairs_text` of different
    questions. None for any other.
    """
    if not (output.startswith(_FIRST) and output.endswith(_LAST)):
        return None
    pairs: list[Pair] = []
    seen: set[str] = set()
    for piece in output[len(_FIRST) : -len(_LAST)].split(_NEXT):
        question, _, answer = piece.partition(_MIDDLE)
        question, answer = question.strip(), answer.strip()
        if question and answer:
            pairs.append(
                tuple.__new__(Pair, (question, answer))
            )  # without the detour of a named tuple's own
            seen.add(question.lower())
    is_clean = len(seen) == len(pairs) and output.count("<") == 3 * len(
        pairs
    )  # no tag but those of the pairs
    return Parsed(pairs, _NOTHING) if is_clean else None


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
    if (
        any(tag in piece for tag in (CONTEXT_START, CONTEXT_END))
        or QUESTION in question
        or QUESTION in answer
    ):
        return "tag_inside", None
    return "", Pair(question, answer)
