"""Environments for peers whose packages this project does not have, made once and kept in the
cache.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ipt.files import hash_json
from ipt.models import cache_dir


def environment(requirements: Path) -> Path:
    """The Python of an environment with the packages that a file lists, and with this one's torch,
    so that all compute with the same.

    Raises subprocess.CalledProcessError if pip cannot install them.
    """
    torch = f"torch=={version('torch').split('+')[0]}"
    key = hash_json([torch, requirements.read_text(encoding="utf-8"), sys.version])[:12]
    folder = cache_dir() / "benchmarks" / f"{requirements.stem}-{key}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", torch, "-r", requirements], check=True
        )
        finished.touch()
    return python
