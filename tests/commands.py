"""The commands of the package, in this process or in one of their own, with the same interface."""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from ipt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `python *command` in the folder `cwd`, in a process of its own."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


def run_here(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m ipt name *arguments` in the folder `cwd` in this process, which saves the
    imports.

    The standard output and error are those that Python code writes; an exception that would end a
    process is a traceback.
    """
    output, error = StringIO(), StringIO()
    with (
        _as_a_process(f"ipt {name}", arguments, cwd),
        redirect_stdout(output),
        redirect_stderr(error),
    ):
        code = _exit_code(name)
    return subprocess.CompletedProcess(
        ["ipt", name, *arguments], code, output.getvalue(), error.getvalue()
    )


def _exit_code(name: str) -> int:
    try:
        COMMANDS[name]()
    except SystemExit as ended:
        return ended.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _as_a_process(program: str, arguments: tuple[str, ...], cwd: Path) -> Iterator[None]:
    """Puts back what a command leaves behind: folder, environment, arguments, Hydra's state and its
    logging.
    """
    import logging

    home, state, root = Path.cwd(), Singleton.get_state(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        os.chdir(cwd)
        with patch.dict(os.environ), patch.object(sys, "argv", [program, *arguments]):
            yield
    finally:
        os.chdir(home)
        GlobalHydra.instance().clear()
        Singleton.set_state(state)
        root.handlers[:] = handlers
        root.setLevel(level)
