"""Reads .jsonl and .json files."""

import json
from collections.abc import Iterator
from typing import Any

from ipt.corpus.readers.files import CorpusFile, first_line
from ipt.errors import UserError


def json_rows(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .json file with their numbers: the entries of a list, a single object, or
    JSON lines.
    """
    with file.open_lines() as data:
        content = data.read()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from json_lines(file)
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        if not isinstance(value, dict):
            raise UserError(
                f"{file.where}, entry {number}: a JSON {type(value).__name__}, expected an object "
                "with named fields"
            )
        yield number, value


def json_lines(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file with their line numbers. Skips empty lines.

    Raises UserError with the line number unless a line is a JSON object in UTF-8.
    """
    with file.open_lines() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line, f"{file.where}, line {number}")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start}): convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        # a number of too many digits is a ValueError of Python's own
        raise UserError(f"{where}: not a line of JSON ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: a JSON {type(values).__name__}, expected an object with named fields"
        )
    return values
