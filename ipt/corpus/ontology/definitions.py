"""Edits single definitions: cleans them, turns them into sentences, and masks the name in them.

The definitions come from the ontologies. All other text of pages and questions is our own.
"""

import html
import re
from collections.abc import Iterable

from ipt.corpus.hashing import pick

MASK = "___"

_CITATIONS = re.compile(
    r"""
      \[[^\[\]]*:[^\[\]]*\]                          # [Orphanet:1055], [NCBITaxon:36855], [url:...]
    | \[\d+\]
    | \[[^\[\]]*\](?=\s*(?:[.;,]|$))                 # [WP,unvetted]. at the end of a statement
    | \((?:[^()]*[:;,])?\s*(?:OMIM|UBERON|NCIt|MONDO|ORPHA)[:\w]*[^()]*\)
    | \([^()]*https?://[^()]*\) | https?://\S+
    | \(\s*(?:summary\ by|reviews?\ by|reviewed\ (?:by|in)|(?:also\ )?see
        |(?:adapted|modified|taken)?\s*from|adapted|modified)\b[^()]*\)
    # (From Spitzer et al., J Rheumatol Suppl 1996 Oct;99(1):1-5)
    | \((?i:adapted\ from|from)\ [A-Z].*$
    | \([^()]*\b(?:et\ al|\d+(?:st|nd|rd|th)\ eds?|Wikipedia)\b[^()]*\)
    | \([^()]*\b(?:19|20)\d\d[a-z]?\s*(?:[:,;][^()]*)?\)     # (Wietzman 1962)
    # Kimmel et al, 1995.
    | (?<=[.])\s[A-Z]\w+(?:,?\s(?:et\ al\.?,?|(?:and|&)\s[A-Z]\w+))?
        \s\(?(?:19|20)\d\d[a-z]?\)?(?=\.|$)
    | \(\s*(?:WHO|NCI\d*|CDISC|CSP|MSH|MM|NN|BB|EM|CUMBO|NeuroNames|Brain\ Info)\b[^()]*\)
        (?=\s*[.;]?\s*$)
    | \(\s*(?:Christine\ Fennema-Notestine|Maryann\ Martone)\s*\)
    | \{\d+(?::[^{}]*)?\}                            # {1:Heon et al., 2016}
    """,
    re.VERBOSE,
)
_POINTERS = re.compile(
    r"(?:^|(?<=[.)] ))"
    r"(?:For (?:a|an|further|more)\b[^.]*\bsee|See (?:also )?|(?:Modified|Adapted) from)\b[^.]*\."
)
_RELATIVE = re.compile(r"\b(?:that|which|who|whose|where|when|while|with)\b|,")
_VERBS = """
    is are was were has have can may will consists consist includes include refers contains
    contain describes involves involve represents represent results result occurs occur lies lie
    produces form forms gives begins begin connects connect supplies supply runs extends extend
    arises arise serves serve receives receive plays attaches articulates passes lines covers
    surrounds separates divides carries drains innervates provides develops develop originates
    functions acts helps comprises constitutes corresponds affects causes belongs bears makes
    shows resembles appears regulates secretes usually typically generally often
"""
_VERB = re.compile(rf"\b(?:{'|'.join(_VERBS.split())})\b")
# parts of synonyms that are notes, not names
_ODD = ("[", " OR ", " - ", " caused ", "disease or disorder")
_WORD = re.compile(r"[^\W_]+")
_GENERIC = "a an the of in and or any form type disease disorder syndrome finding that is to by"
_GENERIC_WORDS = frozenset(_GENERIC.split())
_SPELLING = {
    "tumour": "tumor",
    "neoplasm": "tumor",
    "leukaemia": "leukemia",
    "anaemia": "anemia",
    "oesophagus": "esophagus",
}


def clean_definition(text: str) -> str:
    """`text` without citations, cross-references, markup and superfluous spaces.

    It begins with a capital letter and ends with a full stop. Empty if nothing is left.
    """
    text = re.sub(r"</?[a-z]+>", "", html.unescape(text))
    text = re.sub(r"(?<=[.)])nn(?=[A-Z])", " ", text)  # two line breaks that lost their backslashes
    if re.search(r"[\[{(]|http|[12]\d{3}", text):
        text = _CITATIONS.sub("", text)
    text = re.sub(r"\([\s,;.]*\)", "", " ".join(text.split()))
    text = re.sub(
        r"\b([Aa])\(n\) (?=([a-z]))",
        lambda match: f"{match[1]}{'n' if match[2] in 'aeiou' else ''} ",
        text,
    )
    text = re.sub(r"(^A|\ba) (?=[aeio](?!u|ne\b|nce\b))", r"\1n ", text.strip())
    text = re.sub(r"(?<=[a-z])_(?=[a-z])", " ", text)  # develops_from
    text = re.sub(r"(,| and|,and) has symptom (?=\w)", r"\1 ", text).replace(
        "has symptom ", "shows "
    )
    text = re.sub(r"\s+(?=[.,;:])", "", text)
    text = re.sub(r"([,;])(?=[A-Za-z])", r"\1 ", text)
    text = re.sub(r"\.(?:\s*\.)+", ".", text)
    text = _POINTERS.sub("", text.rstrip(".;,: ") + ".")
    text = " ".join(text.split())
    return sentence_case(text) if text.strip(".") else ""


def says_more_than(name: str, definition: str) -> bool:
    """Whether `definition` has words that are neither in `name` nor generic."""
    return bool(set(_words(definition)) - set(_words(name)) - _GENERIC_WORDS)


def sentence_case(text: str) -> str:
    """`text` with a capital first letter, except for words with a spelling of their own (mRNA)."""
    return text[:1].upper() + text[1:] if text[1:2].islower() or not text[1:2].isalnum() else text


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def join_names(names: Iterable[str], word: str = "and") -> str:
    """a, b and c; with semicolons when a name holds a comma itself."""
    names = list(names)
    if len(names) < 2:
        return "".join(names)
    comma = "; " if any("," in name for name in names) else ", "
    return f"{comma.join(names[:-1])}{';' if comma == '; ' else ''} {word} {names[-1]}"


def aliases(name: str, synonyms: Iterable[str], most: int = 3) -> list[str]:
    """The synonyms that differ from the name and from each other by more than spelling, number or
    word order. At most `most`.
    """
    own = set(_words(name))
    worth = [
        text
        for text in synonyms
        if len(text) <= 80
        and name.lower() not in text.lower()
        and not any(odd in text for odd in _ODD)
    ]
    words = {synonym: _words(synonym) for synonym in worth}
    keys = {_spelling_key(_words(name))}
    chosen: list[str] = []
    for synonym in sorted(
        worth, key=lambda synonym: (len(own.intersection(words[synonym])), len(synonym), synonym)
    ):
        key = _spelling_key(words[synonym])
        if len(chosen) < most and key not in keys:
            keys.add(key)
            chosen.append(synonym)
    return chosen


def define(name: str, definition: str) -> str:
    """One or more sentences that define `name`.

    The sentence frame depends on how the definition begins and on a hash of the name.
    """
    if starts_with_name(definition, name):
        return definition
    if definition.startswith("Any "):
        frames = ["The name {0} is used for {1}", "The term {0} covers {1}", "{2} is {1}"]
    elif _is_phrase(definition):
        frames = [
            "{2} is {1}",
            "{2} is {1}",
            "The term {0} refers to {1}",
            "{2} is defined as {1}",
            "{2} denotes {1}",
        ]
    else:
        return f"{sentence_case(name)}: {definition}"
    return pick(frames, "frame", name).format(name, lower_first(definition), sentence_case(name))


def starts_with_name(definition: str, name: str) -> bool:
    """Whether the definition is a sentence about the name: "Bowen disease is ..."."""
    start, rest = definition[: len(name)], definition[len(name) :]
    return start.lower() == name.lower() and rest.removeprefix("s")[:1] in (" ", ",")


def define_it(definition: str) -> str:
    """As `define`, after a sentence that names the term: "It is a tumor that ..."."""
    if definition.startswith("Any "):
        return f"The name is used for {lower_first(definition)}"
    return f"It is {lower_first(definition)}" if _is_phrase(definition) else definition


def mask(definition: str, names: Iterable[str]) -> str:
    """`definition` with `names`, and the words that reveal them, replaced by a blank.

    Masks each complete name. Of the first name (the term's own) it also masks every word of more
    than three letters, every number and abbreviation, and words with the same stem. Ignores case.
    """
    names = list(names)
    lowered = definition.lower()
    spans = []
    for name in names:
        if name.lower() in lowered:  # saves the compilation of most patterns
            whole_name = rf"(?<!\w){re.escape(name)}(?!\w)"
            matches = re.finditer(whole_name, definition, re.IGNORECASE)
            spans += [match.span() for match in matches]
    telling = [word.lower() for word in _WORD.findall(names[0]) if _tells(word)]
    for match in _WORD.finditer(definition):
        word = match[0].lower()
        if any(_same_stem(word, other) for other in telling):
            spans.append(match.span())
    return _blank(definition, spans)


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    pieces: list[str] = []
    end = 0
    for start, stop in sorted(spans):
        gap = text[end:start] if start > end else ""
        if not pieces or gap.strip(" -/,"):
            pieces += [gap, MASK]
        end = max(end, stop)
    return "".join(pieces) + text[end:]


def _tells(word: str) -> bool:
    return (
        len(word) > 3
        or any(letter.isdigit() for letter in word)
        or (len(word) > 1 and word.isupper())
    )


def _same_stem(word: str, other: str) -> bool:
    """Equal, or equal except for an ending: colon and colonic, intestine and intestinal."""
    shortest = min(len(word), len(other))
    if shortest <= 3:
        return word == other
    stem = max(4, shortest - 2)
    return word[:stem] == other[:stem]


def _is_phrase(definition: str) -> bool:
    """Whether the first sentence is a noun phrase with an article ("A tumor that ...") without a
    main verb.
    """
    if not re.match(r"(?:A|An|The|One of)\b", definition):
        return False
    first = re.split(r"(?<=[a-z)][.;]) ", definition)[0]
    verb, relative = _VERB.search(first), _RELATIVE.search(first)
    return verb is None or (relative is not None and relative.start() < verb.start())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _spelling_key(words: list[str]) -> frozenset[str]:
    """Equal for names that differ only in spelling, endings, word order or generic words."""
    plain = (
        _SPELLING.get(word.removesuffix("s"), word.removesuffix("s"))
        for word in words
        if word not in _GENERIC_WORDS
    )
    return frozenset(word.replace("ae", "e").replace("oe", "e")[:5] for word in plain)
