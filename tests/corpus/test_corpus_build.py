import json

import pytest

from ipt.config import CorpusConfig
from ipt.corpus import writer
from ipt.corpus.build import build_corpus, check_corpus, input_digests
from ipt.corpus.ontology.build import count_mentions


def write(path, count, **fields):
    path.write_text(
        "".join(
            json.dumps({"text": f"Document {i}. {'word ' * (i % 7)}", **fields}) + "\n"
            for i in range(count)
        )
    )
    return path


def config(path, **settings):
    return CorpusConfig(
        **{"kind": "files", "path": str(path), "held_out_fraction": 0.2, **settings}
    )


def test_what_is_read_is_written_or_counted(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", 300)
    path.write_text(path.read_text() + '{"text": " "}\n{"text": null}\n')
    stats = build_corpus(config(path), 1, tmp_path / "out")
    training, held_out = rows(tmp_path / "out/documents"), rows(tmp_path / "out/held_out")
    assert stats["read"] == 302 == len(training) + len(held_out) + sum(stats["dropped"].values())
    assert (stats["documents"], stats["held_out_documents"]) == (len(training), len(held_out))
    assert stats["characters"] == sum(len(row["text"]) for row in training)
    assert stats["dropped"] == {"empty text": 1, "text is null": 1}
    assert stats["questions"] == {} and not (tmp_path / "out/questions.jsonl").exists()
    assert {row["doc_id"] for row in training}.isdisjoint(row["doc_id"] for row in held_out)
    assert 30 <= len(held_out) <= 90
    assert [json.loads(row["meta"])["row"] for row in training] == sorted(
        json.loads(row["meta"])["row"] for row in training
    )
    assert json.loads(json.dumps(stats)) == stats


def test_held_out_documents_depend_on_the_seed_alone(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", 200)
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        build_corpus(config(path), seed, tmp_path / folder)
    one, again, other = (
        rows(tmp_path / folder / "held_out") for folder in ("one", "again", "other")
    )
    assert one == again != other


def test_limit_counts_training_documents(tmp_path, rows):
    stats = build_corpus(
        config(write(tmp_path / "a.jsonl", 100), max_documents=10), 1, tmp_path / "out"
    )
    assert (
        stats["documents"] == 10 == len(rows(tmp_path / "out/documents"))
        and stats["stopped_at_limit"]
    )
    assert stats["read"] == 10 + stats["held_out_documents"] < 100


def test_without_held_out_documents_the_table_is_empty(tmp_path, rows):
    build_corpus(config(write(tmp_path / "a.jsonl", 5), held_out_fraction=0), 1, tmp_path / "out")
    assert rows(tmp_path / "out/held_out") == [] and len(rows(tmp_path / "out/documents")) == 5


def test_parts_are_bounded_and_leftovers_go(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(writer, "PART_DOCUMENTS", 30)
    path = write(tmp_path / "a.jsonl", 100)
    build_corpus(config(path, held_out_fraction=0), 1, tmp_path / "out")
    parts = sorted(file.name for file in (tmp_path / "out/documents").iterdir())
    assert parts == [f"part-0000{part}.parquet" for part in range(4)]
    whole = rows(tmp_path / "out/documents")
    monkeypatch.setattr(writer, "PART_DOCUMENTS", 50_000)
    build_corpus(config(path, held_out_fraction=0), 1, tmp_path / "out")
    assert (
        rows(tmp_path / "out/documents") == whole
        and len(list((tmp_path / "out/documents").iterdir())) == 1
    )


def test_long_documents_bound_parts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_CHARACTERS", 200)
    build_corpus(config(write(tmp_path / "a.jsonl", 40), held_out_fraction=0), 1, tmp_path / "out")
    assert len(list((tmp_path / "out/documents").iterdir())) >= 3


def test_a_users_questions_are_taken_over(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/a.jsonl", 20)
    question = {
        "id": "1",
        "task": "recall",
        "split": "recall",
        "prompt": "Q:",
        "options": [" a", " b"],
        "gold": 0,
        "meta": {},
    }
    (tmp_path / "in/questions.jsonl").write_text(json.dumps(question) + "\n")
    for path in (tmp_path / "in", tmp_path / "in/a.jsonl", tmp_path / "in/*.jsonl"):
        stats = build_corpus(config(path), 1, tmp_path / "out")
        assert stats["questions"] == {"recall": {"recall": 1}} and stats["read"] == 20
        assert json.loads((tmp_path / "out/questions.jsonl").read_text()) == question
        assert set(input_digests(config(path))) == {"a.jsonl", "questions.jsonl"}
    (tmp_path / "in/questions.jsonl").write_text(json.dumps({**question, "gold": 9}) + "\n")
    with pytest.raises(ValueError, match="line 1: gold is 9"):
        check_corpus(config(tmp_path / "in"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "file"}, r"corpus\.kind=file: must be one of auto, files, hub, ontology"),
        ({"held_out_fraction": 1.0}, r"corpus\.held_out_fraction=1\.0"),
        ({"held_out_fraction": -0.1}, r"corpus\.held_out_fraction=-0\.1"),
        ({"max_documents": 0}, r"corpus\.max_documents=0"),
        ({"questions": -1}, r"corpus\.questions=-1"),
        ({"text_field": "body"}, r"line 1: no field 'body', only 'text'"),
        ({"path": None}, r"corpus\.path is not set"),
        ({"kind": "hub"}, r"corpus\.dataset is not set"),
        ({"kind": "ontology", "ontologies": ["GO"]}, r"corpus\.ontologies=\['GO'\]"),
    ],
)
def test_wrong_settings_are_named_before_anything_happens(tmp_path, settings, said):
    wrong = (
        config(write(tmp_path / "a.jsonl", 5), **settings)
        if "path" not in settings
        else CorpusConfig(kind="files")
    )
    with pytest.raises(ValueError, match=said) as caught:
        check_corpus(wrong)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=said):
        build_corpus(wrong, 0, tmp_path / "out")


def test_good_settings_pass(tmp_path):
    check_corpus(config(write(tmp_path / "a.jsonl", 5)))
    check_corpus(CorpusConfig(kind="hub", dataset="owner/name"))
    check_corpus(CorpusConfig(kind="ontology"))


def test_everything_held_out_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds out all 1 documents"):
        build_corpus(
            config(write(tmp_path / "a.jsonl", 1), held_out_fraction=0.999), 1, tmp_path / "out"
        )


def test_the_embedded_corpus(tmp_path, rows):
    settings = CorpusConfig(
        kind="ontology", ontologies=["CL"], held_out_fraction=0.1, max_documents=100, questions=20
    )
    stats = build_corpus(settings, 1, tmp_path / "out")
    training, held_out = rows(tmp_path / "out/documents"), rows(tmp_path / "out/held_out")
    assert len(training) == 100 == stats["documents"] and stats["characters"] == sum(
        len(row["text"]) for row in training
    )
    assert {row["source"] for row in training + held_out} == {"CL v2024-04-05"}
    ids = [row["doc_id"] for row in training + held_out]
    assert len(set(ids)) == len(ids)
    questions = [
        json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()
    ]
    known = {term_id for row in training for term_id in json.loads(row["meta"])["terms"]}
    unseen = {term_id for row in held_out for term_id in json.loads(row["meta"])["terms"]}
    for question in questions:
        assert question["meta"]["term"] in (known if question["split"] == "recall" else unseen)
    assert stats["questions"]["definition_to_term"] == {"recall": 20, "generalisation": 20}
    account = stats["ontologies"]["CL v2024-04-05"]
    sides = sum(
        account[side][what]
        for side in ("training", "held_out")
        for what in ("defined", "named_only")
    )
    assert account["terms"] == 2998 == sides + sum(account["left_out"].values())
    assert json.loads(json.dumps(stats)) == stats
    again = build_corpus(settings, 1, tmp_path / "again")
    assert again == stats and rows(tmp_path / "again/documents") == training
    assert (tmp_path / "again/questions.jsonl").read_bytes() == (
        tmp_path / "out/questions.jsonl"
    ).read_bytes()


def test_held_out_terms_that_a_training_text_mentions_are_counted_and_not_asked_about():
    mentions = count_mentions(
        {"X:1": ["Round cell"], "X:2": ["cell round"], "X:3": ["!"]},
        ["A big round-cell.", "Round cells.", "round cell"],
    )
    assert mentions == {"X:1": 2}
