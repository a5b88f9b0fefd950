"""Data for fine-tuning an instruction synthesizer: contexts with all their pairs, in the
synthesizer's own format.

One example is one context with its pairs (paper section 3.1). Several examples of one data set are
concatenated to a few-shot text, and the loss covers only the pairs.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ipt.config import SourceConfig
from ipt.console import progress
from ipt.corpus.readers.files import file_kind
from ipt.errors import MissingFileError, UserError
from ipt.files import write_parts
from ipt.synthesis.formats.tags import context_text, pairs_text
from ipt.synthesis.qa_readers import READERS, Example, read_examples

TUNING_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("examples", pa.list_(pa.struct([("prompt", pa.string()), ("response", pa.string())]))),
        ("fill_to", pa.int32()),
    ]
)

# Lengths of texts (lists of shots) in tokens with BOS and EOS, as in the token store.
Lengths = Callable[[Iterable[list[dict[str, str]]]], list[int]]


def build_tuning_texts(
    config: SourceConfig, name: str, output: Path, seed: int, lengths: Lengths | None = None
) -> dict[str, Any]:
    """Write `texts/part-*.parquet` with `examples` of (context, pairs), and return counts,
    including the dropped items by data set and reason.

    Each text has examples of one data set: 1 to `config.shots` of them, or if `shots` is null as
    many as `config.max_tokens` allows (paper section 3.1). `lengths` returns the tokens of each
    text; `max_tokens` requires it.
    """
    assert config.max_tokens is None or lengths is not None
    counts: dict[str, dict[str, Any]] = {}
    write_parts(output / "texts", _all_texts(config, name, seed, lengths, counts), TUNING_SCHEMA)
    totals: Counter[str] = Counter(texts=0, contexts=0, pairs=0)
    dropped: Counter[str] = Counter()
    for data_set in counts.values():
        totals.update({key: data_set[key] for key in totals})
        dropped += data_set["dropped"]
    return {**totals, "dropped": dict(dropped), "data_sets": counts}


def check_tuning_source(name: str, config: SourceConfig) -> None:
    key = f"mixture.sources.{name}"
    if config.kind not in READERS:
        raise UserError(
            f"{key}.kind={config.kind}: must be texts, instructions, store or one of "
            f"{', '.join(READERS)}"
        )
    if config.shots is None and config.max_tokens is None:
        raise UserError(f"{key}.shots=null: needs {key}.max_tokens, the length to fill")
    for field in ("shots", "max_contexts", "max_tokens"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise UserError(f"{key}.{field}={value}: must be at least 1")
    data_sets(name, config)


def data_sets(name: str, config: SourceConfig) -> dict[str, list[Path]]:
    """The files of each data set of a source. Raises UserError if there are none.

    A file is one data set. A folder has one data set per subfolder, as DATASET/shard/*.jsonl (the
    layout of ft-instruction-synthesizer-collection); `config.include` selects data sets, and an
    empty list selects all.
    """
    key = f"mixture.sources.{name}"
    path = Path(config.path)
    if not config.path or not path.exists():
        raise MissingFileError(
            f"{key}.path={config.path}: no such file or folder: download the data set, or change "
            "the path"
        )
    if not path.is_dir():
        if config.include:
            raise UserError(
                f"{key}.include selects data sets of a folder, but path={config.path} is a file"
            )
        return {name: [path]}
    if config.kind != "collection":
        raise UserError(
            f"{key}.path={config.path} is a folder, but kind={config.kind} reads a file"
        )
    found = {}
    for folder in sorted(path.iterdir()):
        shards = [file for file in folder.glob("shard/*") if file_kind(file.name) == "jsonl"]
        if shards:
            found[folder.name] = sorted(shards)
    missing = [data_set for data_set in config.include if data_set not in found]
    if missing or not found:
        raise MissingFileError(
            f"{key}.path={config.path} does not contain {', '.join(missing) or 'any data set'} "
            f"(DATASET/shard/*.jsonl), only: {', '.join(found) or 'none'}"
        )
    return {data_set: found[data_set] for data_set in config.include or found}


def _all_texts(
    config: SourceConfig,
    name: str,
    seed: int,
    lengths: Lengths | None,
    counts: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The texts of all data sets, one after the other; fills `counts`."""
    sources = data_sets(name, config)
    with progress(f"texts {name}", len(sources)) as bar:
        for data_set, files in sources.items():
            random_ = random.Random(f"{seed}/{data_set}")
            dropped: Counter[str] = Counter()
            examples: list[Example] = []
            for file in files:
                examples += read_examples(config.kind, file, random_, dropped)
            random_.shuffle(examples)
            chosen = _choose(examples, config, lengths, dropped)
            texts = 0
            for group in _groups(chosen, config, random_):
                texts += 1
                yield {
                    "id": f"{data_set}/{group[0].id}",
                    "source": name,
                    "examples": [_shot(example) for example in group],
                    "fill_to": config.max_tokens if config.fill else None,
                }
            counts[data_set] = {
                "texts": texts,
                "contexts": len(chosen),
                "pairs": sum(len(example.pairs) for example, _ in chosen),
                "dropped": dropped,
            }
            bar.advance()


def _choose(
    examples: list[Example], config: SourceConfig, lengths: Lengths | None, dropped: Counter[str]
) -> list[tuple[Example, int]]:
    """The examples that fit, with their tokens. Of these, `max_contexts` with the most pairs are
    chosen (paper section 3.1).
    """
    sizes = [0] * len(examples)
    if lengths is not None and config.max_tokens is not None:
        sizes = lengths([_shot(example)] for example in examples)
    fitting = []
    for example, size in zip(examples, sizes, strict=True):
        if config.max_tokens is None or size <= config.max_tokens:
            fitting.append((example, size))
    by_pairs = sorted(range(len(fitting)), key=lambda number: -len(fitting[number][0].pairs))
    richest = sorted(by_pairs[: config.max_contexts])
    dropped += Counter(
        longer_than_max_tokens=len(examples) - len(fitting),
        beyond_max_contexts=len(fitting) - len(richest),
    )
    return [fitting[number] for number in richest]


def _groups(
    examples: list[tuple[Example, int]], config: SourceConfig, random_: random.Random
) -> Iterator[list[Example]]:
    """Groups of consecutive examples, one per text."""
    group: list[Example] = []
    tokens = shots = 0
    for example, size in examples:
        is_full = config.max_tokens is not None and tokens + size > config.max_tokens
        if group and (len(group) == shots or is_full):
            yield group
            group, tokens = [], 0
        if not group:
            shots = random_.randint(1, config.shots) if config.shots is not None else len(examples)
        group.append(example)
        tokens += size
    if group:
        yield group


def _shot(example: Example) -> dict[str, str]:
    """Prompt and response of an example. Without a context the prompt is only BOS, which the
    tokenizer adds.
    """
    return {
        "prompt": context_text(example.context) if example.context else "",
        "response": pairs_text(example.pairs),
    }
