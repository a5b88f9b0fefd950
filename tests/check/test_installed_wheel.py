"""The wheel in an empty environment, with the pinned packages and nothing of the checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REQUIREMENTS = ROOT / "requirements" / "cpu.txt"


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder of the environment."""
    folder = tmp_path_factory.mktemp("installed")
    _run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        ROOT,
        cwd=folder,
    )
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = (folder / "venv/bin/python", "-m", "pip", "install", "-qq")
    torch = re.search(r"^torch==.*$", REQUIREMENTS.read_text(), re.MULTILINE)
    _run(*pip, torch[0], cwd=folder)
    _run(*pip, "--no-deps", "-r", REQUIREMENTS, cwd=folder)
    _run(*pip, "--no-deps", next(folder.glob("*.whl")), cwd=folder)
    return folder


def test_the_tiny_job_runs_from_an_empty_folder(installed, tmp_path):
    python = installed / "venv/bin/python"
    _run(python, "-m", "ipt", "reproduce", "experiment=tiny", cwd=tmp_path)
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_no_package_misses_another(installed, tmp_path):
    """Except those that requirements/overrides-cpu.txt leaves out on purpose."""
    python = installed / "venv/bin/python"
    done = subprocess.run(
        [python, "-m", "pip", "check"], cwd=tmp_path, capture_output=True, text=True
    )
    overridden = re.findall(
        r"^([A-Za-z0-9_-]+)", (ROOT / "requirements/overrides-cpu.txt").read_text(), re.MULTILINE
    )
    wrong = [
        line
        for line in done.stdout.splitlines()
        if " requires " in line or " has requirement " in line
    ]
    assert [
        line for line in wrong if not any(name.lower() in line.lower() for name in overridden)
    ] == []
