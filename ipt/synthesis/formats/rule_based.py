"""Pairs extracted from a text by rules, without a model, after AdaptLLM (arXiv 2309.09530; patterns
and wordings are our own).

Connectives such as "As a result, …" state the relation of two sentences, so texts contain tasks of
six types: inference (nli), reasoning on cause and effect, paraphrase, words to text, summary and
completion. Each answer is a part of the text, its title, or one of the options of its question.
Connectives are English; texts in other languages yield completions, and words to text if their
script separates words by spaces.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ipt.synthesis.chains import sentences
from ipt.synthesis.formats.base import Message, Prompt
from ipt.synthesis.formats.tags import (
    ANSWER,
    CONTEXT_END,
    CONTEXT_START,
    END,
    QUESTION,
    Pair,
    Parsed,
    parse,
)

PER_RULE = 2  # maximum number of examples per rule and text
MIN_KEYWORD, MIN_SENTENCE, MAX_SENTENCE = 10, 50, 400  # characters
MIN_CLAUSE = 20  # characters
# fraction of inference tasks that ask for the second sentence; the others ask for its relation to
# the first one
GENERATE = 0.2
# probabilities of a summary task, for texts with a title, and of a completion task
TITLE, COMPLETION = 0.8, 0.5

TYPES = {
    "entailment": "nli",
    "neutral": "nli",
    "contrast": "nli",
    "effect": "reasoning",
    "cause": "reasoning",
    "restatement": "paraphrase",
    "restated": "paraphrase",
    "definition": "word_to_text",
    "naming": "word_to_text",
    "keywords": "word_to_text",
    "conclusion": "summary",
    "finding": "summary",
    "title": "summary",
    "completion": "completion",
}
INFERENCE = ("entailment", "neutral", "contrast")  # in the order of the options in rules.yaml


class Sentence(NamedTuple):
    text: str
    line: int
    usable: bool  # a complete, plain sentence of suitable length


class Found(NamedTuple):
    """A match of a rule: the fields of its wordings, the answer, and the numbers of the sentences
    that they are taken from.
    """

    fields: dict[str, str]
    answer: str
    sentences: tuple[int, ...]


class RuleFormat:
    """The prompt is the document. It does not contain earlier shots, but rendering joins them to
    one text as it does for a model.
    """

    pair_end = END
    schema: dict[str, Any] | None = None
    grammar: str | None = None

    def __init__(self) -> None:
        self.stop_ids: list[int] = []

    def begin(self, document: str) -> Prompt:
        return Prompt([], (Message("user", document),))

    def follow(self, history: Prompt, document: str) -> Prompt:
        return self.begin(document)

    def parse(self, output: str) -> Parsed:
        return parse(output)

    def finish(self, prompt: Prompt, output_ids: list[int], output: str, parsed: Parsed) -> Prompt:
        return Prompt([])


def mine(text: str, seed: int, doc_id: str | None = None, title: str | None = None) -> list[Pair]:
    """Pairs from `text`, at most two per rule. They are the same for the same seed and `doc_id`, or
    the same text without `doc_id`.

    Without a `title`, the first line is the title if it looks like one. Questions are distinct, and
    questions and answers are not empty and contain no tag of the format.
    """
    return [pair for _, pair in mine_typed(text, seed, doc_id, title)]


def mine_typed(
    text: str, seed: int, doc_id: str | None = None, title: str | None = None
) -> list[tuple[str, Pair]]:
    """The pairs of `mine` with their types: nli, reasoning, paraphrase, word_to_text, summary or
    completion.
    """
    random_ = random.Random(f"{seed}/{text if doc_id is None else doc_id}")
    lines = _lines(text)
    title = " ".join(title.split()) if title else _first_line_title(lines)
    parts = _sentences(lines[1:] if lines and lines[0] == title else lines)
    mined: list[tuple[str, Pair]] = []
    if title and random_.random() < TITLE:
        mined.append(("title", _ask("title", Found({}, title, ()), random_)))
    mined += _mine_rules(parts, random_)
    random_.shuffle(mined)
    seen: set[str] = set()
    result = []
    for rule, pair in mined:
        has_tag = TAG.search(pair.question) or TAG.search(pair.answer)
        if pair.question.lower() not in seen and not has_tag:
            seen.add(pair.question.lower())
            result.append((TYPES[rule], pair))
    return result


def _mine_rules(parts: list[Sentence], random_: random.Random) -> Iterator[tuple[str, Pair]]:
    """Apply the rules in random order, those that match nearly any sentence last. Each sentence is
    used once.
    """
    order = [*random_.sample(list(RULES), len(RULES)), "keywords"]
    if random_.random() < COMPLETION:
        order.append("completion")
    used: set[int] = set()
    for rule in order:
        find = RULES.get(rule) or ANYWHERE[rule]
        candidates = list(find(parts))
        taken = 0
        for candidate in random_.sample(candidates, len(candidates)):
            if taken == (1 if rule == "completion" else PER_RULE):
                break
            if not used.isdisjoint(candidate.sentences):
                continue
            used.update(candidate.sentences)
            taken += 1
            if rule == "definition":  # not in its rule, because it searches the whole text
                term = _as_within(candidate.fields["term"], parts)
                candidate = candidate._replace(fields={"term": term})
            yield rule, _ask(rule, candidate, random_)


def _ask(rule: str, found: Found, random_: random.Random) -> Pair:
    if rule in INFERENCE and random_.random() >= GENERATE:
        wording = random_.choice(_wordings()["classify"])
        answer = wording["options"][INFERENCE.index(rule)]
        options = random_.sample(wording["options"], len(wording["options"]))
        question = wording["question"].format(**found.fields) + "\nOptions:"
        return Pair("\n- ".join([question, *options]), answer)
    return Pair(random_.choice(_wordings()[rule]).format(**found.fields), found.answer)


# Sentences
# ----------------------------------------------------------------------------------------------

TAG = re.compile("|".join((CONTEXT_START, CONTEXT_END, QUESTION, ANSWER, END)))
ABBREVIATION = re.compile(
    r"(?:\b(?:Drs?|Mrs?|Ms|Prof|Sts?|Mt|vs|etc|e\.g|i\.e|cf|al|Figs?|Nos?|Inc|Ltd|Co|Corp|Jr|Sr"
    r"|approx|ca|pp?|U\.S|U\.K)|(?:^|[ .(])[A-Z])\.$"
)
SENTENCE = re.compile(r"[\"'“‘(\[]?[^\W_].*[.!…。！｡।][\"'”’)\]]*")
ODD = re.compile(
    r"https?:|www\.|[@|\\{}<>=•]|\.\.\.|: [A-Z]"
    r"|\b(?:Figure|Fig\.|Table|Exhibit|Equation|Chapter|Section|Link to)\b"
)
ABSTRACT = 400  # minimum characters of an abstract
# Words of a sentence, and headings that do not describe their text.
NO_TITLE = re.compile(
    r"\"|“|\b(?:I|[Hh]e|[Ss]he|[Tt]hey|[Ww]e|[Hh]is|[Hh]er|[Hh]im|[Tt]hem)\b"
    r"|\b(?:was|were|had|said|did|came|went)\b|\b(?:a|an|the|of|in|to|and|for|that|with|by)$"
    r"|^(?:Abstract|Background|Introduction|Key Points|Key Terms|Learning Outcomes|Objectives?"
    r"|Overview|Summary|Table of Contents)$"
)
# A sentence with a larger fraction of digits and signs is a table, a formula or a list.
SIGN, MAX_SIGNS = re.compile(r"[\d!-/:-@\[-`{-~]"), 0.2
BRACKETS = (("(", ")"), ("[", "]"), ("“", "”"))
SENTENCE_SIGN = re.compile(r"[.!?:;,…。！？]$")


def _lines(text: str) -> list[str]:
    """Non-empty lines with normalised spaces. Lines are joined where a sentence continues: the next
    line begins with a lower-case letter.
    """
    lines: list[list[str]] = []
    is_open = False
    for line in (" ".join(line.split()) for line in text.splitlines()):
        if line and is_open and line[0].islower():
            lines[-1].append(line)
        elif line:
            lines.append([line])
        is_open = bool(line) and not line.endswith((".", "!", "?", ":", ";"))
    return [" ".join(line) for line in lines]


def _first_line_title(lines: list[str]) -> str | None:
    """The first line, if it is short, is not a sentence, and precedes a much longer text.

    It may end with a full stop only if the rest of the text is one long line, as in an abstract.
    """
    if len(lines) < 2 or not lines[0][0].isalnum() or NO_TITLE.search(lines[0]):
        return None
    is_abstract = lines[0].endswith(".") and len(lines) == 2 and len(lines[1]) >= ABSTRACT
    ends_like_a_sentence = SENTENCE_SIGN.search(lines[0]) and not is_abstract
    fits = 2 <= len(lines[0].split()) <= 25 and 3 * len(lines[0]) <= sum(map(len, lines[1:]))
    return lines[0] if fits and not ends_like_a_sentence else None


def _sentences(lines: list[str]) -> list[Sentence]:
    result = []
    for number, line in enumerate(lines):
        pieces: list[str] = []
        for piece in (piece.strip() for piece in sentences(line)):
            if pieces and len(pieces[-1]) < MAX_SENTENCE and ABBREVIATION.search(pieces[-1][-12:]):
                pieces[-1] += " " + piece
            else:
                pieces.append(piece)
        result += [Sentence(piece, number, _is_usable(piece)) for piece in pieces]
    return result


def _is_usable(sentence: str) -> bool:
    if not MIN_SENTENCE <= _length(sentence) <= MAX_SENTENCE or sentence[0].islower():
        return False
    if not SENTENCE.fullmatch(sentence) or ODD.search(sentence) or not _is_balanced(sentence):
        return False
    return len(SIGN.findall(sentence)) <= MAX_SIGNS * len(sentence)


def _is_balanced(text: str) -> bool:
    return text.count('"') % 2 == 0 and all(
        text.count(opening) == text.count(closing) for opening, closing in BRACKETS
    )


def _length(text: str) -> int:
    """The number of characters; those of East Asian scripts count as three."""
    if text.isascii():
        return len(text)
    return len(text) + 2 * sum(character >= "\u2e80" for character in text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# Rules
# ----------------------------------------------------------------------------------------------

Rule = Callable[[list[Sentence]], Iterator[Found]]

# The beginning of the second of two sentences.
ENTAILMENT = (
    r"(?:Therefore|Thus|Hence|Consequently|Accordingly),?|It follows that"
    r"|This (?:means|implies) that"
)
NEUTRAL = (
    r"(?:In addition|Additionally|Moreover|Furthermore|Besides|Also|Likewise|Similarly|Meanwhile"
    r"|At the same time),"
)
CONTRAST = (
    r"(?:However|In contrast|By contrast|On the contrary|Conversely|On the other hand"
    r"|Nevertheless|Nonetheless|Even so|Yet|Instead),"
)
EFFECT = (
    r"(?:As a result|As a consequence|In consequence|For (?:this|that) reason|Because of this"
    r"|Due to this|Consequently|Therefore),|(?:That|This) is (?:the reason )?why"
)
CAUSE = r"(?:That|This) is (?:in part )?because|The reason (?:for this )?is that"
RESTATEMENT = (
    r"(?:In other words|That is(?: to say)?|(?:To put it|Put) (?:differently|another way|simply)"
    r"|Stated differently|Simply put),"
)
ANY_CONNECTIVE = re.compile(rf"(?:{'|'.join((ENTAILMENT, NEUTRAL, CONTRAST, EFFECT))}) (?=\S)")

# Within one sentence.
BECAUSE = re.compile(
    r"(?P<effect>[^;:]+?),? (?P<cause>because (?!of (?:this|that|it)\b)[^;:]+"
    r"|(?:due|owing) to (?:(?! (?:is|are|was|were|has|have|can|may|will|should)\b)[^;:,])+)"
)
BECAUSE_FIRST = re.compile(
    r"(?P<cause>Because (?!of (?:this|that|it)\b)[^,;:]+), (?P<effect>[^,;:]+)"
)
SO = re.compile(
    r"(?P<cause>[^;:]+), (?:and )?so "
    r"(?P<effect>(?!(?:that|far|as|much|many|long|on|forth|to|called)\b)[^;:]+)"
)
UNFINISHED = re.compile(r"\b(?:am|is|are|was|were|be|been|not|just|or|and|but|that|which|\w+ly)$")
THING = (
    r"(?:(?:An?|The) )?(?!(?:It|This|That|These|Those|There|Here|He|She|They|We|You|I|One|Another"
    r"|His|Her|Its|Their|Our|My|What|Who|Although|Though|While|When|If|Because|Since|As|But|And|So"
    r"|Or|Also|However|Both|All|Some|Each|Many|Most|Such|To|In|For|With|By|At|On|From)\b)"
)
DEFINITION = re.compile(
    rf"(?:The term )?(?P<term>{THING}[\w'’-]+"
    r"(?: (?!(?:of|in|and|that|which|is|are)\b)[\w'’-]+){0,3})"
    r" (?:(?:is|are) (?:an?|any) |(?:is|are) the (?!(?:same|most)\b)\w+ (?:of|that|which) "
    r"|(?:is|are) defined as |refers? to |means )\w.+"
)
NAMING = re.compile(
    rf"(?P<meaning>{THING}[^,;:]+?) (?:is|are) (?:also |often |usually |commonly )?"
    r"(?:called|termed|known as|referred to as) "
    r"(?P<term>(?:an? |the )?[\w'’-]+(?: (?!(?:and|or|because|in|by|if)\b)[\w'’-]+){0,3})\."
)
CONCLUSION = re.compile(
    r"(?:In (?:summary|conclusion|short|sum|brief)|To (?:sum up|summarize|summarise|conclude)"
    r"|Taken together|All in all), "
)
FINDING = re.compile(
    r"(?:(?:These|Our|The|This) (?:\w+ )?(?:results?|findings?|data|observations?|study|analysis) "
    r"(?:\w+ )?(?:show|suggest|indicate|demonstrate|reveal|support|confirm|imply|implie)"
    r"(?:s|d|ed)?\b"
    r"|(?:We|It was|It is) (?:found|concluded?|shown) that)"
)


def _linked(connective: str, answer_first: bool = False) -> Rule:
    """A rule for two neighbouring sentences, the second of which begins with `connective`. The
    connective is removed.
    """
    pattern = re.compile(rf"(?:{connective}) (?=\w)")

    def find(parts: list[Sentence]) -> Iterator[Found]:
        for number, (before, after) in enumerate(pairwise(parts)):
            if not _are_usable(before, after):
                continue
            start = pattern.match(after.text)
            if start and len(after.text) - start.end() >= MIN_SENTENCE:
                first = _without_connective(before.text)
                second = _capital(after.text[start.end() :])
                answer = first if answer_first else second
                yield Found({"first": first, "second": second}, answer, (number, number + 1))

    return find


def _without_connective(sentence: str) -> str:
    start = ANY_CONNECTIVE.match(sentence)
    return _capital(sentence[start.end() :]) if start else sentence


def _clauses(pattern: re.Pattern[str], given: str, asked: str) -> Rule:
    """A rule for one sentence of two clauses; `given` and `asked` are the pattern's groups."""

    def find(parts: list[Sentence]) -> Iterator[Found]:
        for number, sentence in _usable(parts):
            match = pattern.fullmatch(sentence)
            if match and _are_clauses(match["effect"], match["cause"]):
                first = _clause(_without_connective(match[given]))
                yield Found({"first": first}, _clause(match[asked]), (number,))

    return find


def _are_clauses(effect: str, cause: str) -> bool:
    long = min(len(effect), len(cause)) >= MIN_CLAUSE
    return long and not UNFINISHED.search(effect) and _is_balanced(effect) and _is_balanced(cause)


def _clause(text: str) -> str:
    """A clause as a sentence."""
    return _capital(text) if SENTENCE.fullmatch(text) else _capital(text) + "."


def _any_of(*rules: Rule) -> Rule:
    return lambda parts: (found for rule in rules for found in rule(parts))


def _definition(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        match = DEFINITION.fullmatch(sentence)
        if match:
            yield Found({"term": match["term"]}, sentence, (number,))


def _naming(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        match = NAMING.fullmatch(sentence)
        if match and len(match["meaning"]) >= MIN_CLAUSE:
            yield Found({"meaning": match["meaning"] + "."}, _capital(match["term"]), (number,))


def _as_within(term: str, parts: list[Sentence]) -> str:
    """The term as it is written within a sentence: with a lower-case letter, unless the text
    always capitalises it.
    """
    small = term[0].lower() + term[1:]
    is_name = not re.match(r"(?:An?|The) ", term) and not any(small in part.text for part in parts)
    return term if is_name else small


def _conclusion(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        start = CONCLUSION.match(sentence)
        if start:
            yield Found({}, _capital(sentence[start.end() :]), (number,))


def _finding(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        if FINDING.match(sentence):
            yield Found({}, sentence, (number,))


def _keywords(parts: list[Sentence]) -> Iterator[Found]:
    """Sentences with two or three long, uncommon words."""
    for number, sentence in _usable(parts):
        words = sentence.split()
        rare: list[str] = []
        for word in words:
            word = word.strip(".,;:!?()[]\"'“”‘’")
            is_rare = word.isalpha() and word.lower() not in _common_words()
            if len(word) >= MIN_KEYWORD and is_rare and word not in rare:
                rare.append(word)
        if len(rare) >= 2 and len(words) >= 8:
            *others, last = rare[:3]
            yield Found({"words": f"{', '.join(others)} and {last}"}, sentence, (number,))


def _completion(parts: list[Sentence]) -> Iterator[Found]:
    """A sentence, and the one or two sentences after it in its line."""
    for number, (before, after) in enumerate(pairwise(parts)):
        if not _are_usable(before, after):
            continue
        end = number + 2
        answer = after.text
        if end < len(parts) and _are_usable(before, parts[end]):
            answer += " " + parts[end].text
            end += 1
        yield Found({"passage": before.text}, answer, tuple(range(number, end)))


def _are_usable(first: Sentence, second: Sentence) -> bool:
    return first.usable and second.usable and first.line == second.line


def _usable(parts: list[Sentence]) -> Iterator[tuple[int, str]]:
    return ((number, part.text) for number, part in enumerate(parts) if part.usable)


RULES: dict[str, Rule] = {
    "entailment": _linked(ENTAILMENT),
    "neutral": _linked(NEUTRAL),
    "contrast": _linked(CONTRAST),
    "effect": _any_of(_linked(EFFECT), _clauses(SO, "cause", "effect")),
    "cause": _any_of(
        _linked(CAUSE),
        _clauses(BECAUSE_FIRST, "effect", "cause"),
        _clauses(BECAUSE, "effect", "cause"),
    ),
    "restatement": _linked(RESTATEMENT),
    "restated": _linked(RESTATEMENT, answer_first=True),
    "definition": _definition,
    "naming": _naming,
    "conclusion": _conclusion,
    "finding": _finding,
}
ANYWHERE: dict[str, Rule] = {"keywords": _keywords, "completion": _completion}


@cache
def _wordings() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))


@cache
def _common_words() -> frozenset[str]:
    return frozenset(_wordings()["common_words"].split())
