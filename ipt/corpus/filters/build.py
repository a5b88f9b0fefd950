"""Filters that drop documents: too short or long, in another language, or duplicates of an earlier
one.

Documents are counted by the reason that a filter returns. A filter sees only documents that passed
the previous filters, so the first of two equal documents is kept.
"""

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from typing import Any

from ipt.config import CorpusConfig
from ipt.corpus.filters.near_duplicates import NearDuplicates
from ipt.corpus.words import words_of
from ipt.errors import UserError

TOO_SHORT, TOO_LONG = "shorter than corpus.min_characters", "longer than corpus.max_characters"
UNCERTAIN = "language less probable than corpus.language_probability"
SAME = "same text as an earlier document"
NEARLY_SAME = "nearly the same text as an earlier document"
LANGUAGE_CHARACTERS = 1000  # of a document that its language is read off
SHINGLE = 5  # words, or characters in scripts without spaces
LOWEST_SIMILARITY = 0.5  # below it most pairs of documents would have to be compared

Filter = Callable[[str], str | None]  # text -> why it is left out, or None


def build_filters(config: CorpusConfig) -> list[Filter]:
    """The filters that `config` requests, the cheap ones first. Raises UserError for invalid
    settings.
    """
    _check(config)
    filters: list[Filter] = []
    if config.min_characters:
        filters.append(lambda text: TOO_SHORT if len(text) < config.min_characters else None)
    if config.max_characters is not None:
        longest = config.max_characters
        filters.append(lambda text: TOO_LONG if len(text) > longest else None)
    if config.languages:
        filters.append(_language_filter(config.languages, config.language_probability))
    if config.exact_duplicates == "remove":
        filters.append(_exact_filter())
    if config.near_duplicates is not None:
        filters.append(_near_filter(config.near_duplicates))
    return filters


def reason_to_drop(text: str, filters: list[Filter]) -> str | None:
    """The reason that the first matching filter gives, or None to keep the document."""
    for filter_reason in filters:
        reason = filter_reason(text)
        if reason:
            return reason
    return None


def _check(config: CorpusConfig) -> None:
    if config.min_characters < 0:
        raise UserError(f"corpus.min_characters={config.min_characters}: expected 0 or more")
    if config.max_characters is not None and config.max_characters < max(config.min_characters, 1):
        raise UserError(
            f"corpus.max_characters={config.max_characters}: expected null or at least 1 and "
            "corpus.min_characters"
        )
    if not 0 <= config.language_probability <= 1:
        raise UserError(
            f"corpus.language_probability={config.language_probability}: expected 0 to 1"
        )
    if config.near_duplicates is not None and not LOWEST_SIMILARITY <= config.near_duplicates <= 1:
        raise UserError(
            f"corpus.near_duplicates={config.near_duplicates}: expected null or a similarity from "
            f"{LOWEST_SIMILARITY} to 1"
        )


def _language_filter(languages: list[str], probability: float) -> Filter:
    identifier = _language_identifier()
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise UserError(
            f"corpus.languages names {', '.join(unknown)}: expected codes among "
            f"{', '.join(sorted(identifier.labels))}"
        )

    def language(text: str) -> str | None:
        found, certainty = identifier.classify(text[:LANGUAGE_CHARACTERS])
        if found not in languages:
            return f"language {found}"
        return UNCERTAIN if certainty < probability else None

    return language


@cache
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # takes a second


def _exact_filter() -> Filter:
    seen: set[int] = set()

    def same(text: str) -> str | None:
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
        if digest in seen:
            return SAME
        seen.add(digest)
        return None

    return same


def _near_filter(similarity: float) -> Filter:
    """Compares the sets of runs of `SHINGLE` words. A text without words is never a duplicate."""
    kept = NearDuplicates(similarity)

    def nearly_same(text: str) -> str | None:
        words = words_of(text)
        runs = [
            " ".join(words[start : start + SHINGLE])
            for start in range(max(1, len(words) - SHINGLE + 1))
        ]
        return NEARLY_SAME if words and not kept.add(runs) else None

    return nearly_same
