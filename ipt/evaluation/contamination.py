"""Contamination: which items of a task were in the data that a model was trained on, and what it
scores on the others.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ipt.console import progress
from ipt.corpus.decontaminate import Overlap
from ipt.corpus.questions import GENERALISATION
from ipt.errors import MissingFileError, UserError
from ipt.evaluation.data import Item
from ipt.evaluation.metrics import statistics
from ipt.evaluation.task import CORPUS, Task
from ipt.evaluation.task_types.registry import kind_of
from ipt.files import read_json, write_json
from ipt.models import load_tokenizer
from ipt.parallel import in_order, worker_count
from ipt.tokens.encode import tokenizer_fingerprint
from ipt.tokens.shards import INDEX_FILE
from ipt.tokens.store import TokenStore
from ipt.tokens.tasks import TokenizeTask as Rows
from ipt.tokens.tasks import make_tasks, read_rows

FILE = "contamination.json"
KEY = "evaluation.contamination"
UNIT = 1 << 20  # tokens that are looked through at a time
QUESTIONS = CORPUS + "questions.jsonl"
# What is given of a task for its clean items alone, as far as the task has it.
MAIN = ("paper", "correct", "accuracy", "perplexity", "bits_per_byte")

Contaminated = Mapping[
    str, Sequence[str] | None
]  # task -> ids of the items that were found; None: it was not looked for


class Documents(NamedTuple):
    """Documents `first:end` of a token store."""

    location: str
    first: int
    end: int


class Searched(NamedTuple):
    """What came of one part of the data."""

    found: dict[str, set[int]]  # task -> numbers of its items
    texts: int
    size: int  # bytes


def find_contamination(
    items: Mapping[str, Sequence[Item]],
    path: str,
    model: str,
    output: Path,
    ngram: int = 13,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write `contamination.json`, task -> ids of items that share `ngram` words in a row with the
    data at `path`; return statistics.

    `path` is a token store, made with the tokenizer of `model`, or a folder of *.parquet with
    texts. It is read in parts, by several processes. An item is looked for with its right answer;
    one of less than `ngram` words as a whole, if it has enough of them to tell a copy from chance.
    Raises what `check_data` raises.
    """
    tokenizer = check_data(path, model)
    overlap = Overlap(
        {task: [item.text for item in of_task] for task, of_task in items.items()}, ngram
    )
    parts = _parts(path) if any(items.values()) else []
    found: dict[str, set[int]] = {task: set() for task in items}
    texts = size = 0
    with progress("contamination", len(parts)) as bar:
        for result in in_order(partial(_Search, overlap, tokenizer), parts, worker_count(workers)):
            for task, numbers in result.found.items():
                found[task] |= numbers
            texts, size = texts + result.texts, size + result.size
            bar.advance()
    write_json(
        output / FILE,
        {
            task: [items[task][number].id for number in sorted(numbers)]
            for task, numbers in found.items()
        },
    )
    tasks = {
        task: {
            "items": len(of_task),
            "contaminated": len(found[task]),
            "too_short_to_look_for": overlap.too_short[task],
        }
        for task, of_task in items.items()
    }
    return {"data": path, "texts": texts, "bytes": size, "ngram": ngram, "tasks": tasks}


def load_contaminated(
    folders: Sequence[Path], tasks: Sequence[Task]
) -> dict[str, list[str] | None]:
    """What `find_contamination` has found in the data sets of several folders, together."""
    found = [read_json(folder / FILE) for folder in folders]
    return {
        task.name: sorted({name for ids in found for name in ids[task.name]})
        if is_looked_for(task)
        else None
        for task in tasks
    }


def clean_metrics(
    task: Task, predictions: list[dict[str, Any]], contaminated: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Entries of results.json: `contaminated`, the share of items that were found, and the main
    metrics over the others.

    Where nothing was looked for, because the task asks about the training corpus on purpose, the
    share is null.
    """
    if contaminated is None:
        return {
            "contaminated": {
                "value": None,
                "stderr": None,
                "ci95": [None, None],
                "n": len(predictions),
            }
        }
    found = set(contaminated)
    share = statistics.proportion([row["id"] in found for row in predictions])
    clean = [
        row
        for row in predictions
        if row["id"] not in found and not (task.kind == "perplexity" and not row["tokens"])
    ]
    metrics = kind_of(task).metrics(task, clean) if clean else {}
    return {
        "contaminated": share.as_dict(),
        **{f"{name}_clean": metrics[name].as_dict() for name in MAIN if name in metrics},
    }


def is_looked_for(task: Task) -> bool:
    """Whether it says something that a task's items are in the training data: not of questions that
    ask what it says.
    """
    return task.data != QUESTIONS or task.where.get("split") == GENERALISATION


def check_data(path: str, model: str) -> str | None:
    """The tokenizer of `model` as JSON if `path` is a token store, which it must have made; None
    for a folder of texts.

    Raises MissingFileError or UserError that names the path.
    """
    if not _is_store(path):
        _rows(path)
        return None
    tokenizer = load_tokenizer(model)
    found, wanted = _store(path).fingerprint, tokenizer_fingerprint(tokenizer)
    if found != wanted:
        raise UserError(
            f"{KEY}: {path} was made with tokenizer {found}, but that of model={model} is "
            f"{wanted}: "
            "name the folder of the texts that it was made of"
        )
    return str(tokenizer.backend_tokenizer.to_str())


def data_digest(path: str) -> str:
    """A digest of a token store, or of the metadata of a folder's files (names, sizes, counts,
    value ranges).
    """
    return _store(path).digest if _is_store(path) else _rows(path)[0].texts


# Reading
# ----------------------------------------------------------------------------------------------


class _Search:
    """Looks through one part of the data at a time; one text of it is in memory."""

    def __init__(self, overlap: Overlap, tokenizer: str | None) -> None:
        self._overlap, self._stores = overlap, dict[str, TokenStore]()
        self._decode = _decoder(tokenizer) if tokenizer else None

    def __call__(self, part: Documents | Rows) -> Searched:
        found: dict[str, set[int]] = {}
        texts = size = 0
        for text in (
            self._documents(part)
            if isinstance(part, Documents)
            else map(_row_text, read_rows(part))
        ):
            texts, size = texts + 1, size + len(text.encode())
            for task, numbers in self._overlap.find(text).items():
                found.setdefault(task, set()).update(numbers)
        return Searched(found, texts, size)

    def _documents(self, part: Documents) -> Iterator[str]:
        assert self._decode is not None, "check_data gives a tokenizer for stores"
        if part.location not in self._stores:
            self._stores[part.location] = TokenStore.open(part.location)
        store = self._stores[part.location]
        for number in range(part.first, part.end):
            yield self._decode(store.tokens(number).tolist())


def _parts(path: str) -> Sequence[Documents | Rows]:
    if not _is_store(path):
        return _rows(path)
    store = _store(path)
    step = max(1, UNIT * len(store) // max(1, store.n_tokens))
    return [
        Documents(path, first, min(first + step, len(store)))
        for first in range(0, len(store), step)
    ]


def _is_store(path: str) -> bool:
    return "://" in path or any(Path(path).glob(f"shard-*/{INDEX_FILE}"))


def _store(path: str) -> TokenStore:
    try:
        return TokenStore.open(path)
    except UserError as error:
        raise type(error)(f"{KEY}: {error}") from None


def _rows(path: str) -> list[Rows]:
    if not Path(path).is_dir():
        raise MissingFileError(
            f"{KEY}: {path} is no folder: name a token store, or a folder of *.parquet with texts"
        )
    try:
        return make_tasks(Path(path), UNIT)
    except UserError as error:
        raise type(error)(
            f"{KEY}: {error}: name a token store, or a folder of *.parquet with a column text"
        ) from None


def _row_text(row: Mapping[str, Any]) -> str:
    if row.get("examples") is None:
        return str(row["text"])
    return "\n".join(f"{example['prompt']}\n{example['response']}" for example in row["examples"])


def _decoder(tokenizer: str) -> Callable[[Sequence[int]], str]:
    """Tokens to text without special tokens. Where tokens are bytes, a table of these is ten times
    as fast as the library.
    """
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    made, definition = Tokenizer.from_str(tokenizer), json.loads(tokenizer)
    if (definition["decoder"] or {}).get("type") != "ByteLevel":
        return made.decode
    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    known = {
        token["id"]: b"" if token["special"] else token["content"].encode()
        for token in definition["added_tokens"]
    }
    known |= {
        token: bytes(map(byte_of.__getitem__, piece))
        for piece, token in made.get_vocab(False).items()
        if token not in known
    }
    return lambda tokens: b"".join(map(known.__getitem__, tokens)).decode(errors="replace")
