"""Texts and outputs of models hold long runs of one sign: dotted lines, rulers, tables, loops. None
may take quadratic time.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from time import process_time

import pytest

from ipt.corpus.ontology.definitions import clean_definition, mask
from ipt.corpus.words import words_of
from ipt.rendering.pairs import read_pair
from ipt.synthesis import qa_readers
from ipt.synthesis.chains import SENTENCE_END, sentences
from ipt.synthesis.formats.json_output import read_json
from ipt.synthesis.formats.rule_based import mine
from ipt.synthesis.formats.tags import Pair, parse
from ipt.synthesis.quality import statistics
from ipt.synthesis.quality.task_types import kind_of

# linear time is 16 times as much for a text 16 times as long, quadratic time 256 times
SHORT, FACTOR = (2_000, 16)
LIMIT = 80  # between the two, in the middle on a logarithmic scale, with room for what is done once


def read_words(text: str) -> None:
    document = statistics.read_document(text)
    words = statistics.read_pair(text, text, document)
    kind_of(text, text, words.question, words.answer)
    statistics.frame(words.question, document.known)


READERS: dict[str, Callable[[str], object]] = {
    "rules": lambda text: mine(f"The title of the text\n{text}", 0),
    "sentences": sentences,
    "measures": read_words,
    "words": words_of,
    "pairs": parse,
    "json": lambda text: (read_json(text), read_json(text + " ]")),
    "pair": lambda text: read_pair(Pair(text, text)),
    "tuning": lambda text: (
        qa_readers._unwrap(text),
        qa_readers._sentences(text),
        qa_readers._grounded(text, [Pair(text, text)], Counter()),
    ),
    "definitions": lambda text: (clean_definition(text), mask(text, ("heart", "blood"))),
}
UNITS = [
    *".,;:!?-_=*#|/\\ \n0aA()[]{}<\"'…。é",
    *(
        ". ",
        "! ",
        " .",
        "a ",
        "a. ",
        "A. ",
        "1,",
        "0.",
        "\n\n",
        "\n ",
        '."',
        ".) ",
        "Dr. ",
        "the term is ",
        "</END>",
        "<QUE> a <ANS> b </END>\n\n",
        '{"a":',
        '{"a": [',
    ),
    "A heart is a muscle that pumps the blood through the body of an animal. ",
    "Because it is cold today, the water of the lake is frozen. However, ",
]


def cpu_time(read: Callable[[str], object], text: str) -> float:
    """The lesser of two, in seconds of this process's own work: what else the machine does adds
    nothing.
    """
    times = []
    for _ in range(2):
        started = process_time()
        read(text)
        times.append(process_time() - started)
        if times[-1] > 1:
            break
    return min(times)


@pytest.mark.parametrize("name", READERS)
def test_time_grows_with_the_length(name):
    read = READERS[name]
    read("a")
    slow = {}
    for unit in UNITS:
        short, long = (unit * -(-length // len(unit)) for length in (SHORT, SHORT * FACTOR))
        # below that the clock and the garbage collector are what is measured
        base = max(cpu_time(read, short), 2e-4)
        if (taken := cpu_time(read, long)) > LIMIT * base:
            slow[unit] = (base, taken)
    assert not slow


def test_sentences_are_cut_where_a_pattern_that_tries_each_place_would():
    tries_all = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?![a-z])|[。！？｡।]+[」』”’）]*\s*|\n\s*")
    random_ = random.Random(0)
    for _ in range(3_000):
        text = "".join(random_.choices(".!?…\"')] \n\taAb。」1", k=random_.randint(1, 14)))
        assert list(map(re.Match.span, SENTENCE_END.finditer(text))) == list(
            map(re.Match.span, tries_all.finditer(text))
        ), text
