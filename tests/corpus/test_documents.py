import gzip
import json
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import CorpusConfig
from ipt.corpus.documents import EMPTY, NO_TEXT, read_documents
from ipt.corpus.readers.find import find_files
from tests.examples import examples

ROWS = [
    {"text": f"Document number {i}.\nSecond line — with a dash.", "name": f"doc-{i}"}
    for i in range(5)
]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        half = data.index(b"\n") + 1  # two frames, as files that were written in pieces have them
        path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    else:
        path.write_bytes(data)
    return path


def files(path: Path | str, **settings) -> CorpusConfig:
    return CorpusConfig(kind="files", path=str(path), **settings)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    documents = list(read_documents(files(path, id_field="name")))
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.doc_id for document in documents] == [row["name"] for row in ROWS]
    assert [(document.source, document.meta["row"]) for document in documents] == [
        (name, row) for row in range(1, 6)
    ]


def test_a_text_file_is_one_document_and_needs_no_id(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne\n\ntwo", encoding="utf-8")
    [document] = read_documents(files(tmp_path / "a.txt", id_field="name"))
    assert document.text == "One\n\ntwo"


def test_folder_glob_and_list(tmp_path):
    write(tmp_path / "in/b.jsonl", ROWS[:1])
    write(tmp_path / "in/deep/a.parquet", ROWS[1:2])
    write(tmp_path / "in/questions.jsonl", [{"no": "document"}])
    write(tmp_path / "in/.hidden/c.jsonl", ROWS[2:3])
    write(tmp_path / "other/b.jsonl", ROWS[3:4])
    (tmp_path / "in/notes.md").write_text("not a corpus file")
    assert [file.name for file in find_files(str(tmp_path / "in"))] == ["b.jsonl", "deep/a.parquet"]
    assert [file.name for file in find_files(str(tmp_path / "in/*.jsonl"))] == ["b.jsonl"]
    assert [file.name for file in find_files(str(tmp_path / "**/*.jsonl"))] == [
        "in/b.jsonl",
        "other/b.jsonl",
    ]
    several = f"{tmp_path / 'in'}, {tmp_path / 'other/b.jsonl'},{tmp_path / 'in/b.jsonl'}"
    assert [file.name for file in find_files(several)] == [
        "in/b.jsonl",
        "in/deep/a.parquet",
        "other/b.jsonl",
    ]
    ids = [document.doc_id for document in read_documents(files(several))]
    assert len(set(ids)) == 3  # the first rows of two files of the same name


def test_a_name_with_a_comma_or_brackets_is_one_file(tmp_path):
    path = write(tmp_path / "a, b [1].jsonl", ROWS)
    assert [file.path for file in find_files(str(path))] == [str(path)]


def test_ids_stay_when_the_corpus_moves(tmp_path):
    write(tmp_path / "here/deep/a.jsonl", ROWS)
    shutil.copytree(tmp_path / "here", tmp_path / "far/away")
    here, away = (
        [document.doc_id for document in read_documents(files(tmp_path / folder))]
        for folder in ("here", "far/away")
    )
    assert here == away and len(set(here)) == 5


def test_links_are_read_under_their_own_names(tmp_path):
    write(tmp_path / "blobs/0123.parquet", ROWS)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.parquet").symlink_to(tmp_path / "blobs/0123.parquet")
    assert [document.source for document in read_documents(files(tmp_path / "snapshot"))] == [
        "a.parquet"
    ] * 5


def test_empty_texts_are_dropped_and_counted(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"text": "one"}, {"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": "two"}],
    )
    dropped: Counter[str] = Counter()
    assert [document.meta["row"] for document in read_documents(files(path), dropped)] == [1, 5]
    assert dropped == {EMPTY: 2, NO_TEXT: 1}


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n{"text": "two"}\n\n')
    assert [document.meta["row"] for document in read_documents(files(tmp_path / "a.jsonl"))] == [
        2,
        4,
    ]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
)
def test_every_kind_of_string_column(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["one", "two"]).cast(kind)}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(files(tmp_path / "a.parquet"))] == [
        "one",
        "two",
    ]


@examples(30)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=1,
        max_size=20,
    )
)
def test_any_text_comes_through(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        path = write(folder / name, [{"text": text} for text in texts])
        assert [document.text for document in read_documents(files(path))] == texts


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"body": "two"}\n',
            ["line 2", "'text'", "'body'", "corpus.text_field"],
        ),
        ("a.jsonl", b'{"text": "one"}\n{"text": 7}\n', ["line 2", "int", "expected a string"]),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', ["line 3", "not a line of JSON"]),
        ("a.jsonl", b'["text"]\n', ["line 1", "list"]),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', ["line 1", "UTF-8"]),
        ("a.jsonl", b'{"text": "\\ud800 half"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b"", ["corpus is empty"]),
        ("a.jsonl", b'{"text": " "}\n', ["corpus is empty", "1 empty"]),
        ("a.txt", b"caf\xe9", ["UTF-8"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one"}\n' * 10_000)[:-20],
            ["cannot be read to its end"],
        ),
        ("a.jsonl.gz", b"not gzip", ["cannot be read to its end"]),
        ("a.jsonl.zst", b"not zstandard", ["cannot be read to its end"]),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "one"}\n')
            + zstandard.compress(b'{"text": "two"}\n')[:-5],
            ["cannot be read to its end"],
        ),
        (
            "a.jsonl.zst",
            zstandard.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(50_000)))[:-9],
            ["cannot be read to its end"],
        ),
        ("a.parquet", b"not parquet", ["not a readable Parquet file"]),
        ("a.csv", b"text\none\n", ["none of .parquet"]),
    ],
)
def test_a_bad_file_ends_in_one_line_that_names_it(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_documents(files(tmp_path / name)))
    message = str(caught.value)
    assert all(part in message for part in [name, *parts]) and "\n" not in message


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            [{"text": "a", "name": "x"}, {"text": "b", "name": "x"}],
            ["row 2", "'x'", "occurred before"],
        ),
        ([{"text": "a", "name": None}], ["row 1", "None", "expected an id"]),
        ([{"text": "a", "name": 1.5}], ["row 1", "1.5", "expected an id"]),
        ([{"body": "a", "name": "x"}], ["no column 'text'", "'body'", "corpus.text_field"]),
        ([{"text": "a"}], ["no column 'name'", "corpus.id_field"]),
        ([{"text": 7, "name": "x"}], ["row 1", "int", "expected a string"]),
    ],
)
def test_a_bad_row_ends_in_one_line_that_names_it(tmp_path, rows, parts):
    path = write(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError) as caught:
        list(read_documents(files(path, id_field="name")))
    assert all(part in str(caught.value) for part in ["a.parquet", *parts]) and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent.jsonl", "no such file"),
        ("*.jsonl", "no file matches"),
        ("", "is not set"),
        (".", "none of"),
    ],
)
def test_a_missing_file_is_named(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        list(read_documents(files(path)))


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(documents: int) -> int:
        path = write(
            tmp_path / f"{documents}.parquet", [{"text": f"{i} " * 100} for i in range(documents)]
        )
        tracemalloc.start()
        assert sum(1 for _ in read_documents(files(path))) == documents
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = peak(1_000), peak(10_000)
    assert large < 1.3 * small
    assert large < 10_000 * 400  # far less than the texts themselves


def test_a_hub_dataset_is_streamed(tmp_path):
    write(
        tmp_path / "data.jsonl",
        [{"body": "one", "name": "x"}, {"body": "", "name": "y"}, {"body": "two", "name": "z"}],
    )
    config = CorpusConfig(kind="hub", dataset=str(tmp_path), text_field="body", id_field="name")
    dropped: Counter[str] = Counter()
    assert [(document.doc_id, document.text) for document in read_documents(config, dropped)] == [
        ("x", "one"),
        ("z", "two"),
    ]
    assert dropped == {EMPTY: 1}
    with pytest.raises(ValueError, match=r"split test cannot be read.*train"):
        list(
            read_documents(
                CorpusConfig(kind="hub", dataset=str(tmp_path), split="test", text_field="body")
            )
        )
    with pytest.raises(ValueError, match=r"row 1: no field 'text', only 'body', 'name'"):
        list(read_documents(CorpusConfig(kind="hub", dataset=str(tmp_path))))


@pytest.mark.shared
def test_real_corpora_are_read(shared_data):
    documents = list(read_documents(files(shared_data / "lmops_samples")))
    assert documents and all(document.text.strip() for document in documents)
