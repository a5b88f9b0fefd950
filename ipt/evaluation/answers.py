"""What an answer in words says: numbers, entities, words. All of it is parsed, nothing is evaluated.

`released_*` reads as the released scorer does, bit for bit (paper section 7.3); the others read what is meant.
"""

import math
import re
import string
from collections import Counter
from decimal import Decimal
from typing import NamedTuple

# Numbers, as the released scorer reads them ---------------------------------------------------------------------------

RELEASED_NUMBER = re.compile(r"[-+]?\.?\d+(?:,\d\d\d)*\.?\d*(?:[eE][-+]?\d+)?%*")
INTEGER = re.compile(r"[-+]?(?:0+|[1-9]\d*)", re.ASCII)  # as Python writes it: nothing but zeros begins with zero
FLOAT = re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)", re.ASCII)


def released_numbers(text: str) -> list[float]:
    """The numbers of the first line; infinity for what looks like one and is none to Python (007, .5.5)."""
    return [released_value(found) for found in RELEASED_NUMBER.findall(text.split("\n")[0].strip())]


def released_value(number: str) -> float:
    """What Python says of `number`, a match of RELEASED_NUMBER, with each % as /100 and no commas; infinity if it objects.

    The released scorer evaluates it. One difference: it crashes on a whole number beyond 1.8e308, which is infinity here.
    """
    plain = number.rstrip("%").replace(",", "")
    try:
        value = int(plain) if INTEGER.fullmatch(plain) else float(plain) if FLOAT.fullmatch(plain) else math.inf
        for _ in range(number.count("%")):
            value = value / 100
        return float(value)
    except (OverflowError, ValueError):  # too large for a float; too many digits for Python
        return math.inf


def released_number_right(output: str, answer: str) -> bool:
    """Is any number of the output's first line within 0.01 of the answer's first one? Infinity is equal to itself."""
    gold = released_numbers(answer)
    return bool(gold) and any(math.isclose(number, gold[0], abs_tol=1e-2) for number in released_numbers(output))


# Numbers -------------------------------------------------------------------------------------------------------------

UNITS = {
    r"%|percent\b|percentage\b|per cent\b|pct\b": Decimal("0.01"),
    r"basis points?\b|bps?\b": Decimal("0.0001"),
    r"thousand\b|k\b": Decimal(10) ** 3,
    r"million\b|mn?\b": Decimal(10) ** 6,
    r"billion\b|bn?\b": Decimal(10) ** 9,
    r"trillion\b|tn\b": Decimal(10) ** 12,
}
UNIT = "|".join(UNITS)
NUMBER = re.compile(
    r"(?<![-−–+($€£¥])(?P<before>[-−–+($€£¥]*)"
    r"(?<![A-Za-z0-9.,])(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,3}\b)?"
    rf"\s?(?P<inner>{UNIT})?(?P<close>\))?\s?(?P<outer>{UNIT})?",
    re.ASCII | re.IGNORECASE,
)
RELATIVE = Decimal("0.005")  # rounding to three digits changes a number by no more


class Number(NamedTuple):
    """A number as it is written."""

    value: Decimal  # without its unit
    step: Decimal  # what its last digit stands for
    unit: Decimal | None  # what a percent sign or a word such as million makes of 1; None: nothing of the kind is said


def first_number(text: str) -> Number | None:
    """The first number of a text: with sign or accountants' parentheses, currency, thousands separators and unit."""
    found = NUMBER.search(text)
    if found is None:
        return None
    digits = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
    before, follows_word = found["before"], re.search(r"\w$", text[: found.start()]) is not None
    minus = re.search("[-−–]", before) is not None and not follows_word  # a dash between words or digits is no sign
    negative = minus or ("(" in before and found["close"] is not None)
    said = found["inner"] or found["outer"]
    unit = next((factor for names, factor in UNITS.items() if said and re.fullmatch(names.replace(r"\b", ""), said, re.IGNORECASE)), None)
    return Number(-digits if negative else digits, Decimal(1).scaleb(int(digits.as_tuple().exponent)), unit)


def number_right(output: str, answer: str) -> bool:
    """Is the first number of `output` the answer's?

    It may be rounded as the answer is, or to three digits (0.5%); a whole answer without a unit is exact. Where only one of the two
    says its unit, the other may have left it out (4.2 or 0.042 for 4.2%; 12.6 for $12.6 million). An answer without any number is
    compared as text.
    """
    gold, found = first_number(answer), first_number(output)
    if gold is None:
        return exact_match(output, answer)
    if found is None:
        return False
    one = Decimal(1)
    readings = [(found.unit or one, gold.unit or one)]
    if found.unit is None or gold.unit is None:
        readings.append((one, one))
    return any(_close(found.value * unit, gold, gold_unit) for unit, gold_unit in readings)


def _close(value: Decimal, gold: Number, unit: Decimal) -> bool:
    exact = gold.unit is None and gold.step == 1
    tolerance = Decimal(0) if exact else max(gold.step * unit / 2, abs(gold.value * unit) * RELATIVE)
    return abs(value - gold.value * unit) <= tolerance


# Entities ------------------------------------------------------------------------------------------------------------

# The released scorer's (\S+\s*)\s\((\S+)\), which tries every beginning of a word anew; two patterns of one meaning do not.
RELEASED_ENTITY = re.compile(r"(\S++\s*)\s\((\S+)\)")
RELEASED_ENTITY_AT_WORD = re.compile(r"(?<!\S)" + RELEASED_ENTITY.pattern)
TYPE = re.compile(r"\(([A-Za-z][\w-]*)\)")


class Entity(NamedTuple):
    name: str
    type: str


def released_entities(text: str) -> list[Entity]:
    """The word before each (TYPE), each pair of the two once."""
    found: dict[Entity, None] = {}
    place = 0
    while match := RELEASED_ENTITY.match(text, place) or RELEASED_ENTITY_AT_WORD.search(text, place):
        found[Entity(*match.groups())] = None
        place = match.end()
    return list(found)


def released_entity_f1(output: str, answer: str) -> float:
    """What nereval 0.2.5 makes of entities that all begin at 0: those of one type, and those of one name, overlap.

    A point for an equal name, a point for an equal type; an entity of the answer takes those of the first in the output that has
    either, which may serve several. So a perfect output with three persons has 2/3, and a wrong name of the right type has points.
    """
    gold, found = released_entities(answer), released_entities(output)
    points = 0
    for entity in gold:
        first = next((other for other in found if other.name == entity.name or other.type == entity.type), None)
        if first is not None:
            points += (first.name == entity.name) + (first.type == entity.type)
    if not points:
        return 0.0
    precision, recall = points / (2 * len(found)), points / (2 * len(gold))
    return 2 * (precision * recall) / (precision + recall)


def entities(text: str) -> list[Entity]:
    """Whole names with the types in parentheses behind them, as often as they are said.

    A name is all that stands between two types but for separators. A name with a word in parentheses reads as two, in outputs and
    answers alike.
    """
    pieces = TYPE.split(text)
    return [Entity(" ".join(name.strip(" \t\n,;|").split()), kind) for name, kind in zip(pieces[::2], pieces[1::2], strict=False)]


def entities_right(output: str, answer: str) -> int:
    """How many entities of the output are the answer's, each of those taken once."""
    return (Counter(entities(output)) & Counter(entities(answer))).total()


# Words ---------------------------------------------------------------------------------------------------------------

ARTICLE = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles: SQuAD's normalisation."""
    return ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(output: str, answer: str) -> bool:
    return words(output) == words(answer)


def word_f1(output: str, answer: str) -> float:
    """F1 of the words that output and answer have in common, as often as both have them."""
    found, gold = words(output), words(answer)
    if not found or not gold:
        return float(found == gold)
    return 2 * (Counter(found) & Counter(gold)).total() / (len(found) + len(gold))


def contains(output: str, answer: str) -> bool:
    """Do the answer's words stand in the output, side by side? An answer of no words is in none but itself."""
    found, gold = words(output), words(answer)
    if not gold:
        return not found
    return any(found[start : start + len(gold)] == gold for start in range(len(found) - len(gold) + 1))
