"""A small ontology in the package's format: families of made-up diseases, each name a word of its
own.
"""

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def word(number: int) -> str:
    """A pronounceable word that no other number has."""
    letters = ""
    for _ in range(4):
        number, consonant = divmod(number, len(CONSONANTS))
        number, vowel = divmod(number, len(VOWELS))
        letters += CONSONANTS[consonant] + VOWELS[vowel]
    return letters


def entries(groups: int = 6, families: int = 4, members: int = 9) -> dict[str, dict]:
    """root > groups > families > members; every name differs from every other in all its words."""
    result = {
        "X:0": _entry(
            "root illness",
            "The illness that all others are kinds of, whatever its cause may be.",
            {},
        )
    }

    def add(number: int, parent: str, sentences: int) -> str:
        term_id, name = f"X:{number}", f"{word(number * 7919)} {word(number * 104729 + 13)}"
        above = {ancestor: steps + 1 for ancestor, steps in result[parent]["ancestors"].items()} | {
            parent: 1
        }
        detail = " ".join(f"{word(number + 31 * i)} {word(number + 57 * i)}" for i in range(6))
        definition = " ".join(
            [f"A slow condition that follows exposure to {detail}."]
            + ["Recovery takes several weeks at most."] * sentences
        )
        result[term_id] = _entry(
            name, definition, above, synonyms=[f"{word(number * 31337 + 5)} complaint"]
        )
        return term_id

    number = 1
    for _ in range(groups):
        group = add(number, "X:0", 3)
        number += 1
        for _ in range(families):
            family = add(number, group, 3)
            number += 1
            for _ in range(members):
                add(number, family, 1)
                number += 1
    return result


def _entry(
    label: str,
    description: str,
    ancestors: dict[str, int],
    synonyms: list[str] | None = None,
    **others,
) -> dict:
    return {
        "label": label,
        "description": description,
        "ancestors": ancestors,
        "synonyms": synonyms or [],
        "deprecated": False,
        **others,
    }
