"""Each message that docs/troubleshooting.md quotes as ours is one that the code can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIES = "…"
CODE = re.compile(r"``(.+?)``|`(.+?)`")


def texts(source: str) -> Iterator[str]:
    """The strings of a module, adjacent ones joined, with what an f-string fills in as VARIES."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else VARIES
                for part in node.values
            )


def quoted() -> list[str]:
    """The messages in the tables, but for those of other programs."""
    ours = (
        (ROOT / "docs" / "troubleshooting.md")
        .read_text()
        .partition("## Messages of other programs")[0]
    )
    cells = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    return [double or single for cell in cells for double, single in CODE.findall(cell)]


def test_texts_joins_strings_and_marks_what_varies():
    source = 'raise ValueError(f"{key}={value}: must be"\n  f" at least {least}" " or null")'
    assert "…=…: must be at least … or null" in list(texts(source))


def test_the_quoted_messages_are_in_the_code():
    known = [
        text for path in sorted((ROOT / "ipt").rglob("*.py")) for text in texts(path.read_text())
    ] + [(ROOT / "Makefile").read_text()]
    messages = quoted()
    assert len(messages) >= 30
    assert [message for message in messages if not any(message in text for text in known)] == []
