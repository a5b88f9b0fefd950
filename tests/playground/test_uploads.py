import json

import pytest

from ipt.playground.uploads import check_text, read_texts


def test_files_that_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffGrün.\n".encode())
    (tmp_path / "b.md").write_text("# Head\n\nBody")
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in ("One", " ", "Two"))
    )
    assert read_texts(tmp_path / "a.txt", "text", 100) == ["Grün.\n"]
    assert read_texts(tmp_path / "b.md", "text", 100) == ["# Head\n\nBody"]
    assert read_texts(tmp_path / "c.jsonl", "body", 100) == ["One", "Two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF", "^a.pdf: expected one of .txt, .md, .jsonl"),
        ("a.txt", b"\xff\xfe", "^a.txt: not UTF-8 .byte 0."),
        ("a.md", b" \n", "^a.md is empty"),
        ("a.txt", b"x" * 101, "^a.txt has 101 characters, more than playground.max_characters=100"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "^a.jsonl, line 2"),
        ("a.jsonl", b'{"body": "x"}\n', "^a.jsonl, line 1.*text"),
    ],
)
def test_files_that_are_not(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, "text", 100)


def test_a_text_needs_content():
    check_text("x" * 100, 100)
    with pytest.raises(ValueError, match="the text is empty"):
        check_text(" \n", 100)
