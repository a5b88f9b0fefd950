"""Measure how readable the package is: `python -m dev.style [FOLDER]`.

For the Python files of ipt/ (or another folder) it prints: modules per folder, lengths of files and
functions, characters per code line, lines over 100 columns, comprehensions and conditional
expressions per 100 code lines, imports inside functions, and config keys. With `--path` it also
prints the modules that run between the command and the first optimizer step of the tiny recipe,
which takes a minute. A code line contains a token other than a comment or a docstring.
"""

import argparse
import ast
import io
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
TRACE = """
import sys
from inspect import CO_OPTIMIZED  # set for functions, but not for class and module bodies
from pathlib import Path

root, seen = Path(sys.argv.pop(1)), []

def note(frame, event, argument):
    if event != "call":
        return
    path = frame.f_code.co_filename
    if path.startswith(str(root)) and path not in seen and frame.f_code.co_flags & CO_OPTIMIZED:
        seen.append(path)
    if frame.f_code.co_name == "optimizer_step" and "lightning" in path:
        sys.setprofile(None)
        stack = []
        while frame is not None:
            path = frame.f_code.co_filename
            if path in seen and path not in stack:
                stack.append(path)
            frame = frame.f_back
        lines = ["run", *seen, "stack", *reversed(stack)]
        print("\\n".join(lines), file=sys.__stdout__, flush=True)
        import os
        os._exit(0)

sys.setprofile(note)
sys.argv[0] = "ipt"
from ipt.__main__ import main
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dev.style", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "ipt")
    parser.add_argument(
        "--path", action="store_true", help="also trace the modules up to the first optimizer step"
    )
    arguments = parser.parse_args()
    for name, value in figures(arguments.folder).items():
        print(f"{name:<50} {value}")
    if arguments.path:
        run, stack = files_to_a_step()
        for title, files in (
            ("functions run before the first step", run),
            ("functions on the stack of the first step", stack),
        ):
            lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
            print(f"{title + ': modules, lines':<58} {len(files)}, {lines}")
        for path in stack:
            print(f"    {path.relative_to(ROOT)}")


def figures(folder: Path) -> dict[str, str]:
    """Each measure and its value."""
    paths = sorted(folder.rglob("*.py"))
    sources = [path.read_text(encoding="utf-8") for path in paths]
    trees = [ast.parse(source) for source in sources]
    code = [
        line
        for source, tree in zip(sources, trees, strict=True)
        for line in code_lines(source, tree)
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [
        node.end_lineno - node.lineno + 1
        for node in nodes
        if isinstance(node, FUNCTIONS) and node.end_lineno
    ]
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    conditions = [node for node in nodes if isinstance(node, ast.IfExp)]
    nested = sum(
        any(isinstance(part, ast.IfExp) for part in (node.body, node.test, node.orelse))
        for node in conditions
    )
    lines = [line for source in sources for line in source.splitlines()]
    counts = {
        parent: sum(path.parent == parent for path in paths)
        for parent in {path.parent for path in paths}
    }
    largest = max(counts, key=lambda parent: counts[parent])
    return {
        "modules, lines, code lines": f"{len(paths)}, {len(lines)}, {len(code)}",
        "characters of code": f"{sum(map(len, code))}",
        "most modules in a folder": f"{counts[largest]} ({largest.relative_to(folder.parent)})",
        "lines per file, p50/p90/max": spread([len(source.splitlines()) for source in sources]),
        "lines per function, p50/p90/max": spread(functions),
        "characters per code line": f"{sum(map(len, code)) / max(1, len(code)):.1f}",
        "lines over 100 columns": (
            f"{sum(len(line) > 100 for line in lines)} ({_percent(lines):.1f}%)"
        ),
        "comprehensions per 100 code lines": f"{100 * comprehensions / max(1, len(code)):.1f}",
        "conditional expressions per 100 code lines": (
            f"{100 * len(conditions) / max(1, len(code)):.1f} ({nested} nested)"
        ),
        "imports inside functions": f"{sum(map(_inner_imports, trees))}",
        "config keys": f"{_config_keys()}",
    }


def code_lines(source: str, tree: ast.Module) -> Iterator[str]:
    """The lines with code, without their indentation and trailing comments."""
    docstrings = {number for node in ast.walk(tree) for number in _docstring(node)}
    found: dict[int, str] = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NO_CODE:
            continue
        for number in range(token.start[0], token.end[0] + 1):
            if number not in docstrings:
                end = token.end[1] if number == token.end[0] else len(lines[number - 1])
                found[number] = lines[number - 1][:end].strip()
    yield from found.values()


def spread(values: list[int]) -> str:
    """Median, 90th percentile and maximum."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.0f}/{tenths[-1]:.0f}/{max(values)}"


def files_to_a_step() -> tuple[list[Path], list[Path]]:
    """Modules whose functions run between the command and the first optimizer step, and modules on
    the call stack of that step. The stages before the training are cached.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", "experiment=tiny", "synthesis=rule_based", "tasks=[]"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-m", "ipt", *train],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
        )
        traced = [sys.executable, "-c", TRACE, str(ROOT / "ipt"), *train, "trainer.max_steps=7"]
        done = subprocess.run(
            traced, cwd=folder, env=environment, check=True, capture_output=True, encoding="utf-8"
        )
    lines = done.stdout.splitlines()
    run, stack = lines[lines.index("run") : lines.index("stack")], lines[lines.index("stack") :]
    return [Path(line) for line in run[1:]], [Path(line) for line in stack[1:]]


def _percent(lines: list[str]) -> float:
    return 100 * sum(len(line) > 100 for line in lines) / max(1, len(lines))


def _docstring(node: ast.AST) -> range:
    if (
        not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        or ast.get_docstring(node) is None
    ):
        return range(0)
    first = node.body[0]
    return range(first.lineno, (first.end_lineno or first.lineno) + 1)


def _inner_imports(tree: ast.Module) -> int:
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    inner = {
        id(node)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return len(inner)


def _config_keys() -> int:
    from ipt.config import Config

    def count(schema: Any) -> int:
        types = [field.type for field in fields(schema)]
        return sum(
            count(kind) if isinstance(kind, type) and is_dataclass(kind) else 1 for kind in types
        )

    return count(Config)


if __name__ == "__main__":
    main()
