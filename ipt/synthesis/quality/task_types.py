"""The kind of task of a pair, by rules.

The rules use the words of the question, and sometimes those of the answer. They are English: pairs
in other languages are `other`, except for multiple choice and step-by-step reasoning, which follow
conventions of the format.
"""

import re
from pathlib import Path

import yaml

from ipt.corpus.words import words_of

CUES: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
KINDS = ("step_by_step", "multiple_choice", "yes_no", *CUES, "fact", "instruction", "other")

OPTIONS = re.compile(r"\n(?:Options:\n|\(?[Aa1][.):] )")
STEP_BY_STEP, CONCLUSION = "think step by step", "\nTherefore, the answer is "
AUXILIARIES = frozenset(
    words_of(
        "am are can could did do does had has have is may might must shall should was were will "
        "would"
    )
)
QUESTION_WORDS = {"what", "which"}
COPULAS = {"is", "are", "was", "were"}
# "What is a rare disease?" asks for a definition, unless it is longer (in words) or has one of the
# links.
LONGEST_TERM = 6
LINKS = frozenset(
    words_of("about at between by during for from in of on that the to which who whose with")
)
COMMANDS = frozenset(
    words_of(
        "analyze analyse answer choose compose create determine discuss elaborate explain find "
        "generate give identify illustrate indicate mention outline predict provide select show "
        "state suggest tell use write"
    )
)


def kind_of(question: str, answer: str, question_words: list[str], answer_words: list[str]) -> str:
    """One of KINDS. The words are those of `ipt.corpus.words.words_of`."""
    if CONCLUSION in answer or STEP_BY_STEP in question:
        return "step_by_step"
    if "\n" in question and OPTIONS.search(question):
        return "multiple_choice"
    if "__" in question:
        return "completion"
    if answer_words in (["true"], ["false"]):
        return "true_false"
    first = question_words[0] if question_words else ""
    kind = _by_cues(question_words)
    is_closed = answer_words in (["yes"], ["no"]) or (
        first in AUXILIARIES and "or" not in question_words
    )
    if is_closed and kind not in ("true_false", "inference"):
        return "yes_no"
    if kind:
        return kind
    if _asks_for_definition(question_words):
        return "definition"
    if not QUESTION_WORDS.isdisjoint(question_words):
        return "fact"
    return "instruction" if first in COMMANDS else "other"


def _by_cues(question_words: list[str]) -> str:
    line = f"^ {' '.join(question_words)} $ "
    rank, kind = len(CUES), ""
    # each word once: repeated words would make the time quadratic
    for word in dict.fromkeys(question_words):
        for cue_rank, cue_kind, cue in _CUES_BY_WORD.get(word, ()):
            if cue_rank < rank and cue in line:
                rank, kind = cue_rank, cue_kind
    return kind


def _asks_for_definition(question_words: list[str]) -> bool:
    """Whether a question is like "What is a (rare) disease?"."""
    if question_words[:1] != ["what"] or not COPULAS.intersection(question_words[1:2]):
        return False
    has_article = question_words[2:3] in (["a"], ["an"], ["the"])
    term = question_words[3 if has_article else 2 :]
    return 0 < len(term) <= LONGEST_TERM and LINKS.isdisjoint(term)


def _cues_by_word() -> dict[str, list[tuple[int, str, str]]]:
    """First word of a cue -> rank and kind, and the cue as a part of a line of words."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    for rank, (kind, cues) in enumerate(CUES.items()):
        for cue in cues:
            first = cue.removeprefix("^ ").split()[0]
            part = f"{cue} " if cue.startswith("^") else f" {cue} "
            found.setdefault(first, []).append((rank, kind, part))
    return found


_CUES_BY_WORD = _cues_by_word()
