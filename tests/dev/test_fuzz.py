"""dev.fuzz itself, and a few inputs for each of its targets."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dev.fuzz.targets import TARGETS, Target
from dev.fuzz.worker import Lines, Progress, _try, documented

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_valid_and_broken_inputs(name, tmp_path):
    target = TARGETS[name]
    seeds = target.seeds()
    broken = [
        target.mutate(seeds[number % len(seeds)], random.Random(number), seeds)
        for number in range(5)
    ]
    for data in [*seeds[:2], *broken]:
        try:
            target.check(data, tmp_path)
        except Exception as error:
            assert documented(error), (data[:200], error)


def index(without: str = "", **changed: int) -> bytes:
    """The index of the fuzzed store with a key missing or changed values."""
    values = json.loads(TARGETS["token index"].seeds()[0]) | changed
    return json.dumps({name: value for name, value in values.items() if name != without}).encode()


# Inputs found by the fuzzer: each raised an error other than UserError, or did not end.
FOUND = {
    "judge's reply": [b"[" * 100_000],
    "rules": [sign * 200_000 for sign in (b".", b"!", "…".encode())],
    "answers": [b"a" * 70_000 + b"\n\nx", b"Ada (PER) " * 3 + b" " * 5_000],
    "corpus jsonl": [
        b'{"instruction": 1.5, "input": "", "output": "x", "text": "a"}',
        b'{"text": ' + b"9" * 5_000 + b"}",
    ],
    "corpus template": [b"{{" + b"(" * 5_000, b"{{ " + b"9" * 5_000 + b" }}", b"{{ 1 / 0 }}"],
    "ontology": [
        b"[]",
        b'{"CL:1": {"label": "a", "deprecated": false, "ancestors": {"CL:0": 1}}}',
        b'{"CL:1": {"deprecated": 1.5}}',
    ],
    "tuning data": [b"\xed", b'{"qa": 1}', b'{"data": 1}', b'{"context": 1, "QA_list": [{}]}'],
    "structured outputs": [
        b'{"problem": "2?", "s\\ud800teps": ["add"], "solution": "4", "answer": "4"}'
    ],
    "prompt file": [
        b'user: "{document}"\nschema: {type: object, properties: {a: {}}}\npairs: [{each: [1], '
        b"question: a, answer: b}]",
        b'user: "{document}"\npairs: null',
    ],
    "preview": [
        b'{"text": 1.5, "pairs": [{"question": 2.5, "answer": "x"}]}',
        b"\xff",
        b"[" * 100_000,
    ],
    "token index": [
        b"[]",
        b'{"format": 2}',
        b'{"format": 2, "files": "x"}',
        index("rows"),
        index(n_docs=2**63),
    ],
    "token offsets": [
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (2,), } 0 \n",
        b"\x93NUMPY\x02\x00",
        b"\x93NUMPY\x01\x00\x02\x00(\n",
        b"",
    ],
    "manifest": [b"[]", b"\xfb", b"{}", b'{"key": "key"}', b'{"seal": "\\ud800"}', b"[" * 100_000],
    "checkpoint facts": [
        b"[" * 100_000,
        b"\xff",
        b'{"format": 1}',
        b'{"format": 1, "files": {"a": 1}}',
    ],
}


@pytest.mark.timeout(300)  # generous for a busy machine: a hang took hours
@pytest.mark.parametrize("name", FOUND)
def test_earlier_findings_stay_fixed(name, tmp_path):
    for data in FOUND[name]:
        try:
            TARGETS[name].check(data, tmp_path)
        except Exception as error:
            assert documented(error), (data[:80], error)


def _fail(data: bytes, folder: Path) -> None:
    if data == b"bad":
        raise KeyError("lost")


def test_an_unexpected_error_is_kept_with_its_input(tmp_path):
    progress, target = Progress(), Target("failing", _fail, lambda: [b"good"])
    for data in (b"good", b"bad"):
        _try(target, data, tmp_path, None, progress, tmp_path)
    ((place, (path, error)),) = progress.findings.items()
    assert place.startswith("KeyError in test_fuzz.py:_fail") and "lost" in error
    assert (
        Path(path).read_bytes() == b"bad" and "lost" in Path(path).with_suffix(".txt").read_text()
    )


def test_inputs_that_reach_new_lines_are_detected(tmp_path):
    lines, target = Lines(), TARGETS["judge's reply"]
    assert [
        _try(target, data, tmp_path, lines, Progress(), tmp_path)
        for data in (b"{", b"[", b"{}", b"")
    ] == [True, False, True, False]


def test_the_command_fuzzes_a_target(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dev.fuzz",
        "--minutes",
        "0.02",
        "--only",
        "questions",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "questions" in done.stdout and "0 findings" in done.stdout
