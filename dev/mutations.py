"""Check that the test suite catches faults: apply small mutations to `ipt` one by one, run tests.

    python -m dev.mutations                   # all mutations, each with the tests that should fail
    python -m dev.mutations plan wilson-trials # the mutations of an area, and one by its name
    python -m dev.mutations --full            # with the whole suite instead of the chosen tests
    python -m dev.mutations --list            # where each mutation is; runs no tests

The mutations are listed in dev/mutations.yaml. Each is applied in a temporary copy of the checkout.
It is caught if a test fails with it and passes without it. Exit code 1: a mutation survived;
2: a mutation could not be applied or its tests could not be run.
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
from importlib.util import cache_from_source
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from ipt.console import console, make_console
from ipt.errors import UserError
from ipt.files import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path(__file__).with_suffix(".yaml")
# The profile makes examples reproducible and sets no deadline, which a busy machine would miss.
OPTIONS = "-q -p no:cacheprovider -p no:randomly --hypothesis-profile=ci"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILURES = 0, 1  # exit codes of pytest

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Mutation:
    """Replaces `old`, a part of the function, method or class `symbol`, by `new`.

    `old` matches whatever the line breaks and spaces between its tokens are.
    """

    area: str
    name: str
    symbol: str  # the end of a dotted name: split_long, Plan.sequence, perplexity.metrics
    old: str
    new: str
    tests: str  # arguments of pytest: paths, and -k EXPRESSION


class Place(NamedTuple):
    path: Path  # relative to the root
    line: int  # from 1
    span: tuple[int, int]  # the characters of the file that are replaced


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
    if arguments.list:
        symbols = find_symbols(ROOT)
        outcomes = [_located(mutation, ROOT, symbols) for mutation in arguments.mutations]
    else:
        outcomes = run_mutations(arguments.mutations, ROOT, arguments.full)
    make_console().print(_table(outcomes))
    sys.exit(_exit_code(outcomes))


def run_mutations(mutations: Sequence[Mutation], root: Path, full: bool = False) -> list[Outcome]:
    """Run the tests of each mutation in a copy of the tree at `root`; with `full` the whole suite.

    Tests that failed run again without any mutation, all in one process: they must pass then.
    """
    outcomes: list[Outcome] = []
    symbols = find_symbols(root)
    with _copy(root) as folder:
        for mutation in mutations:
            outcome = _located(mutation, folder, symbols)
            if outcome.place is not None:
                outcome = _run(mutation, outcome.place, folder, full)
            line = f"{mutation.name}: {outcome.state} {outcome.detail}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            outcomes.append(outcome)
        return _checked_without(outcomes, folder)


def read_mutations(path: Path) -> list[Mutation]:
    """The mutations of a YAML file: area -> list of mutations.

    Raises UserError if two have the same name.
    """
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
    """The line that `mutation` changes.

    Raises UserError unless its symbol is in the tree once and its fragment once in the symbol.
    """
    names = [name for name in symbols if f".{name}".endswith(f".{mutation.symbol}")]
    spans = [span for name in names for span in symbols[name]]
    subject = f"mutation {mutation.name}: symbol {mutation.symbol}"
    if not spans:
        raise UserError(f"{subject}: not found in ipt/")
    if len(spans) > 1:
        raise UserError(f"{subject}: found {len(spans)} times, expected once: {', '.join(names)}")
    path, first, last = spans[0]
    source = (root / path).read_text(encoding="utf-8")
    places = []
    for found in _pattern(mutation.old).finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        if first <= line <= last:
            places.append(Place(path, line, found.span()))
    if len(places) != 1:
        count = f"{mutation.old!r} occurs {len(places)} times in {path}:{first}-{last}"
        raise UserError(f"{subject}: {count}, expected once")
    return places[0]


def mutated(source: str, mutation: Mutation, place: Place) -> str:
    """The text of a module with the mutation. Raises UserError if it is no Python."""
    start, end = place.span
    text = source[:start] + mutation.new + source[end:]
    try:
        ast.parse(text)
    except SyntaxError as error:
        where = f"{place.path}:{place.line}"
        raise UserError(f"mutation {mutation.name}: {where} is invalid Python: {error}") from None
    return text


def _pattern(fragment: str) -> re.Pattern[str]:
    """Matches a fragment of Python in any layout: words must stay apart, other tokens need not."""
    tokens = re.findall(r"\w+|[^\w\s]", fragment)
    pattern = re.escape(tokens[0])
    for before, token in pairwise(tokens):
        words = before[-1].isalnum() and token[0].isalnum()
        pattern += (r"\s+" if words else r"\s*") + re.escape(token)
    edge = r"(?<!\w)" if tokens[0][0].isalnum() else ""
    return re.compile(edge + pattern)


def _run(mutation: Mutation, place: Place, folder: Path, full: bool) -> Outcome:
    """Run the tests of a mutation in `folder`, and leave the folder as it was."""
    path, tests = folder / place.path, [] if full else shlex.split(mutation.tests)
    original = path.read_text(encoding="utf-8")
    started = time.monotonic()
    try:
        _write_module(path, mutated(original, mutation, place))
        code, output = _pytest(folder, ["-x", *tests])
    except UserError as error:
        return Outcome(mutation, place, State.ERROR, str(error))
    finally:
        _write_module(path, original)
    seconds = time.monotonic() - started
    failed = FAILED.search(output)
    if code == PASSED:
        return Outcome(mutation, place, State.SURVIVED, mutation.tests, seconds)
    if code != FAILURES or failed is None:
        return Outcome(mutation, place, State.ERROR, _ended(code, output), seconds)
    return Outcome(mutation, place, State.CAUGHT, failed[1], seconds)


def _checked_without(outcomes: Sequence[Outcome], folder: Path) -> list[Outcome]:
    """The outcomes, where a test that fails without a mutation too has caught nothing."""
    tests = {outcome.detail for outcome in outcomes if outcome.state == State.CAUGHT}
    if not tests:
        return list(outcomes)
    code, output = _pytest(folder, sorted(tests))
    broken = {test: f"{test} fails without the mutation too" for test in FAILED.findall(output)}
    if code not in (PASSED, FAILURES):
        broken = dict.fromkeys(tests, f"without the mutation {_ended(code, output)}")
    checked = []
    for outcome in outcomes:
        if outcome.detail in broken:
            outcome = outcome._replace(state=State.ERROR, detail=broken[outcome.detail])
        checked.append(outcome)
    return checked


def _ended(code: int, output: str) -> str:
    return f"pytest ended with code {code}: {output.strip()[-300:]}"


def _write_module(path: Path, text: str) -> None:
    """Also removes the bytecode, which looks current if size and second of both texts are equal."""
    path.write_text(text, encoding="utf-8")
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


def _located(mutation: Mutation, root: Path, symbols: dict[str, list[Span]]) -> Outcome:
    try:
        return Outcome(mutation, locate(mutation, root, symbols), State.FOUND)
    except UserError as error:
        return Outcome(mutation, None, State.ERROR, str(error))


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            yield name, child
        yield from _definitions(child, name)


@contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """A copy of the files that git tracks or does not ignore, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    with tempfile.TemporaryDirectory(prefix="ipt-mutation-") as name:
        folder = Path(name).resolve()
        for file in filter(None, listed.stdout.split("\0")):
            if (root / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / file, folder / file)
        yield folder


def _pytest(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy."""
    command = [sys.executable, "-m", "pytest", *shlex.split(OPTIONS), *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
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
    for header in ("area", "mutation", "where", "change", "result", "first failing test"):
        table.add_column(header, overflow="fold")
    table.add_column("seconds", justify="right")
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
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a mutation or an area; default: all")
    add("--list", action="store_true", help="show where each mutation is, run no tests")
    add("--full", action="store_true", help="run the whole suite for each mutation")
    arguments = parser.parse_args()
    try:
        known = read_mutations(MUTATIONS)
    except ValueError as error:
        parser.error(str(error))
    for name in arguments.names:
        if not any(name in (mutation.area, mutation.name) for mutation in known):
            parser.error(f"{name}: no such mutation or area; --list shows all")
    wanted = set(arguments.names)
    arguments.mutations = [one for one in known if not wanted or wanted & {one.area, one.name}]
    return arguments


if __name__ == "__main__":
    main()
