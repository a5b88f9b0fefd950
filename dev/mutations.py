"""Check that the test suite catches faults: apply small mutations to `ipt`, one at a time, and run tests.

    python -m dev.mutations                   # all mutations, each with the tests that should catch it
    python -m dev.mutations plan wilson-term  # the mutations of an area, and one by its name
    python -m dev.mutations --full            # with the whole suite instead of the chosen tests
    python -m dev.mutations --list            # where each mutation is; runs no tests

The mutations are listed in dev/mutations.yaml. Each one is applied in a temporary copy of the checkout.
It is caught if a test fails with it and passes without it. Exit code 1: a mutation survived; 2: a
mutation could not be applied or its tests could not be run.
"""

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from ipt.console import console, make_console
from ipt.errors import UserError
from ipt.stage import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path(__file__).with_suffix(".yaml")
# The profile makes examples reproducible and sets no deadline, which a busy machine would miss.
OPTIONS = "-x -q -p no:cacheprovider -p no:randomly --hypothesis-profile=ci"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILURES = 0, 1  # exit codes of pytest


@dataclass(frozen=True)
class Mutation:
    """Replaces `old`, a part of one line of the function, method or class `symbol`, by `new`."""

    area: str
    name: str
    symbol: str  # the end of a dotted name: split_long, Plan.sequence, evaluation.perplexity.metrics
    old: str
    new: str
    tests: str  # arguments of pytest: paths, and -k EXPRESSION


class Place(NamedTuple):
    path: Path  # relative to the root
    line: int  # from 1


class State(StrEnum):
    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    ERROR = "ERROR"
    FOUND = "found"  # with --list


class Outcome(NamedTuple):
    mutation: Mutation
    place: Place | None
    state: State
    detail: str = ""  # the first test that failed, or what went wrong
    seconds: float = 0.0


class Span(NamedTuple):
    """The lines of a function, method or class."""

    path: Path
    first: int
    last: int


def main() -> None:
    arguments = _parse_arguments()
    outcomes = []
    symbols = find_symbols(ROOT)
    for mutation in arguments.mutations:
        if arguments.list:
            outcome = _located(mutation, symbols)
        else:
            outcome = run_mutation(mutation, ROOT, symbols, arguments.full)
            console.print(f"{mutation.name}: {outcome.state} {outcome.detail}", markup=False)
        outcomes.append(outcome)
    make_console().print(_table(outcomes))
    sys.exit(_exit_code(outcomes))


def read_mutations(path: Path) -> list[Mutation]:
    """The mutations of a YAML file: area -> list of mutations. Raises UserError for a name that comes twice."""
    listed = parse_yaml(path.read_bytes(), path)
    mutations = [Mutation(area, **entry) for area, entries in listed.items() for entry in entries]
    for name, times in Counter(mutation.name for mutation in mutations).items():
        if times > 1:
            raise UserError(f"{path}: {times} mutations have the name {name}: give each its own")
    return mutations


def find_symbols(root: Path) -> dict[str, list[Span]]:
    """Where the functions, methods and classes of `root`/ipt are, by their dotted names."""
    symbols: dict[str, list[Span]] = {}
    for path in sorted((root / "ipt").rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for name, node in _definitions(ast.parse(path.read_text(encoding="utf-8")), module):
            assert node.end_lineno is not None
            symbols.setdefault(name, []).append(Span(relative, node.lineno, node.end_lineno))
    return symbols


def locate(mutation: Mutation, root: Path, symbols: dict[str, list[Span]]) -> Place:
    """The line that `mutation` changes. Raises UserError unless its symbol and its fragment are there exactly once."""
    names = [name for name in symbols if f".{name}".endswith(f".{mutation.symbol}")]
    spans = [span for name in names for span in symbols[name]]
    if len(spans) != 1:
        found = f"{len(spans)} symbols of this name ({', '.join(names)})" if spans else "no such symbol"
        raise UserError(f"mutation {mutation.name}: symbol {mutation.symbol}: {found} in ipt/, expected one")
    path, first, last = spans[0]
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    places = [number for number in range(first, last + 1) for _ in range(lines[number - 1].count(mutation.old))]
    if len(places) != 1:
        where = f"lines {first} to {last} of {path} ({mutation.symbol})"
        raise UserError(f"mutation {mutation.name}: {mutation.old!r} occurs {len(places)} times in {where}, expected once")
    return Place(path, places[0])


def apply(mutation: Mutation, place: Place, root: Path) -> None:
    """Change the line in the tree at `root`. Raises UserError if the result is no Python."""
    path = root / place.path
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[place.line - 1] = lines[place.line - 1].replace(mutation.old, mutation.new)
    mutated = "".join(lines)
    try:
        ast.parse(mutated)
    except SyntaxError as error:
        raise UserError(f"mutation {mutation.name}: {place.path}:{place.line} is no Python with it: {error}") from None
    path.write_text(mutated, encoding="utf-8")


def run_mutation(mutation: Mutation, root: Path, symbols: dict[str, list[Span]], full: bool = False) -> Outcome:
    """Apply a mutation to a copy of the tree at `root` and run its tests there, or with `full` all tests."""
    located = _located(mutation, symbols, root)
    if located.place is None:
        return located
    tests = [] if full else shlex.split(mutation.tests)
    started = time.monotonic()
    with _copy(root) as folder:
        original = (folder / located.place.path).read_bytes()
        try:
            apply(mutation, located.place, folder)
        except UserError as error:
            return located._replace(state=State.ERROR, detail=str(error))
        code, output = _pytest(folder, tests)
        seconds = time.monotonic() - started
        if code == PASSED:
            return located._replace(state=State.SURVIVED, detail=mutation.tests, seconds=seconds)
        failed = FAILED.search(output)
        if code != FAILURES or failed is None:
            detail = f"pytest exited with code {code}: {output.strip()[-300:]}"
            return located._replace(state=State.ERROR, detail=detail, seconds=seconds)
        (folder / located.place.path).write_bytes(original)
        code, _ = _pytest(folder, [failed[1]])
    if code != PASSED:
        detail = f"{failed[1]} fails without the mutation too"
        return located._replace(state=State.ERROR, detail=detail, seconds=seconds)
    return located._replace(state=State.CAUGHT, detail=failed[1], seconds=seconds)


def _located(mutation: Mutation, symbols: dict[str, list[Span]], root: Path = ROOT) -> Outcome:
    try:
        return Outcome(mutation, locate(mutation, root, symbols), State.FOUND)
    except UserError as error:
        return Outcome(mutation, None, State.ERROR, str(error))


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            yield name, child
        yield from _definitions(child, name)


@contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """A copy of the files that git tracks or does not ignore, as they are now."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    with tempfile.TemporaryDirectory(prefix="ipt-mutation-") as name:
        folder = Path(name).resolve()
        for file in filter(None, listed.split("\0")):
            if (root / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / file, folder / file)
        yield folder


def _pytest(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy. Bytecode is not kept: a mutated file may have the size and the second of the original."""
    command = [sys.executable, "-m", "pytest", *shlex.split(OPTIONS), *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return result.returncode, result.stdout


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Mutations", title_justify="left")
    for header in ("area", "mutation", "where", "change", "result", "first failing test", "seconds"):
        table.add_column(header, overflow="fold", justify="right" if header == "seconds" else "left")
    for mutation, place, state, detail, seconds in outcomes:
        where = f"{mutation.symbol} {place.path}:{place.line}" if place else mutation.symbol
        change = f"{mutation.old} → {mutation.new}"
        cells = (mutation.area, mutation.name, where, change, str(state), detail, f"{seconds:.0f}")
        table.add_row(*map(Text, cells))
    counts = Counter(outcome.state for outcome in outcomes)
    table.caption = ", ".join(f"{number} {state.lower()}" for state, number in counts.items())
    return table


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    states = {outcome.state for outcome in outcomes}
    if State.ERROR in states:
        return 2
    return int(State.SURVIVED in states)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m dev.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutation or an area; default: all")
    parser.add_argument("--list", action="store_true", help="show where each mutation is, run no tests")
    parser.add_argument("--full", action="store_true", help="run the whole suite for each mutation")
    arguments = parser.parse_args()
    known = read_mutations(MUTATIONS)
    for name in arguments.names:
        if not any(name in (mutation.area, mutation.name) for mutation in known):
            parser.error(f"{name}: no such mutation or area; --list shows all")
    wanted = set(arguments.names)
    arguments.mutations = [one for one in known if not wanted or wanted & {one.area, one.name}]
    return arguments


if __name__ == "__main__":
    main()
