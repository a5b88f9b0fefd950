"""Parses a synthesized pair: a plain question, one with options, one with step-by-step reasoning,
or one with both.

The conventions are those of the synthesizer's training data (paper section 1.3). A pair that breaks
them is dropped for a named reason; its document and the document's other pairs are kept.
"""

from typing import NamedTuple

from ipt.synthesis.formats.tags import Pair

OPTIONS, NEXT_OPTION = "\nOptions:\n- ", "\n- "
STEP_BY_STEP, CONCLUSION = "\nLet's think step by step.", "\nTherefore, the answer is "
REASONS = (
    "empty_question",
    "empty_answer",
    "malformed_options",
    "answer_not_among_options",
    "malformed_reasoning",
)


class ChainRow(NamedTuple):
    """One document of a chain as synthesis wrote it."""

    doc_id: str
    text: str
    pairs: list[Pair]
    rewrite: str = ""  # a text that was written from this document


class Item(NamedTuple):
    """A usable pair, parsed."""

    kind: str  # plain | options | reasoning | options_reasoning
    question: str
    answer: str  # without its reasoning; with options: one of them
    options: tuple[str, ...] = ()
    reasoning: str = ""


class AugmentedDocument(NamedTuple):
    """One document of a chain with its usable pairs, and the reason for each dropped one."""

    doc_id: str
    text: str
    items: list[Item]
    dropped: list[str]
    rewrite: str = ""


def read_document(row: ChainRow) -> AugmentedDocument:
    items, dropped = [], []
    for pair in row.pairs:
        read = read_pair(pair)
        if isinstance(read, str):
            dropped.append(read)
        else:
            items.append(read)
    return AugmentedDocument(row.doc_id, row.text, items, dropped, row.rewrite.strip())


def read_pair(pair: Pair) -> Item | str:
    """The pair taken apart, or the reason (one of REASONS) why it cannot be used.

    Options: `{question}\\nOptions:\\n- {a}\\n- {b}`, answered by an option's text. Reasoning: the
    question ends with `\\nLet's think step by step.`, the answer is `{reasoning}\\nTherefore, the
    answer is {final}`.
    """
    question, answer = pair.question.strip(), pair.answer.strip()
    if not question:
        return "empty_question"
    if not answer:
        return "empty_answer"
    reasoning = ""
    has_options, has_reasoning = OPTIONS in question, question.endswith(STEP_BY_STEP)
    if not has_options and not has_reasoning:
        return Item("plain", question, answer)
    if has_reasoning:
        if answer.count(CONCLUSION) != 1:
            return "malformed_reasoning"
        question = question.removesuffix(STEP_BY_STEP).rstrip()
        reasoning, answer = (part.strip() for part in answer.split(CONCLUSION))
        if not reasoning or not answer:
            return "malformed_reasoning"
    if not has_options:
        return Item("reasoning", question, answer, (), reasoning)
    return _read_options(
        "options_reasoning" if has_reasoning else "options", question, answer, reasoning
    )


def _read_options(kind: str, question: str, answer: str, reasoning: str) -> Item | str:
    question, _, listed = question.partition(OPTIONS)
    options = tuple(option.strip() for option in listed.split(NEXT_OPTION))
    if (
        OPTIONS in listed
        or len(options) < 2
        or not all(options)
        or len(set(options)) < len(options)
    ):
        return "malformed_options"
    if answer not in options and answer.removesuffix(".") not in options:
        return "answer_not_among_options"
    return Item(
        kind,
        question.rstrip(),
        answer if answer in options else answer.removesuffix("."),
        options,
        reasoning,
    )
