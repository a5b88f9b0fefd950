"""Pairs mined from a text by rules, without any model, after AdaptLLM (arXiv 2309.09530; patterns
and wordings are our own).

A connective says how two sentences belong together ("As a result, …"), so a text holds ready-made
tasks of six types: inference (nli), reasoning on cause and effect, paraphrase, words to text,
summary and completion. Each answer is a part of the text, its title, or one of the options of its
question. Connectives are English; a text in another language gives completions, and words to text
where its script has spaces between words.
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

PER_RULE = 2  # examples of one rule in a text
MIN_KEYWORD, MIN_SENTENCE, MAX_SENTENCE = 10, 50, 400  # characters
MIN_CLAUSE = 20  # characters of a part of a sentence
# share of inference tasks that ask for the second sentence; the others ask how it is related to the
# first
GENERATE = 0.2
TITLE, COMPLETION = (
    0.8,
    0.5,
)  # a text with a title: summary only 0.4, completion only 0.1, both 0.4, neither 0.1

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
    usable: bool  # a whole, plain sentence of a fit length


class Found(NamedTuple):
    """What a rule found: what its wordings are filled with, the answer, and the numbers of the
    sentences that both are taken from.
    """

    fields: dict[str, str]
    answer: str
    sentences: tuple[int, ...]


class RuleFormat:
    """The prompt is the document; a shot sees nothing of the shots before it, but they are joined
    as those of a model are.
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
    """Pairs mined from `text`, at most two by each rule; the same for the same seed and `doc_id`
    (without one: the same text).

    `title` is the text's title; without one, its first line where that looks like a title. The
    whole text is mined, however long it is. No question comes twice, no side is empty or holds a
    tag of the format, and each pair follows its conventions.
    """
    return [pair for _, pair in mine_typed(text, seed, doc_id, title)]


def mine_typed(
    text: str, seed: int, doc_id: str | None = None, title: str | None = None
) -> list[tuple[str, Pair]]:
    """As `mine`, with the type of task of each pair: nli, reasoning, paraphrase, word_to_text,
    summary or completion.
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
        if pair.question.lower() not in seen and not any(
            tag in side for tag in TAGS for side in pair
        ):
            seen.add(pair.question.lower())
            result.append((TYPES[rule], pair))
    return result


def _mine_rules(parts: list[Sentence], random_: random.Random) -> Iterator[tuple[str, Pair]]:
    """Rules in random order, those that fit nearly any sentence last; no sentence serves twice."""
    found = {rule: list(find(parts)) for rule, find in RULES.items()}
    order = (
        random_.sample(list(RULES), len(RULES))
        + ["keywords"]
        + ["completion"] * (random_.random() < COMPLETION)
    )
    used: set[int] = set()
    for rule in order:
        candidates = found[rule] if rule in found else list(ANYWHERE[rule](parts))
        taken = 0
        for candidate in random_.sample(candidates, len(candidates)):
            if taken < (1 if rule == "completion" else PER_RULE) and used.isdisjoint(
                candidate.sentences
            ):
                used.update(candidate.sentences)
                taken += 1
                if rule == "definition":  # only now: it looks through the whole text
                    candidate = candidate._replace(
                        fields={"term": _as_within(candidate.fields["term"], parts)}
                    )
                yield rule, _ask(rule, candidate, random_)


def _ask(rule: str, found: Found, random_: random.Random) -> Pair:
    if rule in INFERENCE and random_.random() >= GENERATE:
        wording = random_.choice(_wordings()["classify"])
        answer = wording["options"][INFERENCE.index(rule)]
        options = random_.sample(wording["options"], len(wording["options"]))
        return Pair(
            "\n- ".join([wording["question"].format(**found.fields) + "\nOptions:", *options]),
            answer,
        )
    return Pair(random_.choice(_wordings()[rule]).format(**found.fields), found.answer)


# Sentences
# ----------------------------------------------------------------------------------------------

TAGS = (CONTEXT_START, CONTEXT_END, QUESTION, ANSWER, END)
ABBREVIATION = re.compile(
    r"(?:\b(?:Drs?|Mrs?|Ms|Prof|Sts?|Mt|vs|etc|e\.g|i\.e|cf|al|Figs?|Nos?|Inc|Ltd|Co|Corp|Jr|Sr|approx|ca|pp?|U\.S|U\.K)"
    r"|(?:^|[ .(])[A-Z])\.$"
)
SENTENCE = re.compile(r"[\"'“‘(\[]?[^\W_].*[.!…。！｡।][\"'”’)\]]*")
ODD = re.compile(
    r"https?:|www\.|[@|\\{}<>=•]|\b(?:Figure|Fig\.|Table|Exhibit|Equation|Chapter|Section|Link to)\b|\.\.\.|: [A-Z]"
)
ABSTRACT = 400  # characters of the shortest abstract
NO_TITLE = re.compile(  # what a sentence of prose has, and headings that say nothing of their text
    r"\"|“|\b(?:I|[Hh]e|[Ss]he|[Tt]hey|[Ww]e|[Hh]is|[Hh]er|[Hh]im|[Tt]hem|was|were|had|said|did|came|went)\b"
    r"|\b(?:a|an|the|of|in|to|and|for|that|with|by)$"
    r"|^(?:Abstract|Background|Introduction|Key Points|Key Terms|Learning Outcomes|Objectives?|Overview|Summary|Table of Contents)$"
)
SIGN, MAX_SIGNS = (
    re.compile(r"[\d!-/:-@\[-`{-~]"),
    0.2,
)  # a sentence with more digits and signs is a table, a formula or a list
BRACKETS = (("(", ")"), ("[", "]"), ("“", "”"))
SENTENCE_SIGN = re.compile(r"[.!?:;,…。！？]$")


def _lines(text: str) -> list[str]:
    """Lines that are not empty, spaces squeezed; a line break within a sentence (the next line
    begins small) is a space.
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
    """The first line, where it is short, is no sentence, and is followed by much more.

    A full stop at its end is taken as one of an abstract's title only if the rest of the text is
    one long line.
    """
    if len(lines) < 2 or not lines[0][0].isalnum() or NO_TITLE.search(lines[0]):
        return None
    ends_like_a_sentence = SENTENCE_SIGN.search(lines[0]) and not (
        lines[0].endswith(".") and len(lines) == 2 and len(lines[1]) >= ABSTRACT
    )
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
    if (
        not SENTENCE.fullmatch(sentence)
        or ODD.search(sentence)
        or len(SIGN.findall(sentence)) > MAX_SIGNS * len(sentence)
    ):
        return False
    return _is_balanced(sentence)


def _is_balanced(text: str) -> bool:
    return text.count('"') % 2 == 0 and all(
        text.count(opening) == text.count(closing) for opening, closing in BRACKETS
    )


def _length(text: str) -> int:
    """Characters, of which those of East Asian scripts count as three."""
    return (
        len(text)
        if text.isascii()
        else len(text) + 2 * sum(character >= "\u2e80" for character in text)
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# Rules
# ----------------------------------------------------------------------------------------------

Rule = Callable[[list[Sentence]], Iterator[Found]]

# How the second of two sentences begins.
ENTAILMENT = r"(?:Therefore|Thus|Hence|Consequently|Accordingly),?|It follows that|This (?:means|implies) that"
NEUTRAL = r"(?:In addition|Additionally|Moreover|Furthermore|Besides|Also|Likewise|Similarly|Meanwhile|At the same time),"
CONTRAST = r"(?:However|In contrast|By contrast|On the contrary|Conversely|On the other hand|Nevertheless|Nonetheless|Even so|Yet|Instead),"
EFFECT = (
    r"(?:As a result|As a consequence|In consequence|For this reason|For that reason|Because of this|Due to this|Consequently|Therefore),"
    r"|(?:That|This) is (?:the reason )?why"
)
CAUSE = r"(?:That|This) is (?:in part )?because|The reason (?:for this )?is that"
RESTATEMENT = (
    r"(?:In other words|That is to say|That is|Put differently|Put another way|To put it (?:differently|another way|simply)"
    r"|Stated differently|Put simply|Simply put),"
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
    r"(?P<cause>[^;:]+), (?:and )?so (?P<effect>(?!that\b|far\b|as\b|much\b|many\b|long\b|on\b|forth\b|to\b|called\b)[^;:]+)"
)
UNFINISHED = re.compile(
    r"\b(?:am|is|are|was|were|be|been|not|only|just|or|and|but|that|which|mainly|mostly|partly|largely|primarily|\w+ly)$"
)
THING = (
    r"(?:(?:An?|The) )?(?!(?:It|This|That|These|Those|There|Here|He|She|They|We|You|I|One|Another|His|Her|Its|Their|Our|My|What|Who"
    r"|Although|Though|While|When|If|Because|Since|As|But|And|So|Or|Also|However|Both|All|Some|Each|Many|Most|Such|To|In|For|With|By|At|On|From)\b)"
)
DEFINITION = re.compile(
    rf"(?:The term )?(?P<term>{THING}[\w'’-]+(?: (?!of\b|in\b|and\b|that\b|which\b|is\b|are\b)[\w'’-]+){{0,3}})"
    r" (?:(?:is|are) (?:an?|any) |(?:is|are) the (?!same\b|most\b)\w+ (?:of|that|which) |(?:is|are) defined as |refers? to |means )\w.+"
)
NAMING = re.compile(
    rf"(?P<meaning>{THING}[^,;:]+?) (?:is|are) (?:also |often |usually |commonly )?(?:called|termed|known as|referred to as) "
    r"(?P<term>(?:an? |the )?[\w'’-]+(?: (?!and\b|or\b|because\b|in\b|by\b|if\b)[\w'’-]+){0,3})\."
)
CONCLUSION = re.compile(
    r"(?:In (?:summary|conclusion|short|sum|brief)|To (?:sum up|summarize|summarise|conclude)|Taken together|All in all), "
)
FINDING = re.compile(
    r"(?:(?:These|Our|The|This) (?:\w+ )?(?:results?|findings?|data|observations?|study|analysis) (?:\w+ )?"
    r"(?:show|suggest|indicate|demonstrate|reveal|support|confirm|imply|implie)(?:s|d|ed)?\b"
    r"|(?:We|It was|It is) (?:found|concluded?|shown) that)"
)


def _linked(connective: str, answer_first: bool = False) -> Rule:
    """A rule for two neighbouring sentences of which the second begins with `connective`, which is
    taken away.
    """
    pattern = re.compile(rf"(?:{connective}) (?=\w)")

    def find(parts: list[Sentence]) -> Iterator[Found]:
        for number, (before, after) in enumerate(pairwise(parts)):
            start = (
                pattern.match(after.text)
                if after.usable and before.usable and before.line == after.line
                else None
            )
            if start and len(after.text) - start.end() >= MIN_SENTENCE:
                first, second = (
                    _without_connective(before.text),
                    _capital(after.text[start.end() :]),
                )
                yield Found(
                    {"first": first, "second": second},
                    first if answer_first else second,
                    (number, number + 1),
                )

    return find


def _without_connective(sentence: str) -> str:
    start = ANY_CONNECTIVE.match(sentence)
    return _capital(sentence[start.end() :]) if start else sentence


def _clauses(pattern: re.Pattern[str], given: str, asked: str) -> Rule:
    """A rule for one sentence of two clauses; `given` and `asked` are the pattern's groups."""

    def find(parts: list[Sentence]) -> Iterator[Found]:
        for number, sentence in _usable(parts):
            said = pattern.fullmatch(sentence)
            if said and _are_clauses(said["effect"], said["cause"]):
                yield Found(
                    {"first": _clause(_without_connective(said[given]))},
                    _clause(said[asked]),
                    (number,),
                )

    return find


def _are_clauses(effect: str, cause: str) -> bool:
    long = min(len(effect), len(cause)) >= MIN_CLAUSE
    return long and not UNFINISHED.search(effect) and _is_balanced(effect) and _is_balanced(cause)


def _clause(text: str) -> str:
    """A clause as a sentence of its own."""
    return _capital(text) if SENTENCE.fullmatch(text) else _capital(text) + "."


def _any_of(*rules: Rule) -> Rule:
    return lambda parts: (found for rule in rules for found in rule(parts))


def _definition(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        said = DEFINITION.fullmatch(sentence)
        if said:
            yield Found({"term": said["term"]}, sentence, (number,))


def _naming(parts: list[Sentence]) -> Iterator[Found]:
    for number, sentence in _usable(parts):
        said = NAMING.fullmatch(sentence)
        if said and len(said["meaning"]) >= MIN_CLAUSE:
            yield Found({"meaning": said["meaning"] + "."}, _capital(said["term"]), (number,))


def _as_within(term: str, parts: list[Sentence]) -> str:
    """The term as it stands within a sentence: with a small letter, unless the text only has it
    with a capital one.
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
    yield from (
        Found({}, sentence, (number,))
        for number, sentence in _usable(parts)
        if FINDING.match(sentence)
    )


def _keywords(parts: list[Sentence]) -> Iterator[Found]:
    """Sentences with two or three long words that are not ordinary ones."""
    for number, sentence in _usable(parts):
        words = [word.strip(".,;:!?()[]\"'“”‘’") for word in sentence.split()]
        rare = list(
            dict.fromkeys(
                word
                for word in words
                if len(word) >= MIN_KEYWORD
                and word.isalpha()
                and word.lower() not in _common_words()
            )
        )
        if len(rare) >= 2 and len(words) >= 8:
            *others, last = rare[:3]
            yield Found({"words": f"{', '.join(others)} and {last}"}, sentence, (number,))


def _completion(parts: list[Sentence]) -> Iterator[Found]:
    """A sentence, and the next one or two of its line."""
    for number, (before, after) in enumerate(pairwise(parts)):
        if before.usable and after.usable and before.line == after.line:
            further = [
                part
                for part in parts[number + 2 : number + 3]
                if part.usable and part.line == before.line
            ]
            answer = " ".join(part.text for part in (after, *further))
            yield Found(
                {"passage": before.text}, answer, tuple(range(number, number + 2 + len(further)))
            )


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
