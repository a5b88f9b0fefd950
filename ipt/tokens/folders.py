"""The shards of a store on this machine, and whether the store is complete."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from ipt.errors import MissingFileError, UserError
from ipt.files import hash_file
from ipt.tokens.shards import INDEX_FILE, ShardIndex, parse_index, shard_name


class ShardFolder(Protocol):
    """Interface of the place of a store's files; see LocalFolder and `remote.RemoteFolder`."""

    location: str
    max_open_bytes: float  # so much of its files may be open at the same time

    def indices(self) -> list[ShardIndex]:
        """The shards in order. Raises in one line if one is missing, is another's or cannot be
        read.
        """

    def open(self, index: ShardIndex, name: str) -> BinaryIO:
        """A file of a shard, whole and of the right size."""

    def hash(self, index: ShardIndex, name: str) -> str:
        """SHA-256 of a file of a shard as it lies there now; "" if it is not there."""


class LocalFolder:
    """A store in a folder on this machine. Opening it reads the indices and checks the size of each
    file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.location, self.max_open_bytes = folder, str(folder), float("inf")

    def indices(self) -> list[ShardIndex]:
        names = [path.parent.name for path in self.folder.glob(f"shard-*/{INDEX_FILE}")]
        names.sort(key=lambda name: (len(name), name))  # shard-100000 is behind shard-99999
        if not names:
            raise MissingFileError(
                f"{self.folder} is not a token store: it holds no {shard_name(0)}/{INDEX_FILE}"
            )
        indices = [self._read(name) for name in names]
        check_complete(self.location, indices)
        for index in indices:
            for name in index.files:
                self._check_size(index, name)
        return indices

    def open(self, index: ShardIndex, name: str) -> BinaryIO:
        return (self.folder / index.shard / name).open("rb")

    def hash(self, index: ShardIndex, name: str) -> str:
        path = self.folder / index.shard / name
        return hash_file(path) if path.exists() else ""

    def _read(self, name: str) -> ShardIndex:
        path = self.folder / name / INDEX_FILE
        return parse_index(path.read_bytes(), str(path), name)

    def _check_size(self, index: ShardIndex, name: str) -> None:
        path, expected = self.folder / index.shard / name, index.files[name]["bytes"]
        if not path.exists():
            raise MissingFileError(f"{path} is missing: the shard is damaged, tokenise it again")
        if (size := path.stat().st_size) != expected:
            raise UserError(
                f"{path} has {size} bytes, not {expected}: the shard is damaged, tokenise it again"
            )


def check_complete(location: str, indices: Sequence[ShardIndex]) -> None:
    """Raises UserError unless no shard is missing and all have one tokenizer and one BOS and EOS
    rule.
    """
    first = indices[0].origin
    for number, index in enumerate(indices):
        where = f"{location}/{index.shard}"
        if index.shard != shard_name(number):
            raise UserError(
                f"{location} holds {index.shard} but no {shard_name(number)}: copy the missing "
                "shard, or tokenise again"
            )
        if index.origin.tokenizer != first.tokenizer:
            found, wanted = index.origin.tokenizer, first.tokenizer
            raise UserError(
                f"{where} was made with another tokenizer ({found}) than the store ({wanted}): "
                "tokenise it again"
            )
        if (index.origin.bos, index.origin.eos) != (first.bos, first.eos):
            found = f"{index.origin.bos} and {index.origin.eos}"
            wanted = f"{first.bos} and {first.eos}"
            raise UserError(
                f"{where} has documents between {found}, those of the store are between {wanted}: "
                "tokenise it again"
            )
    rows = indices[-1].origin.rows
    if rows is not None and rows["part"] < rows["parts"] - 1:
        missing = shard_name(len(indices))
        raise UserError(
            f"{location}: {missing} is missing, the store is not finished: copy the rest, or "
            "tokenise the texts to their end"
        )
