"""What an answer in words says: numbers, entities, words. All of it is parsed, nothing is
evaluated.

`released_*` reads as the released scorer does, bit for bit (paper section 7.3); the others read
what is meant.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

# Numbers, as the released scorer reads them
# ---------------------------------------------------------------------------

RELEASED_NUMBER = re.compile(r"[-+]?\.?\d+(?:,\d\d\d)*\.?\d*(?:[eE][-+]?\d+)?%*")
# as Python writes it: nothing but zeros begins with zero
INTEGER = re.compile(r"[-+]?(?:0+|[1-9]\d*)", re.ASCII)
FLOAT = re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)", re.ASCII)


def released_numbers(text: str) -> list[float]:
    """The numbers of the first line; infinity for what looks like one and is none to Python (007,
    .5.5).
    """
    return [released_value(found) for found in RELEASED_NUMBER.findall(text.split("\n")[0].strip())]


def released_value(number: str) -> float:
    """What Python says of `number`, a match of RELEASED_NUMBER, with each % as /100 and no commas;
    infinity if it objects.

    The released scorer evaluates it. One difference: it crashes on a whole number beyond 1.8e308,
    which is infinity here.
    """
    plain = number.rstrip("%").replace(",", "")
    try:
        value = (
            int(plain)
            if INTEGER.fullmatch(plain)
            else float(plain)
            if FLOAT.fullmatch(plain)
            else math.inf
        )
        for _ in range(number.count("%")):
            value = value / 100
        return float(value)
    except (OverflowError, ValueError):  # too large for a float; too many digits for Python
        return math.inf


def released_number_right(output: str, answer: str) -> bool:
    """Is any number of the output's first line within 0.01 of the answer's first one? Infinity is
    equal to itself.
    """
    gold = released_numbers(answer)
    return bool(gold) and any(
        math.isclose(number, gold[0], abs_tol=1e-2) for number in released_numbers(output)
    )


# Numbers
# ----------------------------------------------------------------------------------------------

UNITS = {
    r"%|percent\b|percentage\b|per\s?cent\b|pct\b": Decimal("0.01"),
    r"‰|per\s?mille?\b": Decimal("0.001"),
    r"basis\s?points?\b|bps?\b": Decimal("0.0001"),
    r"thousand\b|k\b": Decimal(10) ** 3,
    r"lakhs?\b": Decimal(10) ** 5,
    r"million\b|mn?\b": Decimal(10) ** 6,
    r"crores?\b": Decimal(10) ** 7,
    r"billion\b|bn?\b": Decimal(10) ** 9,
    r"trillion\b|tn\b": Decimal(10) ** 12,
}
UNIT = "|".join(UNITS)
SIGNS = "-−–"
# Scripts without spaces between words, and Hangul, which writes particles onto them.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)
NO_WORD_BEFORE = rf"(?:(?<![^\W_])|(?<=[{UNSPACED}]))"  # where a hyphen is a sign
CURRENCY_SIGNS = "$¢£¤¥֏؋৲৳௹฿₠-⃀"
CURRENCY_CODES = (
    "AED|ARS|AUD|BGN|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EGP|EUR|GBP|HKD|HUF|IDR|ILS|INR|ISK|JPY|KES|KRW|MXN|MYR|NGN|NOK"
    "|NZD|PEN|PHP|PKR|PLN|RMB|RON|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR|Rs\\.?|Fr\\.|kr\\.?|zł|Kč"
)
# US$, €, EUR: a code in its usual case only, as "try" and "all" are words. Letters of a longer word
# are no code.
CURRENCY = (
    f"(?-i:(?<![A-Za-z])(?:[A-Z]{{1,3}})?[{CURRENCY_SIGNS}]"
    f"|(?<![A-Za-z])(?:{CURRENCY_CODES})(?![A-Za-z]))"
)
# Signs, currencies and opening brackets. A minus sign may have a space behind it; a hyphen with one
# is a bullet.
BEFORE = rf"(?:[-–+]|−\s?|\(\s?|{CURRENCY}\s?|(?<![A-Za-z])(?:minus|negative)\s)"
DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"  # 1,234,567; 12,34,567
    # 1 234 567,8; 1'234'567
    r"|\d{1,3}(?:(?:[ \u00a0\u2007-\u200a\u202f]\d{3})+(?:,\d+)?|(?:['’]\d{3})+)(?!\d)"
    r"|0,\d+(?![.,]?\d)|\d{1,3},\d{1,2}(?![.,]?\d)"  # 1,5: too few digits for thousands
    r"|\d+)(?:\.\d+)?"
)
# 1/2, 2 1/2; 9/11/2001 and 2018/19 are none
FRACTION = (
    r"(?:(?<!\d{4})(?<![.,]\d)(?<![.,]\d\d)(?<![.,]\d{3})"
    r"(?:\s(?P<above>\d{1,3}))?/(?P<below>[1-9]\d{0,2})(?![\d/.,]*\d))"
)
MANY_DOTS = (
    r"\d{1,3}(?:\.\d{3}){2,}(?![\d.])(?:,\d+)?"  # 1.234.567,8: two dots are no decimal points
)
EXPONENT = (
    r"[eE](?P<e>[-−+]?\d{1,3})\b|\s?[×x*·⋅]\s?10(?:\^|\*\*)[{(]?(?P<power>[-−+]?\d{1,3})[})]?"
)
RAISED = r"\s?[×x*·⋅]\s?10(?P<raised>[⁺⁻]?[⁰¹²³⁴-⁹]{1,3})"
NUMBER = re.compile(
    rf"(?:(?P<before>{BEFORE}{{1,8}})|(?<![A-Za-z0-9])(?<![0-9][.,]))"
    rf"(?P<digits>{MANY_DOTS}|{DIGITS}|(?<![A-Za-z0-9.])\.\d+)(?:{EXPONENT}|{RAISED}|{FRACTION})?"
    rf"(?:\s?{CURRENCY})?(?:(?:\s{{0,3}}|-(?![a-z]\b))(?P<inner>{UNIT}))?"  # a 10-K is no 10,000
    rf"(?:\s?{CURRENCY})?(?:\s?(?P<close>\)))?(?:\s{{0,3}}(?P<outer>{UNIT}))?",
    re.IGNORECASE,
)
DECIMAL_COMMA = re.compile(r"0,\d+|\d{1,3},\d{1,2}")
SIGN_PLACE = re.compile(NO_WORD_BEFORE)
# A date, a time, a range, a version: what stands together as no single number does.
JOINED_NUMBERS = re.compile(
    rf"\d[\d.,]*(?:%?\s?(?:[{SIGNS}/:]|\bto\b)\s?[-−(]?(?:{CURRENCY}\s?)?\d[\d.,]*)*"
)
# "Answer5": read where there is no other number, while Q4 is a name
GLUED = re.compile(r"(?:(?<=[a-z]{2})|(?<=\bFY))(?=\d)")
RELATIVE = Decimal("0.005")  # rounding to three digits changes a number by no more


class Number(NamedTuple):
    """A number as it is written."""

    value: Decimal  # without its unit
    step: Decimal  # value of its last digit; 0 for a fraction
    # what a percent sign or a word such as million makes of 1; None: nothing of the kind is said
    unit: Decimal | None


def first_number(text: str) -> Number | None:
    """The first number of a text: with sign or accountants' parentheses, currency, thousands
    separators and unit.

    >>> first_number("a loss of US$-1,234.5 million").value
    Decimal('-1234.5')
    """
    found = _search(text)
    if found is None:
        return None
    before, follows_word = (
        found["before"] or "",
        SIGN_PLACE.match(found.string, found.start()) is None,
    )
    minus = re.search(f"[{SIGNS}]|minus|negative", before, re.IGNORECASE) is not None
    # FY-18, 2018-19: no sign
    negative = (minus and not follows_word) or ("(" in before and found["close"] is not None)
    digits = _digits(found)
    step = Decimal(0) if found["below"] else Decimal(1).scaleb(int(digits.as_tuple().exponent))
    return Number(-digits if negative else digits, step, _unit(found["inner"] or found["outer"]))


def _search(text: str) -> re.Match[str] | None:
    text = in_ascii(text)
    return NUMBER.search(text) or NUMBER.search(GLUED.sub(" ", text))


def _digits(found: re.Match[str]) -> Decimal:
    digits = found["digits"]
    if digits.count(".") > 1:
        digits = digits.replace(".", "").replace(",", ".")
    elif re.search(r"\s", digits) or DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(",", ".")
    exponent = unicodedata.normalize(
        "NFKC", found["e"] or found["power"] or found["raised"] or "0"
    ).replace("−", "-")
    number = Decimal(re.sub(r"[^\d.]", "", digits) + "e" + exponent)
    if not found["below"]:
        return number
    below = Decimal(found["below"])
    return number / below if found["above"] is None else number + Decimal(found["above"]) / below


def _unit(said: str | None) -> Decimal | None:
    if said is None:
        return None
    return next(
        factor
        for names, factor in UNITS.items()
        if re.fullmatch(names.replace(r"\b", ""), said, re.IGNORECASE)
    )


# Arabic signs within numbers, hyphens, and the slash of ½
SAME = {"٫": ".", "٬": ",", "٪": "%", "‐": "-", "‑": "-", "﹣": "-", "⁄": "/"}
FRACTION_SIGNS = "¼-¾⅐-⅞↉"


def in_ascii(text: str) -> str:
    """The text with digits of all scripts as 0 to 9, letters and signs of full width as usual ones,
    and no invisible marks.
    """
    if text.isascii():
        return text
    text = re.sub(rf"(?<=\d)(?=[{FRACTION_SIGNS}])", " ", text)  # 1½
    return "".join(map(_in_ascii, unicodedata.normalize("NFC", text)))


@lru_cache(maxsize=4096)
def _in_ascii(char: str) -> str:
    if char in SAME or char.isdecimal():
        return SAME.get(char) or str(unicodedata.decimal(char))
    if unicodedata.category(char) == "Cf":  # soft hyphens, joiners, marks of direction
        return ""
    if re.match(f"[{FRACTION_SIGNS}]", char):
        return unicodedata.normalize("NFKC", char).replace("⁄", "/")
    return unicodedata.normalize("NFKC", char) if "\uff00" < char < "\uffef" else char


def number_right(output: str, answer: str) -> bool:
    """Is the first number of `output` the answer's?

    It may be rounded as the answer is, or to three digits (0.5%); a whole answer without a unit is
    exact. Where only one of the two says its unit, the other may have left it out (4.2 or 0.042 for
    4.2%; 12.6 for $12.6 million). An answer without any number is compared as text. A date, a time
    or a range is right if the output's first one is the same.
    """
    several = _joined(answer)
    if several:
        return _joined(output) == several
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


def _joined(text: str) -> str:
    """The first number of a text with what is joined to it; "" if that is a number by itself."""
    found = _search(text)
    if found is None:
        return ""
    joined = JOINED_NUMBERS.match(found.string, found.start("digits"))
    if joined is None or found.start("digits") + len(joined[0].rstrip(".,")) <= found.end():
        return ""
    before = "-" if re.search(f"[{SIGNS}]", found["before"] or "") else ""
    return before + re.sub(rf"to|[{SIGNS}]", "-", re.sub(r"\s", "", joined[0]).rstrip(".,"))


def _close(value: Decimal, gold: Number, unit: Decimal) -> bool:
    exact = gold.unit is None and gold.step == 1
    tolerance = (
        Decimal(0) if exact else max(gold.step * unit / 2, abs(gold.value * unit) * RELATIVE)
    )
    return abs(value - gold.value * unit) <= tolerance


# Entities
# ----------------------------------------------------------------------------------------------

# The released scorer's (\S+\s*)\s\((\S+)\), which tries every beginning of a word anew; two
# patterns of one meaning do not.
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
    while match := RELEASED_ENTITY.match(text, place) or RELEASED_ENTITY_AT_WORD.search(
        text, place
    ):
        found[Entity(*match.groups())] = None
        place = match.end()
    return list(found)


def released_entity_f1(output: str, answer: str) -> float:
    """What nereval 0.2.5 makes of entities that all begin at 0: those of one type, and those of one
    name, overlap.

    A point for an equal name, a point for an equal type; an entity of the answer takes those of the
    first in the output that has either, which may serve several. So a perfect output with three
    persons has 2/3, and a wrong name of the right type has points.
    """
    gold, found = released_entities(answer), released_entities(output)
    points = 0
    for entity in gold:
        first = next(
            (other for other in found if other.name == entity.name or other.type == entity.type),
            None,
        )
        if first is not None:
            points += (first.name == entity.name) + (first.type == entity.type)
    if not points:
        return 0.0
    precision, recall = points / (2 * len(found)), points / (2 * len(gold))
    return 2 * (precision * recall) / (precision + recall)


def entities(text: str) -> list[Entity]:
    """Whole names with the types in parentheses behind them, as often as they are said.

    A name is all that stands between two types but for separators. A name with a word in
    parentheses reads as two, in outputs and answers alike.
    """
    pieces = TYPE.split(text)
    return [
        Entity(" ".join(name.strip(" \t\n,;|").split()), kind)
        for name, kind in zip(pieces[::2], pieces[1::2], strict=False)
    ]


def entities_right(output: str, answer: str) -> int:
    """How many entities of the output are the answer's, each of those taken once."""
    return (Counter(entities(output)) & Counter(entities(answer))).total()


# Words
# ----------------------------------------------------------------------------------------------

ARTICLES = frozenset({"a", "an", "the"})
LETTER = "\ue000"  # replaces an A that is a letter, not an article
LETTERS = re.compile(r"(?<![\w'’-])A(?=[^\w\s'’+#-]|\s*$)")  # (A), "A. the heart", "Vitamin A"
JOINED = re.compile(r"(?<=\d)\s+(?=%)|(?<=[<>≤≥])\s+(?=[-.$]?\d)")  # 5 %, < 5
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
MINUS = re.compile(
    rf"{NO_WORD_BEFORE}[{SIGNS}](?=(?:{CURRENCY}\s?)?\.?\d)|(?<=\d)[{SIGNS}](?=\d)|−"
)
# Punctuation that makes another answer of one: -5, -x, 1.5, .5, 3:1, 5%, C++, C#, A+, O-, x^2, <5.
MEANS_SOMETHING = (
    rf"{NO_WORD_BEFORE}-(?=(?:{CURRENCY}\s?|[^\w\s])?\.?\d|[a-zα-ω](?![\w'’-])|[∞√])"
    r"|(?<=\d)[^\w\s](?=\d)|(?<!\w)\.(?=\d)|(?<=\d)%|(?<=\w)[+#]+|(?<=[\w)])\^(?=[\w({-])"
    r"|(?:(?<=\b[A-Z])|(?<=\bAB))-(?![\w-])|[<>]=?(?=[-.$]*\d)"
)
PUNCTUATION = re.compile(rf"(?P<kept>{MEANS_SOMETHING})|(?P<other>[^\w\s]|_)")
# deleted as ASCII punctuation is; all other punctuation separates words
INSIDE_WORDS = frozenset("’‘‛ʼ‐‑·‧′″…")
WITHOUT_SPACES = re.compile(f"[{UNSPACED}]")  # each character is a word


def words(text: str) -> list[str]:
    """Words without case, punctuation and articles: SQuAD's normalisation, where it does not change
    what an answer says.

    Signs, decimal points and such stay (-5, 1.5, 50%, C++), so does an A that is a letter, and a
    text of nothing but articles or punctuation is not emptied.

    >>> words("The heart, of course!"), words("-1,234.50"), words("A"), words("+")
    (['heart', 'of', 'course'], ['-1234.50'], ['a'], ['+'])
    """
    found = _all_words(text)
    return _without_articles(found) or _plain(found)[-1:] or _symbols(text)


def exact_match(output: str, answer: str) -> bool:
    found, gold = _both(output, answer)
    return found == gold


def word_f1(output: str, answer: str) -> float:
    """F1 of the words that output and answer have in common, as often as both have them."""
    found, gold = _both(output, answer)
    if not found or not gold:
        return float(found == gold)
    return 2 * (Counter(found) & Counter(gold)).total() / (len(found) + len(gold))


def contains(output: str, answer: str) -> bool:
    """Do the answer's words stand in the output, side by side? An answer of no words is in none but
    itself.
    """
    found, gold = _both(output, answer)
    if not gold:
        return not found
    return any(
        found[start : start + len(gold)] == gold for start in range(len(found) - len(gold) + 1)
    )


def _both(output: str, answer: str) -> tuple[list[str], list[str]]:
    """The words of both, read alike: what stays in the answer (an article, a sign) stays in the
    output too.
    """
    gold, every, found = words(answer), _all_words(answer), _all_words(output)
    if gold and not every:
        return _symbols(output), gold
    if LETTER in found and every[-1:] == ("a",) and gold[-1:] != ["a"]:  # vitamin a for Vitamin A
        gold.append("a")
    articles = ARTICLES.intersection(gold)
    if not articles:
        return words(output), gold
    if len(gold) > 1:  # Vitamin A, in any place
        return _plain([word for word in found if word not in ARTICLES - articles]), gold
    last = found[-1:] if articles.intersection(found[-1:]) else ()
    return _without_articles(found[: len(found) - len(last)]) + list(last), gold


@lru_cache(maxsize=4096)
def _all_words(text: str) -> tuple[str, ...]:
    """Words with articles; LETTER replaces an A that is not an article."""
    text = MINUS.sub("-", in_ascii(text))
    text = JOINED.sub("", THOUSANDS.sub(lambda found: found[0].replace(",", ""), text))
    text = PUNCTUATION.sub(_punctuation, LETTERS.sub(LETTER, text))
    text = unicodedata.normalize("NFC", text.casefold())
    if not text.isascii():
        text = _characters_apart(text)
    return tuple(text.split())


def _punctuation(found: re.Match[str]) -> str:
    """What becomes of a sign: SQuAD deletes that of ASCII."""
    sign = found[0]
    if found["kept"] or sign == LETTER:
        return "0." if sign == "." and not found.string[: found.start()][-1:].isdigit() else sign
    if sign.isascii() or sign in INSIDE_WORDS:
        return ""
    return " " if unicodedata.category(sign).startswith("P") else sign


def _characters_apart(text: str) -> str:
    """Spaces around each character of WITHOUT_SPACES; combining marks stay with the character that
    they belong to.
    """
    pieces, was_apart = list[str](), False
    for char in text:
        if not unicodedata.category(char).startswith("M"):
            is_apart = WITHOUT_SPACES.match(char) is not None
            if is_apart or was_apart:
                pieces.append(" ")
            was_apart = is_apart
        pieces.append(char)
    return "".join(pieces)


def _without_articles(found: Sequence[str]) -> list[str]:
    return _plain([word for word in found if word not in ARTICLES])


def _plain(found: Sequence[str]) -> list[str]:
    return [word.replace(LETTER, "a") for word in found]


def _symbols(text: str) -> list[str]:
    """The words of a text with all their signs, for answers that are nothing else; what ends a
    sentence is no part of them.
    """
    return [word.rstrip(".,;:!?") or word for word in text.casefold().split()]
