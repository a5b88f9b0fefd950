"""Contamination: items of tasks that occur in the training data, and scores without them."""

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
UNIT = 1 << 20  # tokens that a worker searches at a time
QUESTIONS = CORPUS + "questions.jsonl"
# metrics with a value for clean items only
MAIN = ("paper", "correct", "accuracy", "perplexity", "bits_per_byte")

# task -> ids of contaminated items; None: not searched
Contaminated = Mapping[str, Sequence[str] | None]


class Documents(NamedTuple):
    """Documents `first:end` of a token store."""

    location: str
    first: int
    end: int


class Searched(NamedTuple):
    """Result of the search in one part of the data."""

    found: dict[str, set[int]]  # task -> indices of its items
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
    """Write `contamination.json`, task -> ids of items that share `ngram` consecutive words with
    the data at `path`; return statistics.

    `path` is a token store with the tokenizer of `model`, or a folder of *.parquet with texts. Its
    parts are searched in several processes. An item is searched with its right answer. An item with
    less than `ngram` words is searched as a whole, unless it is so short that it occurs by chance.
    Raises the errors of `check_data`.
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
            texts += result.texts
            size += result.size
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
    """The union of the results of `find_contamination` in several folders."""
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
    """Entries of results.json: `contaminated`, the proportion of items found in the data, and the
    main metrics of the others. It is null for tasks that are about the training corpus.
    """
    if contaminated is None:
        unknown = {"value": None, "stderr": None, "ci95": [None, None], "n": len(predictions)}
        return {"contaminated": unknown}
    found = set(contaminated)
    share = statistics.proportion([row["id"] in found for row in predictions])
    clean = [row for row in predictions if row["id"] not in found]
    if task.kind == "perplexity":
        clean = [row for row in clean if row["tokens"]]
    metrics = kind_of(task).metrics(task, clean) if clean else {}
    return {
        "contaminated": share.as_dict(),
        **{f"{name}_clean": metrics[name].as_dict() for name in MAIN if name in metrics},
    }


def is_looked_for(task: Task) -> bool:
    """Whether contamination is meaningful: not for questions about the training corpus."""
    return task.data != QUESTIONS or task.where.get("split") == GENERALISATION


def check_data(path: str, model: str) -> str | None:
    """The tokenizer of `model` as JSON if `path` is a token store; None for a folder of texts.

    Raises MissingFileError or UserError, also if the store has another tokenizer.
    """
    if not _is_store(path):
        _rows(path)
        return None
    tokenizer = load_tokenizer(model)
    found, wanted = _store(path).fingerprint, tokenizer_fingerprint(tokenizer)
    if found != wanted:
        raise UserError(
            f"{KEY}: {path} has tokenizer {found}, but model={model} has {wanted}: give the folder "
            "of its texts instead"
        )
    return str(tokenizer.backend_tokenizer.to_str())


def data_digest(path: str) -> str:
    """A digest of a token store, or of the metadata of the files in a folder."""
    return _store(path).digest if _is_store(path) else _rows(path)[0].texts


# Reading
# ----------------------------------------------------------------------------------------------


class _Search:
    """Searches one part of the data at a time, with one text in memory."""

    def __init__(self, overlap: Overlap, tokenizer: str | None) -> None:
        self._overlap, self._stores = overlap, dict[str, TokenStore]()
        self._decode = _decoder(tokenizer) if tokenizer else None

    def __call__(self, part: Documents | Rows) -> Searched:
        found: dict[str, set[int]] = {}
        texts = size = 0
        if isinstance(part, Documents):
            read = self._documents(part)
        else:
            read = map(_row_text, read_rows(part))
        for text in read:
            texts += 1
            size += len(text.encode())
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
            f"{KEY}: {path} is not a folder: give a token store or a folder of *.parquet with texts"
        )
    try:
        return make_tasks(Path(path), UNIT)
    except UserError as error:
        raise type(error)(
            f"{KEY}: {error}: give a token store or a folder of *.parquet with a column text"
        ) from None


def _row_text(row: Mapping[str, Any]) -> str:
    if row.get("examples") is None:
        return str(row["text"])
    return "\n".join(f"{example['prompt']}\n{example['response']}" for example in row["examples"])


def _decoder(tokenizer: str) -> Callable[[Sequence[int]], str]:
    """A function from tokens to text without special tokens. For byte-level tokens a lookup table
    is ten times as fast as the library.
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
