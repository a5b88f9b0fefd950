"""Documents that are held out together, and texts that a template makes of a row's fields."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import CorpusConfig
from ipt.corpus.build import build_corpus
from ipt.corpus.documents import read_documents
from ipt.files import read_parts

ROWS = [
    {"id": f"d{number}", "chapter": f"chapter {number // 5}", "text": f"text {number}"}
    for number in range(200)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path, **settings):
    return CorpusConfig(
        kind="files",
        path=str(path),
        id_field="id",
        held_out_fraction=0.3,
        held_out_by="chapter",
        **settings,
    )


def sides(output):
    return [
        {row["doc_id"] for row in read_parts(output / side)} for side in ("documents", "held_out")
    ]


def test_a_chapter_is_held_out_whole(tmp_path):
    stats = build_corpus(config(write(tmp_path / "a.jsonl", ROWS)), 0, tmp_path / "out")
    training, held_out = sides(tmp_path / "out")
    chapters = {row["id"]: row["chapter"] for row in ROWS}
    seen, unseen = ({chapters[name] for name in side} for side in (training, held_out))
    assert len(training) + len(held_out) == len(ROWS) and len(unseen) > 3
    assert seen.isdisjoint(unseen)
    assert stats["held_out_groups"] == {
        "by": "chapter",
        "training": len(seen),
        "held_out": sorted(unseen),
        "documents_without": 0,
    }


def test_parquet_and_json_hold_out_the_same_and_another_seed_others(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", ROWS)
    build_corpus(config(tmp_path / "a.jsonl"), 0, tmp_path / "json")
    build_corpus(config(tmp_path / "a.parquet"), 0, tmp_path / "parquet")
    build_corpus(config(tmp_path / "a.jsonl"), 1, tmp_path / "other")
    assert sides(tmp_path / "json") == sides(tmp_path / "parquet") != sides(tmp_path / "other")


def test_documents_without_the_field_always_train_and_are_counted(tmp_path):
    rows = [*ROWS, *({"id": f"bare {number}", "text": "bare"} for number in range(50))]
    stats = build_corpus(config(write(tmp_path / "a.jsonl", rows)), 0, tmp_path / "out")
    training, _ = sides(tmp_path / "out")
    assert {f"bare {number}" for number in range(50)} <= training
    assert stats["held_out_groups"]["documents_without"] == 50


def test_a_field_that_no_document_has_is_a_mistake(tmp_path):
    rows = [{"id": row["id"], "text": row["text"]} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"corpus\.held_out_by=chapter: no document has this field"
    ):
        build_corpus(config(write(tmp_path / "a.jsonl", rows)), 0, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1: field 'chapter' is .*, expected a name or a number"
    ):
        build_corpus(
            config(write(tmp_path / "a.jsonl", [{"id": "a", "text": "a", "chapter": ["a"]}])),
            0,
            tmp_path / "out",
        )


def test_a_template_makes_the_text(tmp_path):
    rows = [{"id": "a", "focus": "Asthma", "qa": [{"answer": "One."}, {"answer": "Two."}]}]
    template = "{{ focus }}\n{% for pair in qa %}{{ pair.answer }}\n{% endfor %}"
    made = CorpusConfig(
        kind="files", path=str(write(tmp_path / "a.jsonl", rows)), id_field="id", template=template
    )
    assert [(document.doc_id, document.text) for document in read_documents(made)] == [
        ("a", "Asthma\nOne.\nTwo.\n")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    made.path = str(tmp_path / "a.parquet")
    assert [document.text for document in read_documents(made)] == ["Asthma\nOne.\nTwo.\n"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ nothing }}",
            r"a\.jsonl, line 1: corpus\.template cannot be filled: 'nothing' is undefined; "
            r"the row has id, chapter, text",
        ),
        ("{% for %}", r"corpus\.template is no valid template"),
        ("{{ text.__class__.__mro__ }}", "cannot be filled"),  # the sandbox: a template is data too
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(template, message, tmp_path):
    made = CorpusConfig(
        kind="files", path=str(write(tmp_path / "a.jsonl", ROWS)), template=template
    )
    with pytest.raises(ValueError, match=message):
        list(read_documents(made))
