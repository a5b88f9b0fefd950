"""Checks of the files in a model folder, without torch and without reading weights.

They find Git LFS pointers, damaged JSON, and missing or truncated weight files.
"""

import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipt.errors import UserError
from ipt.places import check_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TEXT_FILES = ("merges.txt", "vocab.txt", "chat_template.jinja")
BINARY_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself accepts no longer header


class Stored(NamedTuple):
    """A tensor in a weight file, as the header of a safetensors file describes it."""

    shape: tuple[int, ...]
    file: Path
    dtype: str  # as safetensors names it: BF16, I8, ...


def check_files(folder: Path) -> None:
    """Check config and tokenizer files of a model folder. Raises UserError that names the file."""
    for name in JSON_FILES:
        if _is_there(folder / name):
            status = (folder / name).stat()
            _check_object(folder / name, status.st_size, status.st_mtime_ns)
    for name in TEXT_FILES:
        if _is_there(folder / name):
            _read_text(folder / name)
    if not (folder / "tokenizer.json").exists():
        for name in BINARY_FILES:
            if _is_there(folder / name):
                check_pointer(folder / name)


def weight_files(folder: Path) -> list[Path]:
    """The existing weight files of a model, chosen in transformers' order of preference.

    Raises UserError if the folder has no weights, if its index names a missing file, or if the
    folder also contains an adapter, since transformers would load the adapter's base model instead.
    """
    has_weights = any((folder / name).exists() for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX))
    if has_weights and (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"model={folder}: the folder contains weights and {ADAPTER_CONFIG}, so transformers "
            "would load another model with the adapter: move the adapter to a folder of its own"
        )
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if _is_there(folder / single):
            check_pointer(folder / single)
            return [folder / single]
        if _is_there(folder / index):
            return _indexed_files(folder / index)
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(adapter_instead_of_model(folder))
    raise UserError(
        f"model={folder}: the folder has no weights ({SINGLE} or {INDEX}): copy them to it, or use "
        "another folder"
    )


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Name of each tensor in safetensors files -> its shape and file."""
    stored: dict[str, Stored] = {}
    for file in files:
        stored |= read_header(file)
    return stored


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises UserError if it is damaged or truncated."""
    check_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise UserError(f"{file} is not a safetensors file or is truncated: copy it again")
        header = opened.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        found = {
            name: Stored(tuple(entry["shape"]), file, str(entry["dtype"]))
            for name, entry in tensors.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is not a safetensors file: its header is damaged") from None
    if 8 + length + end != size:
        raise UserError(
            f"{file} is truncated or was changed: it has {size} bytes, but its header describes "
            f"{8 + length + end}: copy it again"
        )
    return found


def check_pickled(file: Path) -> None:
    """Check that a .bin file (a zip archive, or a pickle of older versions) is complete."""
    check_pointer(file)
    with file.open("rb") as opened:
        is_zip = opened.read(2) == b"PK"
    if not file.stat().st_size or (is_zip and not zipfile.is_zipfile(file)):
        raise UserError(f"{file} is empty or truncated: copy it again")


def check_adapter_files(folder: Path) -> None:
    """Check the files of a LoRA adapter saved by PEFT. Raises UserError that names the file."""
    read_object(folder / ADAPTER_CONFIG)
    read_header(folder / ADAPTER_WEIGHTS)


def adapter_instead_of_model(folder: Path) -> str:
    """The error message for a folder with a LoRA adapter where a complete model is required."""
    base = None
    if _is_there(folder / ADAPTER_CONFIG):
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return (
        f"model={folder}: the folder contains a LoRA adapter of {base or 'another model'}, not a "
        "complete model: use a folder with merged weights (ipt writes them to export/, next to "
        "adapter/), or for synthesis set synthesis.adapter"
    )


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it is a pointer or damaged."""
    text = _read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged, it is not JSON ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged, it is not a JSON object: copy it again")
    return value


@lru_cache(maxsize=256)  # a tokenizer has megabytes, and a command checks its model many times
def _check_object(file: Path, size: int, time: int) -> None:
    read_object(file)


def _read_text(file: Path) -> str:
    check_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is damaged, it is not UTF-8 text: copy it again") from None


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is damaged, it has no weight_map: copy it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    if not files:
        raise UserError(f"{index} names no file: copy it again")
    for file in files:
        if not _is_there(file):
            raise UserError(f"{file} is missing, but {index.name} names it: copy it to the folder")
        check_pointer(file)
    return files


def _is_there(file: Path) -> bool:
    """Whether a file exists. Raises UserError for a broken link."""
    if file.exists():
        return True
    if file.is_symlink():
        raise UserError(f"{file} is a link to {file.readlink()}, which does not exist")
    return False
