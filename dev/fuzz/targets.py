"""The fuzzing targets: each parser and reader of ipt, with valid inputs to start from.

The check of a target raises the error of the reader, or AssertionError if data are lost.
"""

import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dev.fuzz.mutations import Mutation, compressed, mutate, parquet
from ipt.arguments import plain_arguments
from ipt.config import Config, CorpusConfig, RenderingConfig, SynthesisConfig, conf_dir
from ipt.corpus.documents import read_documents
from ipt.corpus.ontology.terms import parse_ontology
from ipt.corpus.questions import read_questions
from ipt.corpus.readers.files import CorpusFile
from ipt.evaluation.data import read_rows, render_prompt
from ipt.evaluation.formats import read_file
from ipt.evaluation.metrics import answers
from ipt.evaluation.task import SHIPPED as TASKS
from ipt.evaluation.task import Task, load_tasks
from ipt.rendering.instructions import instruction_text
from ipt.rendering.pairs import ChainRow, read_document
from ipt.rendering.pools import FOLDER as POOLS
from ipt.rendering.pools import load_pools
from ipt.rendering.preview import read_rows as read_pair_rows
from ipt.rendering.render import Settings, render_documents
from ipt.stage import load_stage, run_stage
from ipt.synthesis.engines import Generation
from ipt.synthesis.finetuning_data import READERS, read_examples
from ipt.synthesis.formats import chat
from ipt.synthesis.formats.base import Prompt, Vocabulary
from ipt.synthesis.formats.rule_based import mine
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text, parse
from ipt.synthesis.journal import Journal
from ipt.synthesis.quality.judge import read_reply
from ipt.tokens.shards import EncodedDocument
from ipt.tokens.store import TokenStore, write_store

Check = Callable[[bytes, Path], None]
TEXT = (
    "The heart pumps blood. It has four chambers, and valves (bicuspid, for example) keep the "
    "blood from flowing back."
)
PAIRS = [
    Pair("What pumps blood?", "The heart"),
    Pair("Which one?\nOptions:\n- atria\n- ears", "atria"),
    Pair("Why?\nLet's think step by step.", "It has four.\nTherefore, the answer is because."),
]
OUTPUTS = [
    pairs_text(PAIRS),
    pairs_text(PAIRS[:1]) + "\n\n<QUE> How long is a",
    "<QUE> no answer </END>\n\n" + pairs_text(PAIRS),
]


@dataclass(frozen=True)
class Target:
    name: str
    check: Check
    seeds: Callable[[], list[bytes]]
    mutate: Mutation = mutate


def _text(data: bytes) -> str:
    """Text of any bytes. Invalid UTF-8 becomes lone surrogates, which model decoders and JSON can
    contain too.
    """
    return data.decode(errors="surrogateescape")


def _encodes(*texts: str) -> None:
    for text in texts:
        text.encode()


# Outputs of models
# ----------------------------------------------------------------------------------------------


def _pairs(data: bytes, folder: Path) -> None:
    """Accepted pairs survive writing and parsing. Rendering uses or counts each of them."""
    parsed = parse(data.decode(errors="replace"))
    again = parse(pairs_text(parsed.pairs))
    assert again.pairs == parsed.pairs and not again.rejected, (parsed.pairs, again)
    document = read_document(ChainRow("d", TEXT, parsed.pairs))
    assert len(document.items) + len(document.dropped) == len(parsed.pairs)
    texts = render_documents([document], Settings.of(RenderingConfig()), seed=len(data))
    assert all(item.answer in texts[0].text for item in document.items), (
        document.items,
        texts[0].text,
    )


@cache
def _chat_format(name: str) -> chat.ChatFormat:
    from ipt.models import load_tokenizer

    return chat.ChatFormat(
        Vocabulary(load_tokenizer("embedded:tiny")), SynthesisConfig(format="chat", prompt=name)
    )


def _structured(data: bytes, folder: Path) -> None:
    """The demonstration for the next document contains exactly the accepted pairs."""
    output = data.decode(errors="replace")
    prompt_format = _chat_format(("pairs", "math_problem", "dialogue", "table")[len(data) % 4])
    parsed = prompt_format.parse(output)
    _encodes(parsed.rewrite, *(side for pair in parsed.pairs for side in pair))
    shot = prompt_format.finish(Prompt([]), [], output, parsed)
    accepted = prompt_format.parse(shot.messages[-1].content)
    assert (accepted.pairs, accepted.rewrite) == (parsed.pairs, parsed.rewrite), (parsed, accepted)


def _reply(data: bytes, folder: Path) -> None:
    assert read_reply(_text(data))["failure"] in ("", "malformed")


def _answers(data: bytes, folder: Path) -> None:
    """Scores are between 0 and 1, and each text matches itself."""
    output, _, answer = _text(data).partition("\n\n")
    for score in (answers.released_entity_f1, answers.word_f1):
        assert 0 <= score(output, answer) <= 1
    assert answers.released_number_right(output, answer) in (True, False)
    assert (
        answers.number_right(output, output)
        and answers.exact_match(output, output)
        and answers.contains(output, output)
    )
    answers.number_right(output, answer)
    assert answers.entities_right(output, answer) <= len(answers.entities(output))


def _rules(data: bytes, folder: Path) -> None:
    for pair in mine(data.decode(errors="replace"), seed=0):
        assert pair.question.strip() and pair.answer.strip()


# Corpus
# ----------------------------------------------------------------------------------------------


def _corpus(ending: str, data: bytes, folder: Path) -> None:
    path = folder / f"rows{ending}"
    path.write_bytes(data)
    dropped: Counter[str] = Counter()
    for reader in (None, instruction_text):
        try:
            for document in read_documents(
                CorpusConfig(kind="files", path=str(path), held_out_by="chapter"), dropped, reader
            ):
                _encodes(document.text, document.doc_id)
                assert json.loads(document.row()["meta"]) == document.meta
        except ValueError as error:
            if reader is not None or "instruction data" in str(error):
                raise
            first = error
        else:
            first = None
    if first is not None:
        raise first


def _template(data: bytes, folder: Path) -> None:
    (folder / "row.jsonl").write_text(
        json.dumps({"text": TEXT, "n": 3, "list": [1, {"a": None}]}), encoding="utf-8"
    )
    template = _text(data)
    if any(
        sign in template for sign in ("*", "range", "~", "%", "<<", "center", "ljust", "indent")
    ):
        return  # templates are trusted and may take any time
    list(
        read_documents(
            CorpusConfig(kind="files", path=str(folder / "row.jsonl"), template=template or "-")
        )
    )


def _ontology(data: bytes, folder: Path) -> None:
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        return  # a library reads the file of the package
    ontology = parse_ontology("CL", "v1", entries)
    assert len(ontology.terms) + ontology.left_out.total() == len(entries)
    assert sum(map(len, ontology.children.values())) == sum(
        len(term.parents) for term in ontology.terms.values()
    )


def _questions(data: bytes, folder: Path) -> None:
    for question in read_questions(data.split(b"\n"), "questions.jsonl"):
        assert 0 <= question["gold"] < len(question["options"])


# Synthesis, rendering and tokens
# ----------------------------------------------------------------------------------------------


def _tuning(data: bytes, folder: Path) -> None:
    path = folder / "set.jsonl"
    path.write_bytes(data)
    errors = []
    for kind in READERS:
        try:
            for example in read_examples(kind, path, random.Random(0), Counter()):
                assert example.pairs, kind
                _encodes(context_text(example.context), pairs_text(example.pairs))
        except (ValueError, FileNotFoundError) as error:
            errors.append(error)
    if errors:
        raise errors[len(data) % len(errors)]


def _journal(data: bytes, folder: Path) -> None:
    """A damaged journal gives its intact entries, and new entries are found in it afterwards."""
    path = folder / "journal"
    path.write_bytes(data)
    journal = Journal(path)
    prompt, generation = Prompt([1, 2]), Generation([3], "t\u2028\ud800", "stop", 0)
    journal.find(0, 0, prompt)
    journal.add(7, 1, prompt, generation)
    journal.close()
    again = Journal(path)
    assert again.find(7, 1, prompt) == generation
    again.remove()


def _prompt_file(data: bytes, folder: Path) -> None:
    path = folder / "prompt.yaml"
    path.write_bytes(data)
    prompt = chat.load_prompt(str(path))
    assert prompt.user.count(chat.DOCUMENT) == 1


def _pools(data: bytes, folder: Path) -> None:
    path = folder / "pools.yaml"
    path.write_bytes(data)
    assert load_pools(str(path)).pairs


def _preview(data: bytes, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    documents = [read_document(row.content) for row in read_pair_rows(path)]
    render_documents(documents[:5], Settings.of(RenderingConfig()), seed=0)


def _store(name: str, data: bytes, folder: Path) -> None:
    """A damaged store raises an error or gives token ids. `verify` detects every change."""
    store = folder / "store"
    for path, content in _store_files().items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(data if path.endswith(name) else content)
    opened = TokenStore(store)
    for document in range(min(len(opened), 100)):
        assert opened.tokens(document).dtype == np.uint32
        opened.is_target(document)
    opened.positions(np.arange(min(len(opened), 100) + 1))
    opened.verify()


@cache
def _store_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        rows = [
            EncodedDocument(np.arange(5, dtype=np.uint32)),
            EncodedDocument(np.arange(3, dtype=np.uint32), np.array([0, 1, 1], np.uint8)),
        ]
        write_store(Path(name), rows, "f", 4)
        return {
            str(path.relative_to(name)): path.read_bytes()
            for path in Path(name).rglob("*")
            if path.is_file()
        }


# Manifests and checkpoints
# ----------------------------------------------------------------------------------------------


def _manifest(data: bytes, folder: Path) -> None:
    """A folder with a damaged manifest raises an error or is built again. It counts as finished
    only if its key is right.
    """
    import shutil

    stage = folder / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    (stage / "manifest.json").write_bytes(data)
    (stage / "stats.json").write_text("{}", encoding="utf-8")
    found = load_stage(stage, "key")
    assert found is None or isinstance(found.digest, str)
    run_stage("name", stage, lambda _: {}, config={"a": 1}, inputs={})


def _checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint with a damaged checkpoint.json is incomplete. Reading it raises a UserError."""
    from ipt.training.checkpoint.storage import (
        FACTS,
        checkpoint_name,
        read_facts,
        read_whole_tensors,
        whole_checkpoints,
    )

    checkpoint = folder / "checkpoints" / checkpoint_name(1)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / FACTS).write_bytes(data)
    whole_checkpoints(checkpoint.parent)
    read_facts(checkpoint)
    assert callable(read_whole_tensors)


# Evaluation
# ----------------------------------------------------------------------------------------------


def _rows(name: str, data: bytes, folder: Path) -> None:
    path = folder / f"rows{name}"
    path.write_bytes(data)
    for row in read_file(Task("t", "choice", path.name), CorpusFile(str(path), path.name)):
        assert isinstance(row.fields, dict)


def _task_file(data: bytes, folder: Path) -> None:
    path = folder / "task.yaml"
    path.write_bytes(data)
    row = {"id": 1, "prompt": "p", "options": ["a", "b"], "gold": 0, "text": TEXT}
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for task in load_tasks([str(path)]):
        json.dumps(task.definition)


def _prompting(data: bytes, folder: Path) -> None:
    """Rows of a task file are rendered as prompts."""
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    task = Task(
        "t",
        "choice",
        path.name,
        prompt="{{ text }} {{ options[0] }}",
        records="",
        where={"kind": "a"},
        folder=folder,
    )
    for row in read_rows(task, None):
        render_prompt(task, row)


# Config and playground
# ----------------------------------------------------------------------------------------------


def _overrides(data: bytes, folder: Path) -> None:
    """Command lines compose and pass the checks, or raise an error of Hydra, OmegaConf or ipt."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ipt.config import to_config
    from ipt.pipeline.validation import check_reproduce

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = to_config(
                compose("reproduce", plain_arguments(_text(data).split("\n"), Config))
            )
    except (HydraException, OmegaConfBaseException):
        return
    check_reproduce(config)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        assert all(
            name in ("class", "role", "aria-label", "aria-hidden", "tabindex") for name, _ in attrs
        ), attrs


def _views(data: bytes, folder: Path) -> None:
    """Text never becomes an HTML tag on the page."""
    from ipt.chat import Turn
    from ipt.playground.outputs import read_output
    from ipt.playground.views import _said, conversation_view, draws_view, notice
    from ipt.rendering.run import PairsRow

    text = data.decode(errors="replace")
    reading = read_output(text, _Plain(), ended=len(data) % 2 == 0)
    row = PairsRow(0, False, ChainRow("d", text, parse(text).pairs, ""))
    pages = [
        notice(text),
        conversation_view([Turn(text, text)]),
        *map(_said, reading.pieces),
        draws_view([row], RenderingConfig(), 0),
    ]
    for page in pages:
        tags = _Tags()
        tags.feed(str(page))
        assert tags.found <= {
            "p",
            "ol",
            "ul",
            "li",
            "article",
            "h4",
            "span",
            "section",
            "pre",
            "div",
            "small",
        }, tags.found


class _Plain:
    """The parts of the published format that the playground's reader needs."""

    pair_end = "</END>"

    def parse(self, output: str) -> Any:
        return parse(output)


def _dropped_file(data: bytes, folder: Path) -> None:
    from ipt.playground.texts import SUFFIXES, read_texts

    path = folder / f"file{SUFFIXES[len(data) % len(SUFFIXES)]}"
    path.write_bytes(data)
    for text in read_texts(path, "text", 100_000):
        assert text.strip()


# Seeds
# ----------------------------------------------------------------------------------------------


def _lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _json_rows() -> list[bytes]:
    instruction = {"instruction": "Name it.", "input": "", "output": "The heart", "text": TEXT}
    turns = {
        "text": TEXT,
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She"}],
    }
    return [
        _lines({"id": 1, "text": TEXT, "chapter": "a"}, {"id": 2, "text": "é 𝄞", "chapter": None}),
        _lines(instruction, turns),
    ]


def _parquet_rows() -> list[bytes]:
    def written(rows: list[dict[str, Any]]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()

    return [
        written([{"text": TEXT, "chapter": "a"}, {"text": None, "chapter": "b"}]),
        written([json.loads(row) for row in _json_rows()[0].splitlines()]),
    ]


def _tuning_rows() -> list[bytes]:
    squad = {"question": "What pumps?", "answers": [{"text": "heart", "answer_start": 4}]}
    context = f"{TEXT} " * 3
    return [
        _lines({"context": TEXT, "QA_list": [{"Q": "What pumps blood?", "A": "The heart"}]}),
        _lines(
            {
                "id": "s#1",
                "context": context,
                "qa": [
                    {"question": "What pumps?", "answer": "The heart"},
                    {"question": "Has?", "answer": "four chambers"},
                ],
            }
        ),
        _lines(
            {
                "template": "adversarial_qa_x_question_context_answer",
                "prompt": f'Question: "What?"  Context: "{TEXT}"  Answer:',
                "completion": "heart",
            }
        ),
        _lines(
            {
                "id": "m",
                "source": "a",
                "focus": "Heart",
                "qa": [
                    {
                        "qtype": "information",
                        "answer": f"The heart is a pump that has four chambers. {TEXT}",
                    }
                ],
            }
        ),
        json.dumps(
            {"data": [{"title": "T", "paragraphs": [{"context": context, "qas": [squad, squad]}]}]}
        ).encode(),
    ]


def _structured_outputs() -> list[bytes]:
    values = [
        {"pairs": [{"question": "Who {a}?", "answer": "She"}, {"question": "Who?", "answer": ""}]},
        {"problem": "2+2?", "steps": ["add"], "solution": "4", "answer": "4"},
        {
            "turns": [{"question": "Hi", "answer": "Yes"}],
            "title": "T",
            "rows": [["a", "b"]],
            "columns": ["x", "y"],
            "text": TEXT,
        },
    ]
    return [json.dumps(value).encode() for value in values] + [
        json.dumps(values[0]).encode()[:-10],
        b"Sure! " + json.dumps(values[0]).encode(),
    ]


def _ontology_entries() -> list[bytes]:
    terms = {
        f"CL:{number}": {
            "label": f"cell {number}",
            "description": TEXT,
            "synonyms": ["a  b"],
            "deprecated": number == 3,
            "ancestors": {},
        }
        for number in range(4)
    }
    terms["CL:1"]["ancestors"] = {"CL:0": 1}
    terms["CL:2"]["ancestors"] = {"CL:1": 1, "CL:0": 2, "CL:3": 1}
    return [json.dumps(terms).encode()]


def _question_rows() -> list[bytes]:
    return [
        _lines(
            *(
                {
                    "id": str(n),
                    "task": "t",
                    "split": "test",
                    "prompt": "p",
                    "options": ["a", "b"],
                    "gold": n % 2,
                }
                for n in range(3)
            )
        )
    ]


def _journal_rows() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        journal = Journal(Path(name) / "journal")
        for number in range(3):
            journal.add(number, 0, Prompt([1, 2]), Generation([1, 2], "text", "stop", 0))
        journal.close()
        return [(Path(name) / "journal").read_bytes()]


def _manifests() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        run_stage("name", Path(name) / "s", lambda _: {}, config={"a": 1}, inputs={})
        found = json.loads((Path(name) / "s" / "manifest.json").read_text(encoding="utf-8"))
        return [json.dumps(found).encode(), json.dumps({**found, "key": "key"}).encode(), b"{}"]


def _facts() -> list[bytes]:
    return [
        json.dumps(
            {
                "format": 1,
                "run": "r",
                "step": 1,
                "files": {"checkpoint.json": 3, "a": 0},
                "tensors": {"w": [2]},
            }
        ).encode()
    ]


def _table_rows() -> list[bytes]:
    conll = b"-DOCSTART- O\n\nAda B-PER\nruns O\n\nParis S-LOC\n"
    return [
        b'id,prompt,gold\n1,"a, ""b""",0\n2,c,1\n',
        b"id\tprompt\n1\ta\n",
        conll,
        json.dumps([{"id": 1}, {"id": 2}]).encode(),
        b'{"a": {"b": 1}}',
    ]


def _override_lines() -> list[bytes]:
    return [
        b"experiment=tiny\nseed=3",
        b"trainer.max_steps=10\nmodel=embedded:tiny\n+mixture.ratios.raw=0.5",
        b"corpus.path='a b'\ncorpus.languages=[en,de]\n~logger\ntrainer.max_steps=${seed}",
    ]


def _yaml_files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.yaml"))[:12]]


def _bytes(texts: Iterable[str]) -> list[bytes]:
    return [text.encode() for text in texts]


def _gz(seeds: Callable[[], list[bytes]]) -> list[bytes]:
    return [gzip.compress(seed, mtime=0) for seed in seeds()]


def _zst(seeds: Callable[[], list[bytes]]) -> list[bytes]:
    return [zstandard.ZstdCompressor().compress(seed) for seed in seeds()]


def _store_seed(name: str) -> list[bytes]:
    return [content for path, content in _store_files().items() if path == f"shard-00000/{name}"]


ANSWERS = (
    "$1,000.5 million (PER)\n\n12.6 percent",
    "Ada (PER), Paris (LOC)\n\nAda (PER)",
    "-.5e3%\n\n(4.2)",
    "the a an\n\nx",
)
TEMPLATES = (
    "{{ text }}",
    "{% for x in list %}{{ x }}{% endfor %}{{ n + 1 }}",
    "{{ text | upper }}{% if n is none %}{{ list[1].a }}{% endif %}",
)
_ALL = (
    Target("pairs", _pairs, partial(_bytes, OUTPUTS)),
    Target("structured outputs", _structured, _structured_outputs),
    Target(
        "judge's reply",
        _reply,
        partial(
            _bytes,
            ['{"reason": "r", "about_document": true, "answer_is_right": false, "task": "naming"}'],
        ),
    ),
    Target("answers", _answers, partial(_bytes, ANSWERS)),
    Target(
        "rules",
        _rules,
        partial(
            _bytes,
            [
                TEXT,
                "Fever is caused by infection. It is called pyrexia because it burns.\n\n" + TEXT,
            ],
        ),
    ),
    Target("corpus jsonl", partial(_corpus, ".jsonl"), _json_rows),
    Target("corpus gz", partial(_corpus, ".jsonl.gz"), partial(_gz, _json_rows), compressed("gz")),
    Target(
        "corpus zst", partial(_corpus, ".jsonl.zst"), partial(_zst, _json_rows), compressed("zst")
    ),
    Target("corpus parquet", partial(_corpus, ".parquet"), _parquet_rows, parquet),
    Target("corpus txt", partial(_corpus, ".txt"), partial(_bytes, [TEXT, "é"])),
    Target("corpus template", _template, partial(_bytes, TEMPLATES)),
    Target("ontology", _ontology, _ontology_entries),
    Target("questions", _questions, _question_rows),
    Target("tuning data", _tuning, _tuning_rows),
    Target("journal", _journal, _journal_rows),
    Target("prompt file", _prompt_file, partial(_yaml_files, chat.SHIPPED)),
    Target("template pools", _pools, partial(_yaml_files, POOLS)),
    Target(
        "preview",
        _preview,
        lambda: [
            *_tuning_rows()[:1],
            _lines({"text": TEXT, "pairs": [{"question": "Who?", "answer": "She"}], "chain_id": 0}),
        ],
    ),
    Target(
        "token index", partial(_store, "shard-00000/index.json"), partial(_store_seed, "index.json")
    ),
    Target(
        "token offsets",
        partial(_store, "shard-00000/offsets.npy"),
        partial(_store_seed, "offsets.npy"),
    ),
    Target("tokens", partial(_store, "shard-00000/tokens.bin"), partial(_store_seed, "tokens.bin")),
    Target("manifest", _manifest, _manifests),
    Target("checkpoint facts", _checkpoint, _facts),
    *(
        Target(
            f"task {ending[1:]}", partial(_rows, ending), lambda: [*_table_rows(), *_json_rows()]
        )
        for ending in (".csv", ".tsv", ".json", ".jsonl", ".conll")
    ),
    Target(
        "task jsonl.gz", partial(_rows, ".jsonl.gz"), partial(_gz, _json_rows), compressed("gz")
    ),
    Target(
        "task csv.zst", partial(_rows, ".csv.zst"), partial(_zst, _table_rows), compressed("zst")
    ),
    Target("task parquet", partial(_rows, ".parquet"), _parquet_rows, parquet),
    Target("task file", _task_file, partial(_yaml_files, TASKS)),
    Target(
        "task prompt",
        _prompting,
        lambda: [
            _lines({"id": 1, "kind": "a", "text": TEXT, "options": ["a"]}, {"id": 2, "kind": "b"})
        ],
    ),
    Target("overrides", _overrides, _override_lines),
    Target("playground views", _views, partial(_bytes, OUTPUTS)),
    Target("playground file", _dropped_file, lambda: [TEXT.encode(), *_json_rows()]),
)
TARGETS = {target.name: target for target in _ALL}
