"""Texts to token stores. A store is made once and then shared by all runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ipt.config import TokensConfig, key_settings
from ipt.console import progress
from ipt.errors import UserError
from ipt.files import hash_file
from ipt.parallel import worker_count
from ipt.tokens.encode import Encoding, encoding_of
from ipt.tokens.folders import LocalFolder
from ipt.tokens.shards import (
    FORMAT,
    INDEX_FILE,
    parse_index,
    remove_shard,
    remove_unfinished,
    shard_name,
)
from ipt.tokens.store import TokenStore
from ipt.tokens.tasks import TokenizeTask, make_tasks
from ipt.tokens.workers import TokenizeJob, origin_of, run_jobs


def tokenize_texts(
    config: TokensConfig, texts: Path, model: str, output: Path, name: str = ""
) -> dict[str, Any]:
    """Tokenise the rows of `texts/*.parquet` (`encode.Encoder.encode` says what a row is) into a
    store in `output`.

    The store is the same for any number of `config.workers`. After an interruption, the shards that
    are finished are kept; one of other rows or of another tokenizer is made again. Returns the
    statistics of the store.
    """
    encoding, tasks = _prepare(config, texts, model)
    for shard in output.glob("shard-*"):
        if shard.name not in {shard_name(task.part) for task in tasks}:
            remove_shard(shard)  # of other texts
    return _write(config, tasks, encoding, output, 0, name)


def add_texts(config: TokensConfig, texts: Path, model: str, folder: Path) -> dict[str, Any]:
    """As `tokenize_texts`, but behind what the store in `folder` holds; with the same texts again
    it goes on, or changes nothing.

    Raises UserError if the store was made with another tokenizer or another BOS and EOS rule, or is
    not finished.
    """
    encoding, tasks = _prepare(config, texts, model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        # two at the same time would take the same numbers
        return _write(
            config, tasks, encoding, folder, _first_shard(folder, tasks, encoding), folder.name
        )


def check_tokens(config: TokensConfig) -> None:
    """Raise a one-line error for a value that cannot be."""
    if config.workers is not None and config.workers < 1:
        raise UserError(
            f"tokens.workers={config.workers}: must be at least 1, or null for all cores"
        )
    if config.shard_tokens < 1:
        raise UserError(f"tokens.shard_tokens={config.shard_tokens}: must be at least 1")
    if not config.cache_gib > 0:
        raise UserError(f"tokens.cache_gib={config.cache_gib}: must be above zero")


def store_settings(config: TokensConfig) -> dict[str, Any]:
    """The settings that a store depends on, with the version of its format."""
    return {**key_settings(config), "format": FORMAT}


def _prepare(config: TokensConfig, texts: Path, model: str) -> tuple[Encoding, list[TokenizeTask]]:
    from ipt.models import load_tokenizer

    tasks = make_tasks(texts, config.shard_tokens)
    return encoding_of(load_tokenizer(model), config), tasks


def _write(
    config: TokensConfig,
    tasks: Sequence[TokenizeTask],
    encoding: Encoding,
    output: Path,
    first: int,
    name: str,
) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output)
    jobs = [TokenizeJob(task, output / shard_name(first + task.part)) for task in tasks]
    remaining = [job for job in jobs if not _is_finished(job, encoding)]
    with progress(f"tokens {name}", tasks[-1].end) as bar:
        bar.advance(tasks[-1].end - sum(job.task.end - job.task.first for job in remaining))
        run_jobs(remaining, encoding, worker_count(config.workers), bar.advance)
    store = TokenStore(output)
    return {
        "documents": len(store),
        "tokens": store.n_tokens,
        "tokenizer": store.fingerprint,
        "shards": len(store.indices),
    }


def _is_finished(job: TokenizeJob, encoding: Encoding) -> bool:
    path = job.shard / INDEX_FILE
    try:
        index = parse_index(path.read_bytes(), str(path), job.shard.name)
        hashes = {name: hash_file(job.shard / name) for name in index.files}
    except (OSError, UserError):
        return False
    return index.origin == origin_of(job.task, encoding) and all(
        hashes[name] == file["sha256"] for name, file in index.files.items()
    )


def _first_shard(folder: Path, tasks: Sequence[TokenizeTask], encoding: Encoding) -> int:
    """The number of the shard of the first task: where these texts were begun before, else behind
    the last shard.
    """
    paths = sorted(folder.glob(f"shard-*/{INDEX_FILE}"))
    indices = [parse_index(path.read_bytes(), str(path), path.parent.name) for path in paths]
    for number, index in enumerate(indices):
        for what in ("tokenizer", "bos", "eos"):
            found = getattr(index.origin, what)
            wanted = getattr(origin_of(tasks[0], encoding), what)
            if found != wanted:
                raise UserError(
                    f"{paths[number].parent} was made with {what} {found}, not {wanted}: make "
                    "another store for these texts"
                )
    for index in indices:
        rows = index.origin.rows
        if rows is not None and rows["texts"] == tasks[0].texts:
            if rows["parts"] != len(tasks):
                raise UserError(
                    f"{folder} holds these texts already, cut into {rows['parts']} shards and not "
                    f"{len(tasks)}"
                )
            return int(index.shard.removeprefix("shard-")) - int(rows["part"])
    return len(LocalFolder(folder).indices()) if indices else 0
