"""Corpora behind URLs: an in-memory file system and a real web server."""

import gzip
import json
import random
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import CorpusConfig
from ipt.corpus.build import build_corpus, check_corpus, input_digests
from ipt.corpus.documents import read_documents
from ipt.corpus.readers.find import find_files
from ipt.files import hash_file

QUESTION = {
    "id": "1",
    "task": "recall",
    "split": "recall",
    "prompt": "Q:",
    "options": [" a", " b"],
    "gold": 0,
    "meta": {},
}


class Handler(SimpleHTTPRequestHandler):
    """A plain web server: it lists folders and sends files as a whole only, or parts of them for
    `Parts`.
    """

    def log_message(self, *_):
        pass


class Parts(Handler):
    def do_GET(self):
        wanted, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().do_GET()
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header(
            "Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{path.stat().st_size}"
        )
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(folder: Path, handler: type[Handler]):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    rows = [{"text": f"Document {i}, with “signs” of its own. {'word ' * i}"} for i in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), folder / "deep/c.parquet")
    (folder / "deep/d.txt").write_text("Plain text.")
    (folder / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (folder / "notes.md").write_text("no corpus file")
    return folder


@pytest.fixture(params=["memory", "http", "http with parts"])
def url(request, corpus):
    """The URL of a copy of `corpus`."""
    if request.param == "memory":
        fsspec.filesystem("memory").put(f"{corpus}/", "/far/away/", recursive=True)
        yield "memory://far/away"
        fsspec.filesystem("memory").rm("/far", recursive=True)
        return
    with serving(corpus, Parts if "parts" in request.param else Handler) as address:
        yield address


def files(path) -> CorpusConfig:
    return CorpusConfig(kind="files", path=str(path))


def documents(path) -> list[tuple[str, str, str]]:
    return [
        (document.doc_id, document.source, document.text)
        for document in read_documents(files(path))
    ]


@pytest.mark.parametrize(
    "below", ["", "/a.jsonl", "/*.gz", "/deep", "/deep/c.parquet", "/deep/d.txt", "/deep/*"]
)
def test_the_same_documents_as_from_the_folder_itself(corpus, url, below):
    here = documents(f"{corpus}{below}")
    assert here and documents(f"{url}{below}") == here
    assert documents(f"file://{corpus}{below}") == here


def test_entries_in_a_list(corpus, url):
    both = f"{url}/a.jsonl, {url}/deep/d.txt"
    assert documents(both) == documents(f"{corpus}/a.jsonl,{corpus}/deep/d.txt")
    assert [file.name for file in find_files(both)] == ["a.jsonl", "deep/d.txt"]
    kind = url.partition(":")[0]
    assert [file.name for file in find_files(f"{corpus}/a.jsonl,{url}/a.jsonl")] == [
        "a.jsonl",
        f"{kind}/a.jsonl",
    ]


def test_the_stage_takes_questions_too(url, tmp_path, rows):
    check_corpus(files(url))
    stats = build_corpus(files(url), 1, tmp_path / "out")
    assert stats["questions"] == {"recall": {"recall": 1}}
    assert (
        stats["read"]
        == 601
        == len(rows(tmp_path / "out/documents")) + len(rows(tmp_path / "out/held_out"))
    )


def test_a_digest_tells_that_a_file_has_changed(corpus, url):
    before = input_digests(files(url))
    assert (
        set(before) == {"a.jsonl", "b.jsonl.gz", "deep/c.parquet", "deep/d.txt", "questions.jsonl"}
        and input_digests(files(url)) == before
    )
    assert input_digests(files(corpus)) == {name: hash_file(corpus / name) for name in before}
    if url.startswith("memory"):
        fsspec.filesystem("memory").pipe("/far/away/deep/d.txt", b"Other text.")
    else:
        (corpus / "deep/d.txt").write_text("Some other text.")
    after = input_digests(files(url))
    assert {name for name in before if before[name] != after[name]} == {"deep/d.txt"}


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("/absent.jsonl", "no such file or folder"),
        ("/absent", "no such file or folder"),
        ("/*.zst", "no file matches"),
        ("/notes.md", r"is none of \.parquet|holds none of \.parquet"),
    ],
)
def test_what_is_not_there_is_named(url, below, said):
    with pytest.raises((FileNotFoundError, ValueError), match=said) as caught:
        documents(f"{url}{below}")
    assert f"corpus.path={url}{below}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("abc://bucket/a.jsonl", "Protocol not known: abc"),
        ("oss://bucket/a.jsonl", "package is missing.*ossfs"),
        ("http://127.0.0.1:9/a.jsonl", "no such file or folder|cannot be reached"),
    ],
)
def test_a_file_system_out_of_reach_is_named(path, said):
    with pytest.raises((FileNotFoundError, ValueError), match=said) as caught:
        documents(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_remote_file_is_named(corpus, url):
    if url.startswith("memory"):
        fsspec.filesystem("memory").pipe(
            "/far/away/b.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9999)[:-20]
        )
    else:
        (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 9999)[:-20])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: the file cannot be read to its end"):
        documents(f"{url}/b.jsonl.gz")


class Falling(Parts):
    """A server that has the beginning and the end of a file and fails between them."""

    def do_GET(self):
        size = Path(self.translate_path(self.path)).stat().st_size
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        return self.send_error(503) if 0 < first < size - 1 else super().do_GET()


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder of files larger than the block that a web server is asked for at a time."""
    rows = [{"text": random.Random(i).randbytes(20_000).hex()} for i in range(160)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert all(
        file.stat().st_size > fsspec.filesystem("http").block_size for file in tmp_path.iterdir()
    )
    return tmp_path


@pytest.mark.parametrize("handler", [Handler, Parts])
def test_files_larger_than_a_block(large, handler):
    with serving(large, handler) as address:
        for name in ("a.jsonl", "b.parquet"):
            assert documents(f"{address}/{name}") == documents(large / name)


def test_a_server_that_fails_midway_is_named(large):
    with serving(large, Falling) as address:
        for name, said in (
            ("a.jsonl", "cannot be read to its end"),
            ("b.parquet", "not a readable Parquet file|cannot be read to its end"),
        ):
            with pytest.raises(ValueError, match=rf"{name}.*({said}).*503"):
                documents(f"{address}/{name}")
