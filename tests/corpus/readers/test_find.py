"""Which files a corpus has: endings, links, and what is passed over."""

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from ipt.config import CorpusConfig
from ipt.corpus.build import build_corpus
from ipt.corpus.documents import read_documents
from ipt.corpus.readers.find import (
    ABOVE,
    BROKEN,
    FOLDERS,
    HIDDEN,
    OWN,
    SPECIAL,
    describe_unread,
    find_files,
)
from ipt.errors import UserError
from ipt.files import read_parts
from ipt.stage import run_stage


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.name.lower().endswith(".gz") else lines)
    return path


def names(path: Path | str, unread: Counter[str] | None = None) -> list[str]:
    return [file.name for file in find_files(str(path), unread)]


def texts(path: Path | str) -> list[str]:
    return [
        document.text for document in read_documents(CorpusConfig(kind="files", path=str(path)))
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "in"


def test_endings_count_in_any_case(folder):
    for number, name in enumerate(["a.jsonl", "B.JSONL", "c.ndjson", "D.NDJSON.GZ", "e.JsonL.gz"]):
        write(folder / name, f"document {number}")
    (folder / "F.TXT").write_text("document 5")
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"document 6"))
    unread: Counter[str] = Counter()
    assert len(names(folder, unread)) == 7 and not unread
    assert sorted(texts(folder)) == [f"document {number}" for number in range(7)]


def test_json_files_are_read_if_they_are_named(folder):
    folder.mkdir()
    (folder / "list.json").write_text('[{"text": "a"}, {"text": "b"}]')
    (folder / "one.JSON").write_text('{"text": "c"}')
    write(folder / "lines.json", "d", "e")
    write(folder / "f.jsonl", "f")
    unread: Counter[str] = Counter()
    assert names(folder, unread) == ["f.jsonl"] and unread == {".json": 3}
    assert texts(f"{folder}/*.json") == ["d", "e", "a", "b"]
    assert texts(folder / "one.JSON") == ["c"]
    (folder / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json, entry 1: a JSON int, expected an object"):
        texts(folder / "list.json")


def test_what_is_left_unread_is_counted(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    write(folder / "a.jsonl", "read")
    for name in (
        "b.csv",
        "c.CSV",
        "d.csv.gz",
        "README",
        ".hidden.jsonl",
        ".git/x.jsonl",
        "e.parquet.gz",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"text": "not read"}')
    (folder / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    stats = build_corpus(
        CorpusConfig(kind="files", path=str(folder), held_out_fraction=0), 0, tmp_path / "out"
    )
    expected = {
        ".csv": 2,
        ".csv.gz": 1,
        "without an ending": 1,
        HIDDEN: 2,
        BROKEN: 1,
        SPECIAL: 1,
        ".parquet.gz": 1,
    }
    assert stats["unread_files"] == expected
    assert "corpus: 1 files read, 9 left unread: 2 hidden, 2 .csv" in caplog.text
    assert describe_unread(Counter({".csv": 2})) == "2 .csv"


def test_nothing_to_read_says_what_there_is(folder):
    folder.mkdir()
    (folder / "a.csv").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds none of \.parquet.*; left unread: 1 \.csv"):
        find_files(str(folder))
    (folder / "sub.jsonl").mkdir()
    unread: Counter[str] = Counter()
    write(folder / "b.jsonl", "b")
    assert names(f"{folder}/*.jsonl", unread) == ["b.jsonl"] and unread == {FOLDERS: 1}


def test_links_are_followed_once_and_not_in_circles(folder, tmp_path):
    write(folder / "sub/a.jsonl", "a")
    write(tmp_path / "elsewhere/b.jsonl", "b")
    write(tmp_path / "elsewhere/deep/c.jsonl", "c")
    write(tmp_path / "outside.jsonl", "not meant")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    links = {
        "other": tmp_path / "elsewhere",
        "again": tmp_path / "elsewhere",
        "a.jsonl": folder / "sub/a.jsonl",
        "circle": folder,
        "up": tmp_path,
        "sub/circle": folder / "sub",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    unread: Counter[str] = Counter()
    assert names(folder, unread) == ["again/b.jsonl", "again/deep/c.jsonl", "sub/a.jsonl"]
    assert unread == {ABOVE: 2}
    assert names(f"{folder}/**/*.jsonl") == ["again/b.jsonl", "again/deep/c.jsonl", "sub/a.jsonl"]
    assert sorted(texts(folder)) == ["a", "b", "c"]


def test_globs_with_two_stars(folder):
    for name in ("a.jsonl", "x/b1.jsonl", "x/y/b2.jsonl", "x/y/c.txt", ".h/d.jsonl"):
        write(folder / name, "a")
    assert names(f"{folder}/**/*.jsonl") == ["a.jsonl", "x/b1.jsonl", "x/y/b2.jsonl"]
    assert names(f"{folder}/x/**/b[12].jsonl") == ["b1.jsonl", "y/b2.jsonl"]
    assert names(f"{folder}/**/b[!1].json?") == ["x/y/b2.jsonl"]
    assert names(f"{folder}/**/y/*") == ["x/y/b2.jsonl", "x/y/c.txt"]


def test_names_of_any_bytes(tmp_path):
    write(tmp_path / "in" / os.fsdecode(b"\xff\xfe.jsonl"), "bytes")
    write(tmp_path / "in" / "ü 心.jsonl", "letters")
    config = CorpusConfig(kind="files", path=str(tmp_path / "in"), held_out_fraction=0)
    build_corpus(config, 0, tmp_path / "out")
    rows = {row["source"]: row["text"] for row in read_parts(tmp_path / "out/documents")}
    assert rows == {"\\xff\\xfe.jsonl": "bytes", "ü 心.jsonl": "letters"}


def stage(folder: Path, corpus: str) -> dict:
    """A corpus stage that keeps its results in `folder`."""
    config = CorpusConfig(kind="files", path=corpus, held_out_fraction=0.5)

    def work(output: Path) -> dict:
        return build_corpus(config, 0, output)

    return run_stage(
        "corpus", folder, work, config={"path": corpus}, inputs={}, seed=len(str(folder))
    ).stats


def test_what_ipt_wrote_is_no_corpus(folder):
    """Held-out documents of an earlier run would become training text."""
    write(folder / "a.jsonl", *(f"document {number}" for number in range(10)))
    write(folder / "manifest.json", "another program's")
    for number in range(3):
        stats = stage(folder / f"outputs/run{number}", str(folder))
        assert stats["read"] == 10
    # of the two before: documents, held-out ones, manifest and statistics
    assert stats["unread_files"][OWN] >= 8
    unfinished = folder / "outputs/unfinished"
    write(unfinished / "export/merges.txt", "a")
    (unfinished / ".started.json").write_text("{}")
    write(folder / "outputs/jobs/0/log.txt", "a")
    (folder / "outputs/jobs/0/job.json").write_text('{"overrides": [], "key": ""}')
    damaged = folder / "outputs/damaged"
    write(damaged / "held_out/a.jsonl", "a")
    (damaged / "manifest.json").write_text("{")
    (damaged / "stats.json").write_text("{}")
    copied = shutil.copytree(folder / "outputs/run0", folder / "outputs/copied")
    for name in ("manifest.json", "stats.json"):
        (copied / name).unlink()
    (folder / "link").symlink_to(folder / "outputs/run0/held_out")
    (folder / "b.jsonl").symlink_to(damaged / "held_out/a.jsonl")
    for path in (folder, f"{folder}/**/*", f"{folder}/*"):
        unread: Counter[str] = Counter()
        read = [name for name in names(path, unread) if not name.endswith(".json")]
        assert read == ["a.jsonl"], path
        assert unread[OWN], path
    with pytest.raises(FileNotFoundError, match=f"no file matches; left unread: .*{OWN}"):
        find_files(f"{folder}/outputs/**/*.parquet")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find_files(f"{folder}/outputs/*/held_out/*.parquet")


def test_parts_of_what_ipt_wrote_can_be_named_but_for_held_out_documents(folder):
    write(folder / "a.jsonl", *(f"document {number}" for number in range(10)))
    stage(folder / "run", str(folder))
    assert names(folder / "run/documents") == ["part-00000.parquet"]
    assert names(f"{folder}/run/documents/*.parquet") == ["part-00000.parquet"]
    for path in (
        "run/held_out",
        "run/held_out/part-00000.parquet",
        "run/held_out/*.parquet",
        "run/held_out/**/*",
    ):
        with pytest.raises(UserError, match="holds held-out documents, which are never trained on"):
            find_files(f"{folder}/{path}")
    with pytest.raises(UserError, match="ipt wrote this folder"):
        find_files(str(folder / "run"))


def test_what_ipt_wrote_behind_a_url_is_no_corpus():
    memory = fsspec.filesystem("memory")
    files = [
        "a.JSONL",
        "run/manifest.json",
        "run/stats.json",
        "run/held_out/b.jsonl",
        "corpus-0123456789ab/held_out/c.jsonl",
        ".h/d.jsonl",
    ]
    for name in files:
        memory.pipe(f"/finding/{name}", b'{"text": "a"}\n')
    try:
        unread: Counter[str] = Counter()
        assert names("memory://finding", unread) == ["a.JSONL"]
        assert unread == {OWN: 4, HIDDEN: 1}
        assert names("memory://finding/**/*.[jJ]*[lL]") == ["a.JSONL"]
    finally:
        memory.rm("/finding", recursive=True)
