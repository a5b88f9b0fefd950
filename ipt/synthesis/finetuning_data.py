"""Data for fine-tuning an instruction synthesizer: contexts with all their pairs, in the
synthesizer's own format.

Context-based question answering sets are regrouped so that one example is one context and its pairs
(paper section 3.1). Several examples of one set are concatenated to a few-shot text, and only the
pairs are trained on.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ipt.config import SourceConfig
from ipt.console import progress
from ipt.corpus.readers.files import CorpusFile, file_kind
from ipt.corpus.readers.jsonl import json_lines
from ipt.errors import MissingFileError, UserError
from ipt.files import write_parts
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text, parse

TUNING_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("examples", pa.list_(pa.struct([("prompt", pa.string()), ("response", pa.string())]))),
        ("fill_to", pa.int32()),
    ]
)
MAX_CONTEXT_WORDS = 280
MAX_ANSWER_WORDS = 60
MIN_PAIRS = 2  # contexts with many pairs are preferred (paper section 3.1)

# Texts, each a list of shots, to their lengths in tokens with BOS and EOS: what the token store
# will hold.
Lengths = Callable[[Iterable[list[dict[str, str]]]], list[int]]


class Example(NamedTuple):
    id: str
    context: str
    pairs: list[Pair]


def build_tuning_texts(
    config: SourceConfig, name: str, output: Path, seed: int, lengths: Lengths | None = None
) -> dict[str, Any]:
    """Write `texts/part-*.parquet` with `examples` of (context, pairs) and return counts, those
    left out by data set and reason.

    Each text holds examples of one data set: 1 to `config.shots` of them, or with `shots` null as
    many as `config.max_tokens` allows (paper section 3.1). `lengths` gives the tokens of each text;
    it is needed where `max_tokens` is set.
    """
    assert config.max_tokens is None or lengths is not None
    counts: dict[str, dict[str, Any]] = {}
    write_parts(output / "texts", _all_texts(config, name, seed, lengths, counts), TUNING_SCHEMA)
    totals = {
        count: sum(of[count] for of in counts.values()) for count in ("texts", "contexts", "pairs")
    }
    dropped = sum((of["dropped"] for of in counts.values()), Counter[str]())
    return {**totals, "dropped": dict(dropped), "data_sets": counts}


def check_tuning_source(name: str, config: SourceConfig) -> None:
    key = f"mixture.sources.{name}"
    if config.kind not in READERS:
        raise UserError(
            f"{key}.kind={config.kind}: must be texts, instructions, store or one of "
            f"{', '.join(READERS)}"
        )
    if config.shots is None and config.max_tokens is None:
        raise UserError(f"{key}.shots=null: as many examples as fit need {key}.max_tokens")
    for field in ("shots", "max_contexts", "max_tokens"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise UserError(f"{key}.{field}={value}: must be at least 1")
    data_sets(name, config)


def data_sets(name: str, config: SourceConfig) -> dict[str, list[Path]]:
    """The files of each data set of a source. Raises a one-line error where there are none.

    A file is one data set. A folder holds one data set in each of its folders, as
    DATASET/shard/*.jsonl (the layout of ft-instruction-synthesizer-collection); `config.include`
    names those that are taken, and an empty list takes all.
    """
    path = Path(config.path)
    if not config.path or not path.exists():
        raise MissingFileError(
            f"mixture.sources.{name}.path={config.path}: no such file or folder: fetch the data "
            "set, or say where it is"
        )
    if not path.is_dir():
        if config.include:
            raise UserError(
                f"mixture.sources.{name}.include names data sets of a folder, but "
                f"path={config.path} is a file"
            )
        return {name: [path]}
    if config.kind != "collection":
        raise UserError(
            f"mixture.sources.{name}.path={config.path} is a folder: kind={config.kind} reads a "
            "file"
        )
    shards = {folder.name: _shards(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    found = {data_set: files for data_set, files in shards.items() if files}
    missing = [data_set for data_set in config.include if data_set not in found]
    if missing or not found:
        wanted, there = ", ".join(missing) or "any data set", ", ".join(found) or "none"
        raise MissingFileError(
            f"mixture.sources.{name}.path={config.path} does not hold {wanted} "
            f"(DATASET/shard/*.jsonl); it holds: {there}"
        )
    return {data_set: found[data_set] for data_set in config.include or found}


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("shard/*") if file_kind(path.name) == "jsonl")


def read_examples(
    kind: str, path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """What the reader `kind` of READERS finds in a file. Raises UserError that names a file which
    is not laid out as its data set is.
    """
    try:
        for example in READERS[kind](path, random_, dropped):
            "".join(
                (example.id, example.context, *("".join(pair) for pair in example.pairs))
            ).encode()  # texts that can be written
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
            f"{path} is not laid out as {kind} is ({cause[:200]}): take the data set's own file, "
            "or another kind"
        ) from None


def distinct_pairs(pairs: list[Pair], dropped: Counter[str]) -> list[Pair]:
    """Pairs that a synthesizer's output could hold: both sides said, and no question twice."""
    kept: dict[str, Pair] = {}
    for pair in pairs:
        if not pair.question or not pair.answer:
            dropped["empty_question_or_answer"] += 1
        elif pair.question.lower() in kept:
            dropped["doubled_question"] += 1
        else:
            kept[pair.question.lower()] = pair
    return list(kept.values())


def _all_texts(
    config: SourceConfig,
    name: str,
    seed: int,
    lengths: Lengths | None,
    counts: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The texts of one data set after the other; `counts` is filled on the way."""
    sources, fill_to = data_sets(name, config), config.max_tokens if config.fill else None
    with progress(f"texts {name}", len(sources)) as bar:
        for data_set, files in sources.items():
            random_ = random.Random(f"{seed}/{data_set}")
            dropped: Counter[str] = Counter()
            examples = [
                example
                for file in files
                for example in read_examples(config.kind, file, random_, dropped)
            ]
            random_.shuffle(examples)
            chosen = _choose(examples, config, lengths, dropped)
            texts = 0
            for group in _groups(chosen, config, random_):
                texts += 1
                yield {
                    "id": f"{data_set}/{group[0].id}",
                    "source": name,
                    "examples": [_shot(example) for example in group],
                    "fill_to": fill_to,
                }
            pairs = sum(len(example.pairs) for example, _ in chosen)
            counts[data_set] = {
                "texts": texts,
                "contexts": len(chosen),
                "pairs": pairs,
                "dropped": dropped,
            }
            bar.advance()


def _choose(
    examples: list[Example], config: SourceConfig, lengths: Lengths | None, dropped: Counter[str]
) -> list[tuple[Example, int]]:
    """Examples with their tokens: those that fit alone, and of these the ones with most pairs
    (paper section 3.1).
    """
    sizes = (
        [0] * len(examples)
        if lengths is None or config.max_tokens is None
        else lengths([_shot(example)] for example in examples)
    )
    fitting = [
        (example, size)
        for example, size in zip(examples, sizes, strict=True)
        if size <= (config.max_tokens or size)
    ]
    richest = sorted(range(len(fitting)), key=lambda number: -len(fitting[number][0].pairs))[
        : config.max_contexts
    ]
    dropped += Counter(
        longer_than_max_tokens=len(examples) - len(fitting),
        beyond_max_contexts=len(fitting) - len(richest),
    )
    return [fitting[number] for number in sorted(richest)]


def _groups(
    examples: list[tuple[Example, int]], config: SourceConfig, random_: random.Random
) -> Iterator[list[Example]]:
    """Neighbouring examples that make one text."""
    group: list[Example] = []
    tokens = shots = 0
    for example, size in examples:
        if group and (
            len(group) == shots
            or (config.max_tokens is not None and tokens + size > config.max_tokens)
        ):
            yield group
            group, tokens = [], 0
        if not group:
            shots = random_.randint(1, config.shots) if config.shots is not None else len(examples)
        group.append(example)
        tokens += size
    if group:
        yield group


def _shot(example: Example) -> dict[str, str]:
    """What is read and what is learnt. Of an example without a context only BOS is read, which
    tokenising puts in front.
    """
    return {
        "prompt": context_text(example.context) if example.context else "",
        "response": pairs_text(example.pairs),
    }


# Readers: each yields a context with at least one pair, and counts what it leaves out
# ------------------------------------


def _read_collection(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """JSON lines of the schema of ft-instruction-synthesizer-collection: `context`, which may be
    empty, and `QA_list` of `Q` and `A`.

    Contexts and answers may be of any length, and one pair is enough: these are the published
    examples, taken as they are.
    """
    for number, row in enumerate(_read_jsonl(path)):
        try:
            context, sides = (
                row["context"].strip(),
                [(pair["Q"].strip(), pair["A"].strip()) for pair in row["QA_list"]],
            )
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number + 1}: expected `context` (text) and `QA_list` (objects with "
                "texts Q and A)"
            ) from None
        pairs = distinct_pairs([Pair(*side) for side in sides], dropped)
        if not pairs:
            dropped["context_without_pairs"] += 1
        elif parse(pairs_text(pairs)).pairs != pairs:
            dropped["pairs_hold_a_tag"] += 1
        else:
            yield Example(f"{path.name.split('.')[0]}/{number}", context, pairs)


def _read_fairytaleqa(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """FairytaleQA: sections of stories, as `id` (STORY#SECTION), `context` and `qa` of `question`
    and `answer`.
    """
    sections = []
    for row in _read_jsonl(path):
        pairs = [Pair(_sentence(pair["question"]), _sentence(pair["answer"])) for pair in row["qa"]]
        sections.append(
            Example(row["id"], _unwrap(row["context"]), _grounded(row["context"], pairs, dropped))
        )
    yield from _joined(sections, dropped)


def _read_squad(path: Path, random_: random.Random, dropped: Counter[str]) -> Iterator[Example]:
    """SQuAD-like files, as COVID-QA and XQuAD: passages of whole sentences, each with the pairs
    whose answer it holds.
    """
    with CorpusFile(str(path), path.name).open_lines() as file:
        articles = json.load(file)["data"]
    passages = []
    for title, paragraph in (
        (article.get("title"), paragraph)
        for article in articles
        for paragraph in article["paragraphs"]
    ):
        answered = sorted(
            (qa["answers"][0]["answer_start"], number, qa)
            for number, qa in enumerate(paragraph["qas"])
            if qa["answers"]
        )
        placed = 0
        for start, end in _passages(
            paragraph["context"], [(position, qa) for position, _, qa in answered]
        ):
            whole = [
                qa
                for position, _, qa in answered
                if start <= position and position + len(qa["answers"][0]["text"]) <= end
            ]
            placed += len(whole)
            pairs = [
                Pair(_sentence(qa["question"]), _sentence(qa["answers"][0]["text"])) for qa in whole
            ]
            passages.append(
                Example(
                    f"{title or paragraph.get('document_id')}#{start}",
                    _unwrap(paragraph["context"][start:end]),
                    pairs,
                )
            )
        dropped["answer_cut_or_missing"] += len(paragraph["qas"]) - placed
    yield from _joined(passages, dropped)


def _read_adversarial_qa(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """AdversarialQA as P3 words it: JSON lines of `template`, `prompt` and `completion`, one for
    each question, of other data sets too.
    """
    passages: dict[str, list[Pair]] = {}
    for row in _read_jsonl(path):
        if not re.fullmatch(r"adversarial_qa_\w+_question_context_answer", row["template"]):
            dropped["other_template"] += 1
            continue
        said = re.fullmatch(
            r'Question: "(.+)"\s+Context: "(.+)"\s+Answer:\s*', row["prompt"], re.DOTALL
        )
        if said is None:
            dropped["prompt_not_understood"] += 1
            continue
        answer = row["completion"].removesuffix("<|endoftext|>")
        passages.setdefault(_unwrap(said[2]), []).append(
            Pair(_sentence(said[1]), _sentence(answer))
        )
    for number, (context, pairs) in enumerate(passages.items()):
        in_order = sorted(pairs, key=lambda pair: context.lower().find(pair.answer.lower()))
        yield from _kept(f"adversarial_qa/{number}", context, in_order, dropped)


def _joined(sections: Iterable[Example], dropped: Counter[str]) -> Iterator[Example]:
    """Neighbouring short sections of one work (what `id` has before its #) as one context, which so
    has more pairs.
    """
    pending: Example | None = None
    for section in sections:
        work = section.id.split("#")[0]
        if (
            pending
            and pending.id.split("#")[0] == work
            and _words(pending.context) + _words(section.context) <= MAX_CONTEXT_WORDS
        ):
            pending = Example(
                pending.id, f"{pending.context}\n\n{section.context}", pending.pairs + section.pairs
            )
            continue
        if pending:
            yield from _kept(*pending, dropped)
        pending = section
    if pending:
        yield from _kept(*pending, dropped)


def _read_medquad(path: Path, random_: random.Random, dropped: Counter[str]) -> Iterator[Example]:
    """MedQuAD: the answers of a document, shortened to their first sentences, are the context.

    Each question asks for the first sentence of its section. MedQuAD words the questions of a type
    all alike ("What is (are) X ?"), so each is put in one of several wordings of that type.
    """
    for row in _read_jsonl(path):
        sections = [(qa["qtype"], _sentences(_unwrap(qa["answer"]))) for qa in row["qa"]]
        random_.shuffle(sections)
        paragraphs, pairs, words = [], [], 0
        for kind, sentences in sections:
            paragraph = _take_words(sentences, 90)
            if (
                kind not in WORDINGS
                or not paragraph
                or words + _words(paragraph) > MAX_CONTEXT_WORDS
                or len(sentences[0].split()) < 6
            ):
                dropped["section_not_used"] += 1
                continue
            words += _words(paragraph)
            paragraphs.append(paragraph)
            pairs.append(
                Pair(
                    random_.choice(WORDINGS[kind]).format(row["focus"].split("(")[0].strip()),
                    sentences[0],
                )
            )
        if paragraphs:
            yield from _kept(row["id"], "\n\n".join(paragraphs), pairs, dropped)


def _read_medquad_pages(
    path: Path, random_: random.Random, dropped: Counter[str]
) -> Iterator[Example]:
    """MedQuAD rearranged to pages about several things: a few documents of one source, each with a
    passage and one or two questions.

    A page that lists many terms is what a reference work or an ontology looks like, and no set of
    questions has it.
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
        if page and (size > MAX_CONTEXT_WORDS - 20 or len(page) == 6):
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
    yield from _kept(
        page[0][1][0].question, context, [pair for _, pairs in page for pair in pairs], dropped
    )


def _page_entry(row: dict[str, Any], random_: random.Random) -> tuple[str, list[Pair]] | None:
    """A passage on what the document is about, and questions whose answers are in it."""
    name = row["focus"].split("(")[0].strip()
    sections = {qa["qtype"]: _sentences(_unwrap(qa["answer"])) for qa in row["qa"]}
    definition = sections.get("information") or [""]
    said = re.match(
        rf"(?:{re.escape(name)}(?: \([^)]*\))?|It|This) (?:is|are|refers to|means) (.+)\.$",
        definition[0],
        re.IGNORECASE,
    )
    if said is None or not 6 <= _words(definition[0]) <= MAX_ANSWER_WORDS:
        return None
    text = _take_words(definition, 50)
    if random_.random() < 0.5:
        pairs = [Pair(random_.choice(WORDINGS["information"]).format(name), definition[0])]
    else:
        asked = random_.choice(
            ["What do you call", "What is the name for", "Which term stands for"]
        )
        pairs = [Pair(f"{asked} {said[1]}?", name)]
    others = [
        kind for kind in sections if kind in WORDINGS and kind != "information" and sections[kind]
    ]
    if others:
        kind = random_.choice(others)
        fact = sections[kind][0]
        if 6 <= _words(fact) <= 45:
            text += " " + fact
            pairs.append(Pair(random_.choice(WORDINGS[kind]).format(name), fact))
    return (text if name.lower() in text.lower() else f"{name}: {text}"), pairs


READERS: dict[str, Callable[[Path, random.Random, Counter[str]], Iterator[Example]]] = {
    "adversarial_qa": _read_adversarial_qa,
    "collection": _read_collection,
    "fairytaleqa": _read_fairytaleqa,
    "medquad": _read_medquad,
    "medquad_pages": _read_medquad_pages,
    "squad": _read_squad,
}

# Our own wordings of MedQuAD's question types; {} is what the document is about.
WORDINGS: dict[str, list[str]] = {
    "information": [
        "What is {}?",
        "How is {} described?",
        "What does the term {} refer to?",
        "How would you define {}?",
    ],
    "symptoms": [
        "What are the signs of {}?",
        "How does {} show itself?",
        "Which symptoms do people with {} have?",
    ],
    "treatment": [
        "How is {} treated?",
        "Which treatment is used for {}?",
        "What can be done for a person with {}?",
    ],
    "inheritance": [
        "How is {} inherited?",
        "In which way is {} passed on in families?",
        "Which pattern of inheritance does {} follow?",
    ],
    "frequency": ["How common is {}?", "How often does {} occur?", "How many people have {}?"],
    "genetic changes": [
        "Which gene is involved in {}?",
        "Which genetic changes cause {}?",
        "Mutations in which genes lead to {}?",
    ],
    "causes": ["What causes {}?", "Why does {} develop?", "What leads to {}?"],
    "exams and tests": [
        "How is {} diagnosed?",
        "Which tests detect {}?",
        "How do doctors recognise {}?",
    ],
    "research": ["What is being studied about {}?", "Which research is done on {}?"],
    "outlook": ["What is the outlook for people with {}?", "How does {} usually progress?"],
    "susceptibility": ["Who is at risk of {}?", "Which people are more likely to have {}?"],
    "prevention": ["How can {} be prevented?", "What lowers the risk of {}?"],
    "stages": ["What are the stages of {}?", "How is the extent of {} determined?"],
    "complications": ["Which complications can {} have?", "What problems can follow from {}?"],
}
BOILERPLATE = (
    "Summary :",
    "Human Phenotype Ontology",
    "These resources",
    "resources below",
    "Key Points",
    "table below",
    "Resources for",
    "is available",
    "click here",
    "Click here",
    "www.",
    "http",
)


def _kept(id: str, context: str, pairs: list[Pair], dropped: Counter[str]) -> Iterator[Example]:
    """The example, if it has enough pairs left after those with an empty side, over-long or doubled
    answers and doubled questions.
    """
    short = [pair for pair in pairs if _words(pair.answer) <= MAX_ANSWER_WORDS]
    dropped["long_answer"] += len(pairs) - len(short)
    asked = distinct_pairs(short, dropped)
    kept = list({pair.answer.lower(): pair for pair in reversed(asked)}.values())[
        ::-1
    ]  # whoever asks for it twice learns to repeat
    dropped["doubled_answer"] += len(asked) - len(kept)
    if len(kept) < MIN_PAIRS:
        dropped["context_with_few_pairs"] += 1
    elif _words(context) > MAX_CONTEXT_WORDS:
        dropped["long_context"] += 1
    else:
        yield Example(id, context, kept)


def _grounded(context: str, pairs: list[Pair], dropped: Counter[str]) -> list[Pair]:
    """Pairs whose answer can be read off the context: four fifths of its words stand there."""
    words = set(re.findall(r"\w+", context.lower()))
    grounded = [
        pair for pair in pairs if _share(re.findall(r"\w+", pair.answer.lower()), words) >= 0.8
    ]
    dropped["answer_not_in_context"] += len(pairs) - len(grounded)
    return grounded


def _share(tokens: list[str], words: set[str]) -> float:
    return sum(token in words for token in tokens) / max(1, len(tokens))


def _passages(text: str, answers: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, int]]:
    """Non-overlapping spans of whole sentences around the answers, each of at most
    MAX_CONTEXT_WORDS words.
    """
    starts = [0, *(match.end() for match in re.finditer(r"(?<=[.?!])\s+(?=[A-Z])|\n+", text))]
    spans = list(zip(starts, [*starts[1:], len(text)], strict=True))
    words = [_words(text[start:end]) for start, end in spans]
    done = 0
    for position in sorted(start for start, _ in answers):
        if position < done:
            continue
        last = next(number for number, (start, end) in enumerate(spans) if start <= position < end)
        first, size = last, words[last]
        while (
            first > 0
            and spans[first - 1][0] >= done
            and size + words[first - 1] <= MAX_CONTEXT_WORDS // 3
        ):
            first, size = first - 1, size + words[first - 1]
        while last + 1 < len(spans) and size + words[last + 1] <= MAX_CONTEXT_WORDS:
            last, size = last + 1, size + words[last + 1]
        done = spans[last][1]
        yield spans[first][0], done


def _sentences(text: str) -> list[str]:
    """Sentences without questions (MedQuAD repeats its question in many answers) and without what
    only a web page needs.
    """
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", text)
    return [
        sentence
        for sentence in sentences
        if not sentence.endswith("?") and not any(phrase in sentence for phrase in BOILERPLATE)
    ]


def _take_words(sentences: list[str], limit: int) -> str:
    taken: list[str] = []
    for sentence in sentences:
        if taken and _words(" ".join(taken)) + _words(sentence) > limit:
            break
        taken.append(sentence)
    return " ".join(taken)


def _unwrap(text: str) -> str:
    """Paragraphs without line breaks and runs of spaces inside."""
    return "\n\n".join(
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()
    )


def _sentence(text: str) -> str:
    """One line that begins with a capital letter."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:]


def _words(text: str) -> int:
    return len(text.split())


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in json_lines(CorpusFile(str(path), path.name)))
