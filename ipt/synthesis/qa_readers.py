"""Readers of context-based question answering data sets: each yields contexts with all their pairs
(paper section 3.1), for fine-tuning and evaluating a synthesizer.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ipt.corpus.readers.files import CorpusFile
from ipt.corpus.readers.jsonl import json_lines
from ipt.errors import UserError
from ipt.synthesis.formats.tags import Pair, pairs_text, parse

MAX_CONTEXT_WORDS = 280
MAX_ANSWER_WORDS = 60
MIN_PAIRS = 2  # contexts with many pairs are preferred (paper section 3.1)
MAX_PARAGRAPH_WORDS, MAX_DEFINITION_WORDS = 90, 50  # MedQuAD
MAX_PAGE_ENTRIES = 6
WORDINGS: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_name("medquad_wordings.yaml").read_text(encoding="utf-8")
)
BOILERPLATE = re.compile(
    r"Summary :|Human Phenotype Ontology|These resources|resources below|Key Points|table below"
    r"|Resources for|is available|[Cc]lick here|www\.|http"
)


class Example(NamedTuple):
    id: str
    context: str
    pairs: list[Pair]


Reader = Callable[[Path, random.Random, Counter[str]], Iterator[Example]]


def read_examples(
    kind: str, path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """The examples that the reader `kind` of READERS finds in a file; excluded items are counted in
    `dropped`. Raises UserError for a file with another structure.
    """
    try:
        for example in READERS[kind](path, random_, dropped):
            # raises UnicodeError for text that cannot be written
            "".join((example.id, example.context, *map("".join, example.pairs))).encode()
            yield example
    except (
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        RecursionError,
        json.JSONDecodeError,
        UnicodeError,
    ) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} does not have the structure of kind={kind} ({cause[:200]}): use the original "
            "file of the data set, or another kind"
        ) from None


def distinct_pairs(pairs: list[Pair], dropped: Counter[str]) -> list[Pair]:
    """The pairs with a question, an answer, and a question that did not occur before."""
    kept: dict[str, Pair] = {}
    for pair in pairs:
        if not pair.question or not pair.answer:
            dropped["empty_question_or_answer"] += 1
        elif pair.question.lower() in kept:
            dropped["doubled_question"] += 1
        else:
            kept[pair.question.lower()] = pair
    return list(kept.values())


# Readers: each yields contexts with at least one pair
# ----------------------------------------------------------------------------------------------


def _read_collection(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """JSON lines with the schema of ft-instruction-synthesizer-collection: `context`, which may be
    empty, and `QA_list` with `Q` and `A`.

    The published examples are used as they are: without length limits, and with one pair or more.
    """
    for number, row in enumerate(_read_jsonl(path)):
        try:
            context = row["context"].strip()
            pairs = [Pair(pair["Q"].strip(), pair["A"].strip()) for pair in row["QA_list"]]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number + 1}: expected `context` (text) and `QA_list` (objects with "
                "texts Q and A)"
            ) from None
        pairs = distinct_pairs(pairs, dropped)
        if not pairs:
            dropped["context_without_pairs"] += 1
        elif parse(pairs_text(pairs)).pairs != pairs:
            dropped["pairs_hold_a_tag"] += 1
        else:
            yield Example(f"{path.name.split('.')[0]}/{number}", context, pairs)


def _read_fairytaleqa(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """FairytaleQA: sections of stories, with `id` (STORY#SECTION), `context`, and `qa` with
    `question` and `answer`.
    """
    sections = []
    for row in _read_jsonl(path):
        pairs = [Pair(_sentence(pair["question"]), _sentence(pair["answer"])) for pair in row["qa"]]
        grounded = _grounded(row["context"], pairs, dropped)
        sections.append(Example(row["id"], _unwrap(row["context"]), grounded))
    yield from _joined(sections, dropped)


def _read_squad(path: Path, random_: random.Random, dropped: Counter[str]) -> Iterator[Example]:
    """Files in the format of SQuAD, such as COVID-QA and XQuAD: passages of complete sentences,
    with the pairs whose answers they contain.
    """
    with CorpusFile(str(path), path.name).open_lines() as file:
        articles = json.load(file)["data"]
    examples = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            name = article.get("title") or paragraph.get("document_id")
            context, questions = paragraph["context"], paragraph["qas"]
            answered = [_answered(qa) for qa in questions if qa["answers"]]
            answered.sort(key=lambda answer: answer[0])
            dropped["answer_cut_or_missing"] += len(questions)
            for start, end in _passages(context, [position for position, _, _ in answered]):
                pairs = [pair for first, last, pair in answered if start <= first and last <= end]
                dropped["answer_cut_or_missing"] -= len(pairs)
                examples.append(Example(f"{name}#{start}", _unwrap(context[start:end]), pairs))
    yield from _joined(examples, dropped)


def _answered(qa: dict[str, Any]) -> tuple[int, int, Pair]:
    """Start and end of the first answer of a SQuAD question, and the pair."""
    answer = qa["answers"][0]
    start = answer["answer_start"]
    pair = Pair(_sentence(qa["question"]), _sentence(answer["text"]))
    return start, start + len(answer["text"]), pair


def _read_adversarial_qa(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """AdversarialQA with the prompts of P3: JSON lines with `template`, `prompt` and `completion`,
    one per question, together with other data sets.
    """
    contexts: dict[str, list[Pair]] = {}
    for row in _read_jsonl(path):
        if not re.fullmatch(r"adversarial_qa_\w+_question_context_answer", row["template"]):
            dropped["other_template"] += 1
            continue
        match = re.fullmatch(
            r'Question: "(.+)"\s+Context: "(.+)"\s+Answer:\s*', row["prompt"], re.DOTALL
        )
        if match is None:
            dropped["prompt_not_understood"] += 1
            continue
        answer = row["completion"].removesuffix("<|endoftext|>")
        pair = Pair(_sentence(match[1]), _sentence(answer))
        contexts.setdefault(_unwrap(match[2]), []).append(pair)
    for number, (context, pairs) in enumerate(contexts.items()):
        text = context.lower()
        in_order = sorted(pairs, key=lambda pair: text.find(pair.answer.lower()))
        yield from _kept(f"adversarial_qa/{number}", context, in_order, dropped)


def _read_medquad(path: Path, random_: random.Random, dropped: Counter[str]) -> Iterator[Example]:
    """MedQuAD: the context consists of the first sentences of each answer of a document, and each
    question asks for the first sentence of its section.

    MedQuAD words all questions of a type alike ("What is (are) X ?"), so a random wording of that
    type replaces each.
    """
    for row in _read_jsonl(path):
        sections = [(qa["qtype"], _sentences(_unwrap(qa["answer"]))) for qa in row["qa"]]
        random_.shuffle(sections)
        paragraphs: list[str] = []
        pairs: list[Pair] = []
        words = 0
        for kind, sentences in sections:
            paragraph = _take_words(sentences, MAX_PARAGRAPH_WORDS)
            is_short = not paragraph or _words(sentences[0]) < 6
            is_long = words + _words(paragraph) > MAX_CONTEXT_WORDS
            if kind not in WORDINGS or is_short or is_long:
                dropped["section_not_used"] += 1
                continue
            words += _words(paragraph)
            paragraphs.append(paragraph)
            pairs.append(Pair(_question(kind, _subject(row), random_), sentences[0]))
        if paragraphs:
            yield from _kept(row["id"], "\n\n".join(paragraphs), pairs, dropped)


def _read_medquad_pages(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """MedQuAD as pages on several subjects: up to six documents of one source, each with a passage
    and one or two questions.

    Such pages resemble reference works and ontologies, which no question answering data set covers.
    """
    rows = list(_read_jsonl(path))
    random_.shuffle(rows)
    rows.sort(key=lambda row: row["source"])
    page: list[tuple[str, list[Pair]]] = []
    for row in rows:
        entry = _page_entry(row, random_)
        if entry is None:
            dropped["document_without_definition"] += 1
            continue
        size = sum(_words(text) for text, _ in page) + _words(entry[0])
        if page and (size > MAX_CONTEXT_WORDS - 20 or len(page) == MAX_PAGE_ENTRIES):
            yield from _page(page, random_, dropped)
            page = []
        page.append(entry)
    if page:
        yield from _page(page, random_, dropped)


def _page(
    page: list[tuple[str, list[Pair]]], random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    separator, bullet = random_.choice([("\n", "- "), ("\n\n", "")])
    context = separator.join(bullet + text for text, _ in page)
    pairs = [pair for _, entry in page for pair in entry]
    yield from _kept(pairs[0].question, context, pairs, dropped)


def _page_entry(row: dict[str, Any], random_: random.Random) -> tuple[str, list[Pair]] | None:
    """A passage on the subject of a document, and questions that it answers; None without a
    definition.
    """
    name = _subject(row)
    sections = {qa["qtype"]: _sentences(_unwrap(qa["answer"])) for qa in row["qa"]}
    definition = sections.get("information") or [""]
    match = re.match(
        rf"(?:{re.escape(name)}(?: \([^)]*\))?|It|This) (?:is|are|refers to|means) (.+)\.$",
        definition[0],
        re.IGNORECASE,
    )
    if match is None or not 6 <= _words(definition[0]) <= MAX_ANSWER_WORDS:
        return None
    text = _take_words(definition, MAX_DEFINITION_WORDS)
    if random_.random() < 0.5:
        pairs = [Pair(_question("information", name, random_), definition[0])]
    else:
        asks = random_.choice(["What do you call", "What is the name for", "Which term stands for"])
        pairs = [Pair(f"{asks} {match[1]}?", name)]
    others = []
    for kind, sentences in sections.items():
        if kind in WORDINGS and kind != "information" and sentences:
            others.append(kind)
    if others:
        kind = random_.choice(others)
        fact = sections[kind][0]
        if 6 <= _words(fact) <= 45:
            text += " " + fact
            pairs.append(Pair(_question(kind, name, random_), fact))
    return (text if name.lower() in text.lower() else f"{name}: {text}"), pairs


READERS: dict[str, Reader] = {
    "adversarial_qa": _read_adversarial_qa,
    "collection": _read_collection,
    "fairytaleqa": _read_fairytaleqa,
    "medquad": _read_medquad,
    "medquad_pages": _read_medquad_pages,
    "squad": _read_squad,
}


# Contexts and pairs
# ----------------------------------------------------------------------------------------------


def _joined(sections: Iterable[Example], dropped: Counter[str]) -> Iterator[Example]:
    """Join neighbouring short sections of one work (the part of `id` before #) to contexts with
    more pairs.
    """
    pending: Example | None = None
    for section in sections:
        if pending is None:
            pending = section
            continue
        is_same = pending.id.split("#")[0] == section.id.split("#")[0]
        if is_same and _words(pending.context) + _words(section.context) <= MAX_CONTEXT_WORDS:
            context = f"{pending.context}\n\n{section.context}"
            pending = Example(pending.id, context, pending.pairs + section.pairs)
        else:
            yield from _kept(*pending, dropped)
            pending = section
    if pending is not None:
        yield from _kept(*pending, dropped)


def _kept(id: str, context: str, pairs: list[Pair], dropped: Counter[str]) -> Iterator[Example]:
    """The example, if enough of its pairs are complete, short, and have distinct questions and
    answers.
    """
    short = [pair for pair in pairs if _words(pair.answer) <= MAX_ANSWER_WORDS]
    dropped["long_answer"] += len(pairs) - len(short)
    asked = distinct_pairs(short, dropped)
    # one pair for each answer, because repeated answers teach the model to repeat
    kept: dict[str, Pair] = {}
    for pair in reversed(asked):
        kept[pair.answer.lower()] = pair
    dropped["doubled_answer"] += len(asked) - len(kept)
    if len(kept) < MIN_PAIRS:
        dropped["context_with_few_pairs"] += 1
    elif _words(context) > MAX_CONTEXT_WORDS:
        dropped["long_context"] += 1
    else:
        yield Example(id, context, list(reversed(kept.values())))


def _grounded(context: str, pairs: list[Pair], dropped: Counter[str]) -> list[Pair]:
    """Pairs with at least four fifths of the answer's words in the context."""
    words = set(re.findall(r"\w+", context.lower()))
    grounded = []
    for pair in pairs:
        answer = re.findall(r"\w+", pair.answer.lower())
        if sum(word in words for word in answer) / max(1, len(answer)) >= 0.8:
            grounded.append(pair)
    dropped["answer_not_in_context"] += len(pairs) - len(grounded)
    return grounded


def _passages(text: str, positions: list[int]) -> Iterator[tuple[int, int]]:
    """Disjoint spans of complete sentences around the sorted `positions`, with at most
    MAX_CONTEXT_WORDS words each.
    """
    starts = [0, *(match.end() for match in re.finditer(r"(?<=[.?!])\s+(?=[A-Z])|\n+", text))]
    spans = list(zip(starts, [*starts[1:], len(text)], strict=True))
    words = [_words(text[start:end]) for start, end in spans]
    done = 0
    for position in positions:
        if position < done:
            continue
        last = next(number for number, (start, end) in enumerate(spans) if start <= position < end)
        first = last
        size = words[last]
        while first > 0 and spans[first - 1][0] >= done:
            if size + words[first - 1] > MAX_CONTEXT_WORDS // 3:
                break
            first -= 1
            size += words[first]
        while last + 1 < len(spans) and size + words[last + 1] <= MAX_CONTEXT_WORDS:
            last += 1
            size += words[last]
        done = spans[last][1]
        yield spans[first][0], done


def _subject(row: dict[str, Any]) -> str:
    return str(row["focus"].split("(")[0].strip())


def _question(kind: str, subject: str, random_: random.Random) -> str:
    return random_.choice(WORDINGS[kind]).format(subject)


def _sentences(text: str) -> list[str]:
    """Sentences, without questions (many answers of MedQuAD repeat their question) and without
    phrases of web pages.
    """
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", text)
    return [text for text in sentences if not text.endswith("?") and not BOILERPLATE.search(text)]


def _take_words(sentences: list[str], limit: int) -> str:
    """The first sentence, and further ones up to `limit` words."""
    taken = ""
    for sentence in sentences:
        if taken and _words(taken) + _words(sentence) > limit:
            break
        taken += " " + sentence if taken else sentence
    return taken


def _unwrap(text: str) -> str:
    """Paragraphs without line breaks and repeated spaces."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return "\n\n".join(filter(None, paragraphs))


def _sentence(text: str) -> str:
    """One line that begins with a capital letter."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:]


def _words(text: str) -> int:
    return len(text.split())


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in json_lines(CorpusFile(str(path), path.name)))
