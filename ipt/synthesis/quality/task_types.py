"""Which kind of task a pair is, told by rules.

The rules look at the question, and where it helps at the answer. They know English; of pairs in
other languages only those that follow the conventions for options and step-by-step reasoning are
told apart, and the rest is `other`.
"""

import re

from ipt.corpus.words import words_of

# Kind -> words in a row that make a question one of it; "^" is its beginning, "$" its end. The
# first kind that applies is taken.
CUES: dict[str, tuple[str, ...]] = {
    "true_false": ("true or false", "is it true", "is this true", "is the statement"),
    "inference": ("premise", "hypothesis", "entail", "entails", "can we conclude", "can it be concluded", "can be inferred", "follow from"),
    "summary": ("summarize", "summarise", "summary", "main idea", "main point", "main topic", "in one sentence", "key points", "headline"),
    "paraphrase": ("paraphrase", "rephrase", "reword", "rewrite", "in other words", "in your own words", "another way to say"),
    "translation": ("^ translate", "translation of", "how do you say"),
    "completion": ("fill in", "^ complete", "^ finish", "comes next", "missing word"),
    "classification": ("classify", "categorize", "categorise", "which category", "what category", "sentiment", "what topic", "which topic"),
    "comparison": (
        "compare", "compared to", "compared with", "difference between", "differences between", "differ", "distinguish", "distinguishes",
        "similar to", "similarities", "in common", "versus",
    ),
    "calculation": ("^ calculate", "^ compute", "^ solve", "what is the sum", "what is the total", "what is the product of"),
    "code": ("write a function", "write a program", "write code", "python", "sql query"),
    "cause": (
        "^ why", "explain why", "what causes", "what caused", "cause of", "causes of", "reason for", "reasons for", "because of what",
        "what leads to", "what led to", "due to what", "results from", "result of what", "what is responsible for",
    ),
    "number": (
        "how many", "how much", "how long", "how often", "how old", "how far", "how large", "how big", "how tall", "how high", "how fast",
        "what percentage", "what proportion", "what number", "what fraction",
    ),
    "time": ("^ when", "since when", "what year", "which year", "what date", "what day", "what time", "which century", "what century"),
    "place": (
        "^ where", "from where", "what country", "which country", "what city", "which city", "what place", "which place",
        "what location", "which location",
    ),
    "person": ("^ who", "^ whose", "^ whom", "by whom", "to whom", "what person", "which person"),
    "procedure": ("how to", "how do you", "how do i", "how do we", "how can", "what steps", "which steps", "steps to", "what procedure"),
    "manner": ("^ how",),
    "list": ("^ list", "^ name", "^ enumerate", "give examples", "what are some", "what are examples", "types of"),
    "naming": (
        "what is the name", "what are the names", "what is the term", "what term", "what word", "name for", "term for", "is called",
        "are called", "called $", "known as", "name given",
    ),
    "definition": (
        "^ define", "definition of", "mean $", "stand for", "mean by", "meaning of", "is meant by", "^ describe", "what kind of",
        "what type of", "what sort of",
    ),
}  # fmt: skip
KINDS = ("step_by_step", "multiple_choice", "yes_no", *CUES, "fact", "instruction", "other")

OPTIONS = re.compile(r"\n(?:Options:\n|\(?[Aa1][.):] )")
STEP_BY_STEP, CONCLUSION = "think step by step", "\nTherefore, the answer is "
AUXILIARIES = frozenset(
    words_of(
        "am are can could did do does had has have is may might must shall should was were will "
        "would"
    )
)
QUESTION_WORDS = frozenset(["what", "which"])
COPULAS = frozenset(["is", "are", "was", "were"])
# words: "What is a rare disease?" asks for a definition, unless one of these shows that it asks
# about something
LONGEST_TERM = 6
LINKS = frozenset(
    words_of("about at between by during for from in of on that the to which who whose with")
)
COMMANDS = frozenset(
    words_of(
        "analyze analyse answer choose compose create determine discuss elaborate explain find "
        "generate give identify illustrate indicate "
        "mention outline predict provide select show state suggest tell use write"
    )
)


def kind_of(question: str, answer: str, question_words: list[str], answer_words: list[str]) -> str:
    """One of KINDS. `question_words` and `answer_words` are those of ipt.corpus.words.words_of."""
    if CONCLUSION in answer or STEP_BY_STEP in question:
        return "step_by_step"
    if "\n" in question and OPTIONS.search(question):
        return "multiple_choice"
    if "_" in question and "__" in question:
        return "completion"
    first = question_words[0] if question_words else ""
    if answer_words in (["true"], ["false"]):
        return "true_false"
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
    if first in QUESTION_WORDS or not QUESTION_WORDS.isdisjoint(question_words):
        return "fact"
    return "instruction" if first in COMMANDS else "other"


def _by_cues(question_words: list[str]) -> str:
    line = f"^ {' '.join(question_words)} $ "
    rank, kind = len(CUES), ""
    for word in dict.fromkeys(
        question_words
    ):  # each once: a word that is repeated would make the time quadratic
        for cue_rank, cue_kind, cue in _CUES_BY_WORD.get(word, ()):
            if cue_rank < rank and cue in line:
                rank, kind = cue_rank, cue_kind
    return kind


def _asks_for_definition(question_words: list[str]) -> bool:
    """What is a (rare) heart?"""
    if (
        question_words[:1] != ["what"]
        or question_words[1:2] == []
        or question_words[1] not in COPULAS
    ):
        return False
    term = (
        question_words[3:]
        if question_words[2:3] in (["a"], ["an"], ["the"])
        else question_words[2:]
    )
    return 0 < len(term) <= LONGEST_TERM and LINKS.isdisjoint(term)


def _cues_by_word() -> dict[str, list[tuple[int, str, str]]]:
    """First word of a cue -> rank, kind and the cue as it stands in a line of words."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    for rank, (kind, cues) in enumerate(CUES.items()):
        for cue in cues:
            first = cue.removeprefix("^ ").split()[0]
            found.setdefault(first, []).append(
                (rank, kind, f"{cue} " if cue.startswith("^") else f" {cue} ")
            )
    return found


_CUES_BY_WORD = _cues_by_word()
