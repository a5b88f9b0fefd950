"""Text as a list of words, for comparing texts: what is compared is neither case nor punctuation
nor line breaks.
"""

import re
import unicodedata
from functools import cache
from itertools import groupby

# Scripts that write no spaces between words: each of their characters counts as a word.
UNSPACED = (
    range(0x0E00, 0x0F00),  # Thai, Lao
    range(0x1000, 0x10A0),  # Myanmar
    range(0x1780, 0x1800),  # Khmer
    range(0x3005, 0x3008),
    range(0x3040, 0x3100),  # Hiragana, Katakana
    range(0x31F0, 0x3200),
    range(0x3400, 0xA000),  # Han
    range(0xF900, 0xFB00),
)

_ASCII_WORD = re.compile(r"[a-z0-9]+")


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case: runs of letters, digits and their marks; a character each
    in scripts without spaces.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _any_word().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _any_word() -> re.Pattern[str]:
    """Marks belong to words (without them a Hindi word falls apart), but `\\w` leaves them out: so
    the classes are spelled out.

    Up to U+FFFF, that is, which is what `re` looks up in a table; beyond it (rare Han characters)
    each letter is a word.
    """
    kinds = [
        (
            code,
            unicodedata.category(chr(code))[0] in "LNM",
            any(code in script for script in UNSPACED),
        )
        for code in range(0x10000)
    ]
    spaced = _ranges([code for code, letter, alone in kinds if letter and not alone])
    alone = _ranges([code for code, letter, alone in kinds if letter and alone])
    return re.compile(f"[{spaced}]+|[{alone}]|[^\\W_]")


def _ranges(codes: list[int]) -> str:
    """The inside of a character class that holds `codes`, which ascend."""
    runs = [
        [code for _, code in run]
        for _, run in groupby(enumerate(codes), key=lambda numbered: numbered[1] - numbered[0])
    ]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
