"""`python -m ipt verify RUN`: compares the files of a run and its stages with their manifests."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from ipt.cli import exit_on_user_error
from ipt.console import make_console
from ipt.errors import MissingFileError, UserError
from ipt.files import has_seal, read_json
from ipt.stage import MANIFEST, STATS, changed_outputs

# changed files of a folder that are listed
SHOWN = 10


@dataclass
class Checked:
    """The changed and missing files of a folder with a manifest."""

    folder: Path
    name: str
    files: int = 0
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.changed and not self.missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ipt verify",
        description="Check the outputs of finished runs against their manifests.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a reproduced recipe, of a sweep, or of a stage",
    )
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        checked = [found for folder in options.folders for found in verify(folder)]
    make_console().print(_table(checked))
    sys.exit(0 if all(found.whole for found in checked) else 1)


def verify(folder: Path) -> list[Checked]:
    """Check a folder and the stages that it was made from, each once.

    Every file is read, except in folders whose manifest was changed. Raises MissingFileError if the
    folder has no manifest.
    """
    if not list(_manifests(folder)):
        raise MissingFileError(
            f"{folder} holds no {MANIFEST}: give the folder of a finished run, sweep or stage"
        )
    checked: dict[Path, Checked] = {}
    waiting = list(_manifests(folder))
    while waiting:
        place = waiting.pop().resolve()
        if place in checked:
            continue
        checked[place], manifest = _checked(place)
        waiting += _leads_to(place, manifest)
    return list(checked.values())


def _manifests(folder: Path) -> Iterator[Path]:
    """The folder itself, or else the folders below it that have a manifest. Follows links."""
    if (folder / MANIFEST).exists():
        yield folder
        return
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            yield from _manifests(path)


def _checked(folder: Path) -> tuple[Checked, dict[str, Any]]:
    """The result for a folder, and its manifest; {} if the manifest was changed."""
    name = MANIFEST
    try:
        manifest = read_json(folder / name)
        name = STATS
        stats = read_json(folder / name) if "key" in manifest else {}  # only a stage has them
    except FileNotFoundError:
        return Checked(folder, "", missing=[name]), {}
    except UserError:
        return Checked(folder, "", changed=[name]), {}
    if not has_seal(manifest, stats):
        return Checked(
            folder, "", changed=[f"{MANIFEST} or {STATS}" if "key" in manifest else MANIFEST]
        ), {}
    changed, missing = changed_outputs(folder, manifest["outputs"])
    return Checked(
        folder,
        manifest.get("stage") or manifest.get("name", ""),
        len(manifest["outputs"]),
        changed,
        missing,
    ), manifest


def _leads_to(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """The stages of a run; for a stage, the folders next to it whose digests are its inputs or
    cannot be read.
    """
    for stage in manifest.get("stages", []):
        yield folder / stage["folder"]
    wanted = set(manifest.get("inputs", {}).values())
    for other in folder.parent.glob(f"*/{MANIFEST}") if wanted else ():
        try:
            is_wanted = read_json(other).get("digest") in wanted
        except UserError:
            is_wanted = True
        if is_wanted:
            yield other.parent


def _table(checked: list[Checked]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("run or stage", "folder", "files", "state"):
        table.add_column(name, justify="right" if name == "files" else "left", overflow="fold")
    for found in checked:
        state = (
            "[green]whole[/]"
            if found.whole
            else "[red]" + escape("; ".join(_broken(found))) + "[/]"
        )
        table.add_row(escape(found.name), escape(str(found.folder)), str(found.files), state)
    broken = [found for found in checked if not found.whole]
    remedy = ": delete the others and run again" if broken else ""
    table.caption = f"{len(checked) - len(broken)} of {len(checked)} folders are whole{remedy}"
    table.caption_justify = "left"
    return table


def _broken(found: Checked) -> Iterator[str]:
    for what, names in (("changed", found.changed), ("missing", found.missing)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{what}: {', '.join(names[:SHOWN])}{more}"
