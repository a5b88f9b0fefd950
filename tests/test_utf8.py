"""Any text comes through in a locale that is not UTF-8."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def _without_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file as text in the locale's encoding, as far as names tell; ruff
    knows only what is surely a Path.
    """
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if "encoding" in keywords:
        return False
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords
    return (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) == 1)


def test_every_file_is_opened_as_utf8():
    found = []
    for path in [
        *ROOT.glob("ipt/**/*.py"),
        *ROOT.glob("dev/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += [
            f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if _without_encoding(call)
        ]
    assert found == []


def test_a_command_in_the_c_locale(tmp_path):
    """Names, texts and the terminal: nothing raises, and what is written is UTF-8."""
    corpus = tmp_path / "Größe 心" / "ü.jsonl"
    corpus.parent.mkdir()
    text = "Größe und Gewicht des Herzens hängen zusammen; 心臓は血液を送り出す。 "
    corpus.write_text(json.dumps({"text": text * 3}, ensure_ascii=False) + "\n", encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))
    }
    command = [
        sys.executable,
        "-m",
        "ipt",
        "synthesize",
        "experiment=tiny",
        "synthesis=rule_based",
        "corpus.held_out_fraction=0",
    ]
    places = [
        f"corpus.path={corpus.parent}",
        f"output_dir={tmp_path / 'Läufe'}",
        f"stages_dir={tmp_path / 'stages'}",
    ]
    done = subprocess.run(
        [*command, *places],
        capture_output=True,
        env=environment | LOCALE,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Läufe" in done.stderr.decode("utf-8")
    manifest = json.loads((tmp_path / "Läufe" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["stage"] == "synthesis"
    wrong = subprocess.run(
        [*command, f"corpus.path={tmp_path}/fehlt/ä.jsonl"],
        capture_output=True,
        env=environment | LOCALE,
        cwd=tmp_path,
    )
    assert (wrong.returncode, wrong.stderr.decode("utf-8").count("\n")) == (1, 1)
    assert "fehlt/ä.jsonl" in wrong.stderr.decode("utf-8")
