"""Files: atomic writes, hashes, JSON, YAML and Parquet."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.errors import MissingFileError, UserError
from ipt.places import check_pointer

YAML_DEPTH, YAML_VALUES = 100, 1_000_000
NOTE = ".sha256"  # ending of a hidden file beside a finished one of an unfinished stage
ROW_GROUP = 1024  # rows of a Parquet file that are read together


def sealed(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of itself and of the statistics, by which `has_seal` knows them
    again.
    """
    return {**manifest, "seal": _seal(manifest, stats)}


def has_seal(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> bool:
    """Whether both are what was written."""
    content = {name: value for name, value in manifest.items() if name != "seal"}
    return bool(manifest.get("seal") == _seal(content, stats))


def _seal(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """Of the values as they are read back: JSON knows names of one kind only."""
    return hash_json(json.loads(json.dumps([manifest, stats], default=str)))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an
    error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        # What no encoding has, as the bytes of a file name that is not UTF-8, becomes \\udcXX,
        # which JSON reads back.
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` has written of a mapping. Raises MissingFileError, and UserError that names
    the file if it is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} is damaged, it is no JSON object: remove its folder, and it is made anew"
        )
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that ipt has written. Raises UserError that names the
    line if it is damaged.
    """
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, line {number}: not a JSON object: copy the file again, or repeat the run "
                "that wrote it"
            )
        values.append(value)
    return values


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn the errors of reading the Parquet file `path` into UserErrors that name it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason}): copy it again") from None


def parse_yaml(data: bytes, path: Path) -> Any:
    """The plain data in the YAML file at `path`, whose bytes are `data`.

    Raises UserError that names the file if it is no YAML in UTF-8, is nested more than 100 deep
    (which overflows the C parser's stack), grows beyond a million values by its aliases, or asks by
    a tag for anything but plain data.
    """
    import yaml

    loader = _yaml_loader()
    try:
        text, depth = data.decode("utf-8"), 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > YAML_DEPTH:
                raise UserError(f"it is nested more than {YAML_DEPTH} deep")
        value = yaml.load(text, Loader=loader)
        if _values(value, {}) > YAML_VALUES:
            raise UserError(f"its aliases make more than {YAML_VALUES:,} values")
    # YAML's constructors raise whatever a value that does not fit its tag makes them stumble over
    except Exception as error:
        raise UserError(
            f"{path}: not a YAML file in UTF-8 that can be read: {' '.join(str(error).split())}"
        ) from None
    return value


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, in C if possible, which is ten times faster.

    It is a class of its own because a library that vLLM imports makes the shared classes read
    dates as strings.
    """
    import yaml

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    read_date = yaml.constructor.SafeConstructor.construct_yaml_timestamp
    loader.add_constructor("tag:yaml.org,2002:timestamp", read_date)
    return loader


def note_hash(path: Path) -> None:
    """Keep the hash of a finished file of an unfinished stage beside it, for `is_as_noted` after an
    interruption.
    """
    _note(path).write_text(hash_file(path), encoding="utf-8")


def is_as_noted(path: Path) -> bool:
    """Whether a file is what it was at `note_hash`; of one without a note nothing is known. Raises
    FileNotFoundError without the file.
    """
    return (
        hash_file(path) == _note(path).read_text(encoding="utf-8")
        if _note(path).exists()
        else path.stat().st_size > 0
    )


def remove_notes(folder: Path) -> None:
    """To be called when the stage ends: its manifest has all hashes."""
    for note in folder.glob(f".*{NOTE}"):
        note.unlink()


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}{NOTE}")


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as one Parquet file that appears whole or not at all."""
    with atomic(path) as temporary:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), temporary, row_group_size=ROW_GROUP
        )


def write_parts(
    folder: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, rows_per_part: int = 50_000
) -> int:
    """Write `rows` as `folder/part-00000.parquet` and so on, in bounded memory; return how many
    there were.
    """
    part: list[dict[str, Any]] = []
    total = parts = 0
    for row in rows:
        part.append(row)
        if len(part) == rows_per_part:
            write_parquet(folder / f"part-{parts:05d}.parquet", part, schema)
            total, parts, part = total + len(part), parts + 1, []
    if part or not parts:
        write_parquet(folder / f"part-{parts:05d}.parquet", part, schema)
    return total + len(part)


def read_parts(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `folder/part-*.parquet` in order, in bounded memory."""
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise MissingFileError(f"{folder} holds no part-*.parquet")
    for path in paths:
        check_pointer(path)
        # The buffer keeps a whole part out of memory.
        with (
            reading_parquet(path),
            pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file,
        ):
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()


def _values(value: Any, known: dict[int, int]) -> int:
    """How many values there would be without aliases; more than any limit for one that contains
    itself.
    """
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = YAML_VALUES + 1  # while it is being counted
        known[id(value)] = 1 + sum(
            _values(entry, known)
            for entry in (value.values() if isinstance(value, dict) else value)
        )
    return known[id(value)]


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode(
            errors="surrogatepass"
        )
    ).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
