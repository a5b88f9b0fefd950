"""Finds the files of `corpus.path`: a file, a folder, a glob or a URL, or several of them."""

import glob
import os
import posixpath
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ipt.corpus.readers.files import (
    KINDS,
    QUESTIONS,
    READABLE,
    CorpusFile,
    file_kind,
    reaching,
    without_query,
)
from ipt.errors import MissingFileError, UserError
from ipt.files import read_json
from ipt.stage import MANIFEST, STARTED, STATS

JOB = "job.json"  # of the folder of a sweep's job
OWN = "in folders that ipt wrote"
HIDDEN = "hidden"
BROKEN = "broken links"
ABOVE = "links to a folder above"
FOLDERS, SPECIAL = "folders that a glob matches", "no regular files"
HELD_OUT, DOCUMENTS = "held_out", "documents"  # the folders of a corpus stage
MARKS = {MANIFEST, STARTED, JOB}  # by which folders that ipt wrote are known
WILDCARD = re.compile(r"(\*+|\?|\[!?\]?[^\]]*\])")  # of a glob
STAGE_NAME = re.compile(r"[a-z]+-[0-9a-f]{12}")  # a stage's folder, by which remote ones are known


def find_files(
    path: str, unread: Counter[str] | None = None, key: str = "corpus.path"
) -> list[CorpusFile]:
    """The files of `corpus.path`: a file, a folder or a glob, local or an fsspec URL, or several
    separated by commas.

    A folder stands for all files of known kinds below it, regardless of the case of their endings.
    Links are followed; a file is read once even if several links lead to it. Skipped and counted in
    `unread`, by ending or reason: other kinds of files, hidden files, questions.jsonl, broken
    links, and folders that ipt wrote, which contain held-out documents.

    Names are relative to the folder; for several entries, to the common parent of their folders;
    for several kinds of file systems, remote names begin with the kind. Bytes of a name that are
    not UTF-8 are written as `\\xff`. `key` is the config key of `path`, for messages.

    Raises MissingFileError for an entry that does not exist or contains nothing to read; UserError
    for a file of another kind, an unreachable file system, and held-out documents of an earlier
    run.
    """
    whole = "://" not in path and os.path.lexists(path)
    entries = [path] if whole else [entry.strip() for entry in path.split(",") if entry.strip()]
    if not entries:
        raise MissingFileError(f"{key} is empty: name a file, a folder or a glob")
    unread = Counter() if unread is None else unread
    kinds: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        found = _entry(entry, key)
        kinds[found.kind].append(found)
        unread.update(+found.unread)  # without zeros
    files: dict[str, CorpusFile] = {}
    for file in _named(kinds):
        known = files.setdefault(file.name, file)
        if known.path != file.path and not _is_same(known, file):
            raise UserError(f"{key}: two files have the name {file.name}: rename one of them")
    return [file for _, file in sorted(files.items())]


def describe_unread(unread: Counter[str]) -> str:
    """The counts of skipped files, the largest first: `3 .csv, 1 hidden`."""
    return ", ".join(f"{count} {reason}" for reason, count in unread.most_common())


# One entry
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """The files of one entry of `corpus.path`."""

    kind: str  # protocol of a remote one, else empty
    # the folder that names are relative to: of a glob, what stands before its first pattern
    root: str
    files: list[str]
    system: Any = None
    unread: Counter[str] = field(default_factory=Counter)


def _named(kinds: dict[str, list[_Entry]]) -> Iterator[CorpusFile]:
    for kind, members in kinds.items():
        base = posixpath.commonpath([member.root for member in members]) or "."
        prefix = f"{kind}/" if kind and len(kinds) > 1 else ""
        for member in members:
            for file in member.files:
                name = posixpath.relpath(without_query(file, kind), base)
                yield CorpusFile(
                    file,
                    prefix + os.fsencode(name).decode(errors="backslashreplace"),
                    member.system,
                )


def _is_same(one: CorpusFile, other: CorpusFile) -> bool:
    return (
        one.system is not None
        or other.system is not None
        or Path(one.path).resolve() == Path(other.path).resolve()
    )


def _entry(entry: str, key: str) -> _Entry:
    kind, separator, path = entry.partition("://")
    if separator and kind not in ("file", "local"):
        found = _remote_entry(entry, kind, key)
    else:
        found = _local_entry(entry, Path(path if separator else entry), key)
    if not found.files:
        matches = (
            "no file matches" if glob.has_magic(entry) else f"the folder holds none of {READABLE}"
        )
        others = f"; left unread: {describe_unread(found.unread)}" if found.unread else ""
        raise MissingFileError(f"{key}={entry}: {matches}{others}")
    unknown = [file for file in found.files if file_kind(without_query(file, kind)) is None]
    if unknown:
        raise UserError(f"{key}={entry}: {posixpath.basename(unknown[0])} is none of {READABLE}")
    return found


# On this machine
# ----------------------------------------------------------------------------------------------


def _local_entry(entry: str, path: Path, key: str) -> _Entry:
    unread: Counter[str] = Counter()
    if path.is_dir():
        _check_own(entry, path, key)
        files = [str(file) for file in _below(path, unread, key)]
        return _Entry("", str(path.absolute()), _documents(files, unread), unread=unread)
    if path.exists():
        _check_own(entry, path, key)
        return _Entry("", str(path.parent.absolute()), [str(path)])
    if not glob.has_magic(str(path)):
        if path.is_symlink():
            raise MissingFileError(f"{key}={entry}: a broken link")
        raise MissingFileError(f"{key}={entry}: no such file or folder")
    root = Path(_before_pattern(str(path)))
    _check_own(entry, root, key, inside_only=True)
    matches = [
        str(match) for match in _glob(path, root, unread, key) if match.name.lower() != QUESTIONS
    ]
    return _Entry("", str(root.absolute()), matches, unread=unread)


def _glob(path: Path, root: Path, unread: Counter[str], key: str) -> Iterator[Path]:
    """The files that match. `**` uses `_below`, because Python's own follows links in circles."""
    if "**" in path.parts:
        try:
            pattern = _pattern(str(path))
        except re.error as error:
            raise UserError(
                f"{key}={path}: not a glob ({error}): correct what is in brackets"
            ) from None
        yield from (
            file
            for file in _below(root, unread, key, matching=pattern)
            if pattern.fullmatch(str(file))
        )
        return
    outside = root.resolve()
    known = {outside, *outside.parents}
    for match in map(Path, sorted(glob.glob(str(path)))):  # noqa: PTH207 - Path.glob takes no absolute pattern
        if match.is_dir():
            unread[FOLDERS] += 1
        elif not match.is_file():
            unread[BROKEN if match.is_symlink() else SPECIAL] += 1
        elif _is_inside_own(match.resolve(), known):
            unread[OWN] += 1
        else:
            yield match


def _pattern(path: str) -> re.Pattern[str]:
    """A glob with `**` as a regular expression for whole paths."""
    parts = path.split("/")
    last = parts.pop()
    expression = ""
    for part in parts:
        expression += "(?:[^/]+/)*" if part == "**" else f"{_one_part(part)}/"
    return re.compile(expression + _one_part("*" if last == "**" else last))


def _one_part(part: str) -> str:
    """A regular expression for a name between slashes. As in a shell, a pattern matches a hidden
    name only if it begins with a dot.
    """
    expression = "" if part.startswith(".") or not glob.has_magic(part) else r"(?!\.)"
    for piece in WILDCARD.split(part):
        if piece.startswith("*"):
            expression += "[^/]*"
        elif piece == "?":
            expression += "[^/]"
        elif WILDCARD.fullmatch(piece):
            inside = piece[1:-1].replace("\\", r"\\")
            expression += f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
        else:
            expression += re.escape(piece)
    return expression


def _below(
    root: Path, unread: Counter[str], key: str, matching: re.Pattern[str] | None = None
) -> list[Path]:
    """The files below a folder, each once, preferably by its own name instead of a link's. Links
    are followed last.

    With `matching`, files that do not match are not counted in `unread`.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    real_root = root.resolve()
    known = {real_root, *real_root.parents}
    waiting = deque([root])
    while waiting:
        start = waiting.popleft()
        if _is_inside_own(start.resolve(), known):
            unread[OWN] += _count_files(start)
            continue
        for place, folders, files in os.walk(start, onerror=partial(_cannot_read, key)):
            here, real = Path(place), Path(place).resolve()
            has_marks = not MARKS.isdisjoint(files) or HELD_OUT in folders
            is_own = real not in known and has_marks and _is_own(real)
            if is_own or real in seen:
                unread[OWN] += _count_files(here) if is_own else 0
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(_visible(folders, unread))
            waiting.extend(_links(here, folders, known, unread))
            for name in sorted(_visible(files, unread)):
                file = here / name
                if matching is None or matching.fullmatch(str(file)):
                    _add(file, real / name, found, known, unread)
    return sorted(found.values())


def _cannot_read(key: str, error: OSError) -> None:
    raise UserError(
        f"{key}: {error.filename} cannot be read ({error.strerror}): make it readable or leave it "
        "out"
    ) from None


def _visible(names: Iterable[str], unread: Counter[str]) -> Iterator[str]:
    for name in names:
        if not name.startswith("."):
            yield name
        elif not name.endswith(".lock"):  # ipt writes one next to each of its folders
            unread[HIDDEN] += 1


def _links(
    here: Path, folders: list[str], known: set[Path], unread: Counter[str]
) -> Iterator[Path]:
    """The links among the folders, except those to the root or above it."""
    for name in folders:
        folder = here / name
        if not folder.is_symlink():
            continue
        if folder.resolve() in known:
            unread[ABOVE] += 1
        else:
            yield folder


def _add(
    file: Path, place: Path, found: dict[Path, Path], known: set[Path], unread: Counter[str]
) -> None:
    """Register a file by its real path."""
    is_link = file.is_symlink()
    if not file.is_file():
        unread[BROKEN if is_link else SPECIAL] += 1
        return
    real = file.resolve() if is_link else place
    if is_link and _is_inside_own(real, known):
        unread[OWN] += 1
    elif real not in found or (found[real].is_symlink() and not is_link):
        found[real] = file


def _count_files(folder: Path) -> int:
    """Number of files without hidden ones; an unfinished stage has only those."""
    return sum(not name.startswith(".") for _, _, files in os.walk(folder) for name in files)


def _check_own(entry: str, path: Path, key: str, inside_only: bool = False) -> None:
    """Raises UserError for a complete folder that ipt wrote, and for the held-out documents in one.

    Other parts of such a folder can be named: documents/ of a finished corpus.
    """
    real = path.resolve()
    own = next((place for place in (real, *real.parents) if _is_own(place)), None)
    if own is None:
        return
    inside = real.relative_to(own).parts
    if inside and inside[0] == HELD_OUT:
        message = "holds held-out documents, which are never trained on: name other documents"
        raise UserError(f"{key}={entry}: {message}")
    if not inside and not inside_only:
        message = (
            "ipt wrote this folder, and it may hold held-out documents: name a part of it, as its "
            "documents/"
        )
        raise UserError(f"{key}={entry}: {message}")


def _is_inside_own(place: Path, known: set[Path]) -> bool:
    """Whether ipt wrote this folder or one above it, apart from those in `known`."""
    return any(_is_own(folder) for folder in (place, *place.parents) if folder not in known)


def _is_own(folder: Path) -> bool:
    """Whether ipt wrote the folder: a stage (finished or not), a run of a recipe, a job of a sweep,
    or a corpus without its manifest.
    """
    if (folder / STARTED).exists() or all(
        (folder / name).is_dir() for name in (DOCUMENTS, HELD_OUT)
    ):
        return True
    marks = {MANIFEST: ("seal", "outputs"), JOB: ("overrides", "key")}
    for name, keys in marks.items():
        if not (folder / name).is_file():
            continue
        try:
            content = read_json(folder / name)
        except ValueError:
            return (folder / STATS).exists()  # damaged
        if all(key in content for key in keys):
            return True
    return False


# Behind URLs
# ----------------------------------------------------------------------------------------------


def _remote_entry(entry: str, kind: str, key: str) -> _Entry:
    """As `_local_entry`. A URL without the ending of a known kind is a folder, since web servers do
    not distinguish the two.
    """
    import fsspec

    unread: Counter[str] = Counter()
    with reaching(f"{key}={entry}"):
        system, path = fsspec.url_to_fs(entry)
        system.invalidate_cache()  # of listings: a file may have changed since the last look
        if glob.has_magic(without_query(path, kind)):
            found = system.glob(path, detail=True).items()
            files = [
                name
                for name, facts in found
                if facts["type"] == "file" and posixpath.basename(name).lower() != QUESTIONS
            ]
            root = _before_pattern(path)
            if "/." not in path:
                files = _not_hidden(files, root, unread)
            listing = system.find(root) if "**" in path else files
            return _Entry(kind, root, _not_own(files, root, unread, listing), system, unread)
        is_file = file_kind(without_query(path, kind)) is not None or (
            system.isfile(path) and not system.isdir(path)
        )
        if not is_file and system.exists(path):
            listing = system.find(path)
            files = _not_own(_not_hidden(listing, path, unread), path, unread, listing)
            return _Entry(kind, path, _documents(files, unread), system, unread)
        system.info(path)  # raises if it is not there
        return _Entry(kind, posixpath.dirname(path), [path], system)


def _not_hidden(files: list[str], root: str, unread: Counter[str]) -> list[str]:
    visible = []
    for file in files:
        parts = posixpath.relpath(file, root).split("/")
        if not any(part.startswith(".") for part in parts):
            visible.append(file)
        elif parts[-1] != STARTED:
            unread[HIDDEN] += 1
    return visible


def _not_own(files: list[str], root: str, unread: Counter[str], listing: list[str]) -> list[str]:
    """Drops files that ipt wrote, recognized by names: a manifest next to statistics in `listing`,
    or the name of a stage folder.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for file in listing:
        names[posixpath.dirname(file)].add(posixpath.basename(file))
    own = {folder for folder, held in names.items() if STARTED in held or {MANIFEST, STATS} <= held}
    kept = []
    for file in files:
        inside = posixpath.relpath(posixpath.dirname(file), root).split("/")
        folders = [posixpath.join(root, *inside[: number + 1]) for number in range(len(inside))]
        if own.intersection((root, *folders)) or any(STAGE_NAME.fullmatch(part) for part in inside):
            unread[OWN] += 1
        else:
            kept.append(file)
    return kept


def _documents(below: list[str], unread: Counter[str]) -> list[str]:
    """The files of a folder that contain documents: known kinds, except questions and .json, which
    is mostly settings.
    """
    documents = []
    for file in below:
        name = posixpath.basename(file).lower()
        if name != QUESTIONS and file_kind(name) in KINDS[:-1]:
            documents.append(file)
        else:
            unread[_ending(name)] += 1
    return documents


def _ending(name: str) -> str:
    """The ending by which a file is counted: `.csv`, `.csv.gz`, or a special complete name."""
    if name == QUESTIONS:
        return QUESTIONS
    stem, ending = posixpath.splitext(name)
    if ending in (".gz", ".zst"):
        ending = posixpath.splitext(stem)[1] + ending
    return os.fsencode(ending).decode(errors="backslashreplace") or "without an ending"


def _before_pattern(path: str) -> str:
    """The folder before the first pattern of a glob."""
    parts = list(takewhile(lambda part: not glob.has_magic(part), path.split("/")[:-1]))
    return "/".join(parts) or ("/" if path.startswith("/") else "")
