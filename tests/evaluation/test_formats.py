"""Rows of every kind of file, and of data sets as the hub has them."""

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from ipt.evaluation.data import read_rows
from ipt.evaluation.formats import _entities
from ipt.evaluation.task import Task, task_digests

ROWS = [{"id": "a", "text": "one\ttwo", "n": "1"}, {"id": "b", "text": 'the "third", é', "n": "2"}]


def task(folder, data, **keys):
    return Task("mine", "choice", data, folder=folder, **keys)


def fields(task):
    return [row.fields for row in read_rows(task, None)]


def csv_text(separator):
    quoted = [
        [f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS
    ]
    return "".join(separator.join(row) + "\r\n" for row in [ROWS[0].keys(), *quoted])


def contents():
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    yield "x.jsonl", lines.encode()
    yield "x.jsonl.gz", gzip.compress(lines.encode())
    yield "x.jsonl.zst", zstandard.compress(("\ufeff" + lines).encode())
    yield "x.json", json.dumps(ROWS).encode()
    yield "x.json.gz", gzip.compress(json.dumps(ROWS, indent=1).encode())
    yield "x.csv", csv_text(",").encode()
    yield "x.parquet", parquet(ROWS)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"), [pytest.param(*case, id=case[0]) for case in contents()]
)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fields(task(tmp_path, name)) == ROWS
    assert (
        fields(task(tmp_path, name, where={"n": "2"}))
        == fields(task(tmp_path, name, keep="{{ n == '2' }}"))
        == ROWS[1:]
    )


def test_quotes_of_a_tsv_stand_for_themselves(tmp_path):
    (tmp_path / "x.tsv").write_text('a\t"b\nc\td"e\n')
    assert fields(task(tmp_path, "x.tsv", columns=["one", "two"])) == [
        {"one": "a", "two": '"b'},
        {"one": "c", "two": 'd"e'},
    ]


def test_a_format_says_what_a_name_does_not(tmp_path):
    (tmp_path / "x.txt").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert fields(task(tmp_path, "x.txt", format="jsonl")) == [{"a": 1}, {"a": 2}]
    with pytest.raises(
        ValueError,
        match=r"x.txt: expected a file that ends in .jsonl, .json, .csv, .tsv, .conll, .parquet",
    ):
        fields(task(tmp_path, "x.txt"))


def test_keys_of_an_object_are_rows(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"7": {"a": 1}, "8": "yes"}))
    assert fields(task(tmp_path, "x.json")) == [{"key": "7", "a": 1}, {"key": "8", "value": "yes"}]


def test_records_are_taken_out_of_rows_and_inherit_their_fields(tmp_path):
    content = {
        "version": 1,
        "data": [
            {"title": "t", "qas": [{"q": 1}, {"q": 2}]},
            {"title": "u", "qas": [{"q": 3, "title": "own"}]},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    rows = read_rows(task(tmp_path, "x.json", records="data.qas"), None)
    wanted = [{"title": "t", "q": 1}, {"title": "t", "q": 2}, {"title": "own", "q": 3}]
    assert [row.fields for row in rows] == [{"version": 1, **fields} for fields in wanted]
    assert [row.number for row in rows] == [0, 1, 2] and rows[2].where.endswith("data 2, qas 1")
    with pytest.raises(
        ValueError,
        match=r"x.json entry 1: answers of records=answers is 'None', expected a list or an object",
    ):
        (tmp_path / "x.json").write_text("[{}]")
        fields(task(tmp_path, "x.json", records="answers"))


def test_a_second_file_adds_fields_by_id(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"7": {"a": 1}, "8": {"a": 2}, "9": {"a": 3}}))
    (tmp_path / "y.json").write_text(json.dumps({"9": "yes", "7": "no"}))
    mine = task(tmp_path, "x.json", id="key", join="y.json", keep="{{ value is defined }}")
    assert fields(mine) == [
        {"key": "7", "value": "no", "a": 1},
        {"key": "9", "value": "yes", "a": 3},
    ]
    digest = task_digests([mine])
    (tmp_path / "y.json").write_text(json.dumps({"9": "yes"}))
    assert task_digests([mine]) != digest
    with pytest.raises(
        ValueError, match=r"none of the 1 rows of join=y.json has the a of a row of x.json"
    ):
        fields(replace(mine, id="a"))


CONLL = """-DOCSTART- -X- O O

Acme NN B-ORG
Inc NN I-ORG
Rome NN I-LOC
Paris NN B-LOC

paid VB O

-DOCSTART- -X- O O

Ann NN S-PER
"""


def test_sentences_of_a_conll_file(tmp_path):
    (tmp_path / "x.txt").write_text(CONLL)
    first, second, third = fields(task(tmp_path, "x.txt", format="conll"))
    assert first["text"] == "Acme Inc Rome Paris" and first["tags"] == [
        "B-ORG",
        "I-ORG",
        "I-LOC",
        "B-LOC",
    ]
    assert first["entities"] == [
        {"text": "Acme Inc", "type": "ORG"},
        {"text": "Rome", "type": "LOC"},
        {"text": "Paris", "type": "LOC"},
    ]
    assert (second["text"], second["entities"]) == ("paid", [])
    chunks = read_rows(task(tmp_path, "x.txt", format="conll", sentences=2), None)
    assert [chunk.fields["text"] for chunk in chunks] == ["Acme Inc Rome Paris paid", "Ann"], (
        "none goes on into the next document"
    )
    assert [chunk.where.rpartition(" ")[2] for chunk in chunks] == ["1", "3"] and third[
        "entities"
    ] == [{"text": "Ann", "type": "PER"}]


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["PER", "LOC", None])), max_size=8))
def test_entities_of_any_bio_sentence_are_what_was_tagged(spans):
    """Spans of some length, None being words outside; written as BIO and as BIOES."""
    bio, bioes, wanted = [], [], []
    for number, (length, kind) in enumerate(spans):
        words = [f"w{number}.{place}" for place in range(length)]
        bio += [
            (word, "O" if kind is None else f"{'I' if place else 'B'}-{kind}")
            for place, word in enumerate(words)
        ]
        marks = ["S"] if length == 1 else ["B", *["I"] * (length - 2), "E"]
        bioes += [
            (word, "O" if kind is None else f"{mark}-{kind}")
            for word, mark in zip(words, marks, strict=True)
        ]
        wanted += [] if kind is None else [{"text": " ".join(words), "type": kind}]
    assert _entities(bio) == _entities(bioes) == wanted


def test_a_file_behind_a_url(tmp_path):
    MemoryFileSystem().pipe("/evaluation/x.jsonl", b'{"a": 1}\n')
    mine = task(tmp_path, "memory://evaluation/x.jsonl")
    assert fields(mine) == [{"a": 1}]
    digest = task_digests([mine])
    MemoryFileSystem().pipe("/evaluation/x.jsonl", b'{"a": 1}\n{"a": 2}\n')
    assert task_digests([mine]) != digest
    with pytest.raises(ValueError, match=r"nowhere://x: unknown file system"):
        fields(task(tmp_path, "nowhere://x"))


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [
        ("x.json", "[1, ", {}, r"x.json: not valid JSON"),
        ("x.json", "3", {}, r"x.json: found int, expected a list or an object"),
        ("x.jsonl", "[3]\n", {}, r"x.jsonl line 1: found list, expected an object with fields"),
        ("x.csv", "a,b\n1,2\n3\n", {}, r"x.csv line 3: 1 cells, expected 2: a, b"),
        ("x.csv", 'a,b\n"1"x,2\n', {}, r"x.csv cannot be read as csv"),
        (
            "x.conll",
            "-DOCSTART-\n\nword\n",
            {},
            r"x.conll line 3: 'word', expected a token and its tag",
        ),
        ("x.parquet", "no", {}, r"x.parquet cannot be read as parquet"),
        ("x.jsonl.gz", "no", {}, r"x.jsonl.gz: the file cannot be read to its end"),
        (
            "x.jsonl",
            '{"a": 1}\n',
            {"columns": ["a"]},
            r"columns is for csv and tsv files, but .*x.jsonl has the format jsonl",
        ),
        ("x.jsonl", '{"a": 1}\n', {"sentences": 2}, r"sentences is for conll files"),
        ("x.jsonl", '{"a": 1}\n', {"format": "xml"}, r"format is 'xml', expected jsonl, json, csv"),
        (
            "x.jsonl",
            '{"a": 1}\n',
            {"keep": "{{ a }}"},
            r"x.jsonl line 1: keep of task mine renders '1', expected True or False",
        ),
        ("x.jsonl", '{"a": 1}\n', {"keep": "{{ a == 2 }}"}, r"holds no row with keep="),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(tmp_path, name, content, keys, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        fields(task(tmp_path, name, **keys))
    assert "\n" not in str(error.value)


# The hub
# ----------------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub(hub):
    """A folder laid out as a hub's data set is read by the same library."""
    folder = hub({"One": [{"id": 0, "input": "i"}]})
    assert fields(task(folder, f"hub:{folder}", subset="One")) == [{"id": 0, "input": "i"}]
    with pytest.raises(
        ValueError,
        match=r"task mine: data set .*/Two, split test, cannot be read from the hub \(ValueError",
    ) as error:
        fields(task(folder, f"hub:{folder}", subset="Two"))
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached(tmp_path):
    with pytest.raises(
        ValueError, match=r"data set nobody/nothing, split train, cannot be read from the hub"
    ) as error:
        fields(task(tmp_path, "hub:nobody/nothing", split="train"))
    assert "\n" not in str(error.value)
