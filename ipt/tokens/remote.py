"""Token stores behind fsspec URLs. Indices are read at once; files are copied to a local cache on
first use.
"""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ipt.console import console
from ipt.corpus.readers.files import first_line
from ipt.errors import MissingFileError, UserError
from ipt.files import hash_file
from ipt.models import cache_dir
from ipt.tokens.cache import FileCache
from ipt.tokens.folders import check_complete
from ipt.tokens.shards import INDEX_FILE, ShardIndex, parse_index, shard_name

# indices that are asked for at a time: not every server lists what it has, and small ones are
# easily overrun
PROBED = 8
TRIES = 2


class RemoteFolder:
    """A store at `url`. Copies are kept in `tokens` below the cache folder of `ipt.models` and
    verified once.

    The file system is opened again for each access, because network clients do not survive a fork.
    """

    def __init__(self, url: str, cache_gib: float) -> None:
        self.location = url.rstrip("/")
        self._cache = FileCache(cache_dir() / "tokens", cache_gib * 2**30)
        # so that there is always something that can be removed
        self.max_open_bytes = self._cache.limit / 2

    def indices(self) -> list[ShardIndex]:
        indices: list[ShardIndex] = []
        while len(indices) % PROBED == 0 and (found := self._read_indices(len(indices))):
            indices += found
        if not indices:
            raise MissingFileError(
                f"{self.location} is not a token store: it holds no {shard_name(0)}/{INDEX_FILE}"
            )
        check_complete(self.location, indices)
        held = sum(file["bytes"] for index in indices for file in index.files.values())
        if held > self._cache.limit:
            sizes = f"{held / 2**30:.1f} GiB, and tokens.cache_gib={self._cache.limit / 2**30:g}"
            console.print(
                f"[yellow]{self.location} holds {sizes}: read in random order, its shards are "
                "copied again and again"
            )
        return indices

    def open(self, index: ShardIndex, name: str) -> BinaryIO:
        file = index.files[name]
        return self._cache.open(
            file["sha256"], file["bytes"], lambda path: self._fetch(index, name, path)
        )

    def hash(self, index: ShardIndex, name: str) -> str:
        where = f"{self.location}/{index.shard}/{name}"
        with reaching(where), tempfile.TemporaryDirectory() as folder:
            system, path = _find(where)
            if not system.exists(path):
                return ""
            system.get_file(path, f"{folder}/{name}")
            return hash_file(Path(folder, name))

    def _read_indices(self, first: int) -> list[ShardIndex]:
        """The indices of up to PROBED shards from `first`, which end with the first one that is not
        there.
        """
        wheres = [
            f"{self.location}/{shard_name(number)}/{INDEX_FILE}"
            for number in range(first, first + PROBED)
        ]
        with reaching(self.location):
            system, _ = _find(self.location)
            system.invalidate_cache()  # of listings: shards may have been added
            paths = {where: system._strip_protocol(where) for where in wheres}
            contents = system.cat(list(paths.values()), on_error="return")
        found = []
        for number, where in enumerate(wheres, start=first):
            content = contents.get(paths[where], FileNotFoundError())
            if isinstance(content, FileNotFoundError) or (
                number and isinstance(content, PermissionError)
            ):
                # S3 without listing
                break
            with reaching(where):
                if isinstance(content, Exception):
                    raise content
            found.append(parse_index(content, where, shard_name(number)))
        return found

    def _fetch(self, index: ShardIndex, name: str, target: Path) -> None:
        where, expected = f"{self.location}/{index.shard}/{name}", index.files[name]["sha256"]
        for _ in range(TRIES):
            try:
                system, path = _find(where)
                system.get_file(path, str(target))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                problem = f"cannot be read ({type(error).__name__}: {first_line(error)})"
                continue
            if (found := hash_file(target)) == expected:
                return
            problem = f"has SHA-256 {found[:12]}…, but its index says {expected[:12]}…"
        raise UserError(
            f"{where} {problem}, {TRIES} times: the shard is damaged there, copy it anew"
        )


def _find(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    return fsspec.url_to_fs(url)


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turn any exception of a file system client into a one-line error."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{where}: a package is missing ({first_line(error)})") from None
    except Exception as error:
        raise UserError(
            f"{where}: cannot be reached ({type(error).__name__}: {first_line(error)})"
        ) from None
