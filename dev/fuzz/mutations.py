"""Almost valid inputs: valid ones with changed bytes, lines or structure."""

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

# Inputs that break parsers: format characters, extreme numbers, incomplete characters, markup, path
# traversal and shell injection.
TOKENS = (
    *(
        b'"',
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r\n",
        b"\0",
        b"\t",
        b"\x1b[31m",
        b"---\n",
        b"- ",
        b"&a ",
        b"*a",
        b"!!python/",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"9" * 5000,
        b"0x",
        b"1_0",
        b"18446744073709551616",
        b"true",
        b"null",
        b"1e-9999999",
    ),
    *(
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\xcc\x81" * 50,
        "İſßﬃ".encode(),
        b"\xf0\x9f\x98\x80",
    ),
    *(
        b"<script>alert(1)</script>",
        b"<!--",
        b"]]>",
        b"{{",
        b"}}",
        b"{% for a in b %}",
        b"{document}",
        b"../../",
        b";$(true)",
        b"%s%n",
        b"(",
        b")",
    ),
    *(
        b"<CON>",
        b"</CON>",
        b"<QUE> ",
        b" <ANS> ",
        b" </END>",
        b"\nOptions:\n- ",
        b"\nLet's think step by step.",
        b"\nTherefore, the answer is ",
    ),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"(" * 500,
        b" " * 5000,
        b"a" * 70000,
        b"%",
        b"$1,000.5 million",
        b"\xe2\x88\x92",
        b"(PER)",
        b"-DOCSTART-",
    ),
)
# Long repetitions occur in dotted lines, rulers, tables, listings and degenerate model outputs.
RUNS = tuple(
    sign.encode()
    for sign in (
        *".,;:!?-_=*#|/\\ \t\n0a(){}[]<>\"'`",
        ". ",
        "a ",
        "a. ",
        "1,",
        "\n\n",
        "…",
        "。",
        "é",
        "</END>",
        "{}",
        "[]",
    )
)
RUN_BYTES = 60_000
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**400,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "a" * 70000,
        "é" * 300,
        "../x",
        "<b>",
        "{{ x }}",
        "{x}",
        "\x1b[2J",
        "1",
        "[]",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        ["a", 1, None],
        [{}],
        {"a": {"a": {"a": []}}},
        [[[[[[[["deep"]]]]]]]],
    ),
)
Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutate(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    """`data` with one to six changed spans, or with a changed value if it is JSON, JSON lines or
    YAML.
    """
    if random_.random() < 0.4:
        changed = _structure(data, random_)
        if changed is not None:
            return changed
    for _ in range(random_.choice((1, 1, 2, 3, 6))):
        data = random_.choice(CHANGES)(data, random_, others)
    return data[: 1 << 20]


def compressed(kind: str) -> Mutation:
    """A mutation of the decompressed data, or in 30% of the cases of the compressed bytes."""

    def change(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
        if random_.random() < 0.3:
            return mutate(data, random_, others)
        try:
            inner = (
                gzip.decompress(data)
                if kind == "gz"
                else zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 20)
            )
        except (OSError, EOFError, zlib.error, zstandard.ZstdError):
            return mutate(data, random_, others)
        changed = mutate(inner, random_, [])
        return (
            gzip.compress(changed, 1, mtime=0)
            if kind == "gz"
            else zstandard.ZstdCompressor(1).compress(changed)
        )

    return change


def parquet(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    """Change values or column types of a Parquet file, or in half of the cases its bytes."""
    if random_.random() < 0.5:
        return mutate(data, random_, others)
    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        changed = pa.Table.from_pylist(
            _changed(rows, random_) if random_.random() < 0.8 else rows[:0]
        )
        buffer = io.BytesIO()
        pq.write_table(changed, buffer)
    except Exception:  # these rows cannot be written as Parquet
        return mutate(data, random_, others)
    return buffer.getvalue()


# Bytes
# ----------------------------------------------------------------------------------------------


def _span(data: bytes, random_: random.Random) -> tuple[int, int]:
    start = random_.randint(0, len(data))
    return start, min(len(data), start + random_.choice((1, 2, 4, 16, 64, 1024)))


def _flip(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    if not data:
        return data
    place = random_.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random_.randrange(8))]) + data[place + 1 :]


def _remove(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, random_)
    return data[:start] + data[end:]


def _insert(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    place = random_.randint(0, len(data))
    return data[:place] + random_.choice(TOKENS) + data[place:]


def _replace(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, random_)
    return data[:start] + random_.choice(TOKENS) + data[end:]


def _repeat(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    start, end = _span(data, random_)
    return data[:end] + data[start:end] * random_.choice((1, 2, 50)) + data[end:]


def _run(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    """Insert a long repetition of a few characters. A parser that rescans from each position takes
    quadratic time on it.
    """
    place = random_.randint(0, len(data))
    sign = (
        random_.choice(RUNS)
        if random_.random() < 0.7
        else data[place : place + random_.choice((1, 2, 8))]
    )
    run = sign * (RUN_BYTES // max(1, len(sign)))
    return data[:place] + run + data[place:]


def _truncate(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: random_.randint(0, len(data))]


def _splice(data: bytes, random_: random.Random, others: Sequence[bytes]) -> bytes:
    other = random_.choice(others) if others else data
    return data[: random_.randint(0, len(data))] + other[random_.randint(0, len(other)) :]


CHANGES: tuple[Mutation, ...] = (
    _flip,
    _remove,
    _insert,
    _insert,
    _replace,
    _repeat,
    _run,
    _truncate,
    _splice,
)


# Structure
# ----------------------------------------------------------------------------------------------


def _structure(data: bytes, random_: random.Random) -> bytes | None:
    """Change a value, key or type in JSON, in one of several JSON lines, or in YAML. None if `data`
    is in none of these formats.
    """
    try:
        return _dumped(_changed(json.loads(data), random_))
    except (ValueError, RecursionError):
        pass
    lines = data.split(b"\n")
    number = random_.randrange(len(lines))
    try:
        lines[number] = _dumped(_changed(json.loads(lines[number]), random_))
        return b"\n".join(lines)
    except (ValueError, RecursionError):
        pass
    try:
        value = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return (
            yaml.safe_dump(_changed(value, random_), allow_unicode=True).encode()
            if isinstance(value, dict | list)
            else None
        )
    except Exception:  # YAML loaders and dumpers raise errors of many types
        return None


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def _changed(value: Any, random_: random.Random) -> Any:
    """A copy of `value` with one node changed at a random depth."""
    if isinstance(value, dict) and value and random_.random() < 0.9:
        key = random_.choice(list(value))
        action = random_.random()
        if action < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        if action < 0.15:
            return {
                **value,
                random_.choice(("", "extra", "__class__", "id")): random_.choice(VALUES),
            }
        return {**value, key: _changed(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.9:
        place = random_.randrange(len(value))
        if random_.random() < 0.2:
            return random_.choice((value[:place] + value[place + 1 :], value + value, value[::-1]))
        return [*value[:place], _changed(value[place], random_), *value[place + 1 :]]
    if isinstance(value, str) and random_.random() < 0.5:
        return random_.choice(CHANGES)(value.encode(errors="replace"), random_, []).decode(
            errors="replace"
        )
    return random_.choice(VALUES)
