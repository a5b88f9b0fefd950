"""Splits text into words to compare texts regardless of case, punctuation and line breaks."""

import re
import unicodedata
from functools import cache

# Code points of scripts without spaces between words: each character counts as a word.
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
    """The words of `text` in lower case: runs of letters, digits and combining marks.

    In scripts without spaces each character is a word.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _any_word().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _any_word() -> re.Pattern[str]:
    r"""The pattern of a word in any script.

    The character classes are listed because `\w` excludes marks, without which a Hindi word falls
    apart. They end at U+FFFF, where the lookup table of `re` ends; beyond it (rare Han characters)
    each letter is a word.
    """
    # L, N, M, ... for each code point: its general category; lower case in scripts without spaces
    kinds = "".join(unicodedata.category(chr(code))[0] for code in range(0x10000))
    for script in UNSPACED:
        unspaced = kinds[script.start : script.stop].lower()
        kinds = kinds[: script.start] + unspaced + kinds[script.stop :]
    return re.compile(f"[{_ranges('[LNM]+', kinds)}]+|[{_ranges('[lnm]+', kinds)}]|[^\\W_]")


def _ranges(pattern: str, kinds: str) -> str:
    """The ranges of code points, as in a character class, whose kinds match `pattern`."""
    runs = re.finditer(pattern, kinds)
    return "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in runs)
