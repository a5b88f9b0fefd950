"""Folders that cannot be written, and files that Git LFS has not fetched."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import CorpusConfig
from ipt.corpus.documents import read_documents
from ipt.corpus.readers.files import CorpusFile
from ipt.errors import UserError
from ipt.evaluation.formats import read_file
from ipt.evaluation.task import Task
from ipt.files import read_json, read_parts, write_json
from ipt.models import cache_dir, check_model
from ipt.places import check_writable
from ipt.rendering.preview import read_rows

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.mark.parametrize("name", ["new", "new/below", "ü = 1", "."])
def test_a_folder_that_can_be_written_passes_and_nothing_is_left(tmp_path, name):
    check_writable("output_dir", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = {
        "file": "is a file, expected a folder",
        "file/below": "is a file, expected a folder",
        "link": "is a broken link, expected a folder",
        "/proc/below": "not writable",
        "\udcff": "the path is not UTF-8",
    }
    for name, message in places.items():
        with pytest.raises(UserError, match=message) as caught:
            check_writable("stages_dir", tmp_path / name)
        assert str(caught.value).startswith("stages_dir=")
        assert "set stages_dir to a writable folder" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_cache_is_checked_before_a_model_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("IPT_CACHE", "/proc/below")
    with pytest.raises(UserError, match="IPT_CACHE=/proc/below: not writable"):
        check_model("embedded:tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IPT_CACHE", "~/cache")
    assert cache_dir() == tmp_path / "cache"


def test_a_name_of_any_bytes_goes_through_json(tmp_path):
    write_json(tmp_path / "a.json", {"path": "data/\udcff.jsonl", "ü": ["心", "\udc80"]})
    (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"path": "data/\udcff.jsonl", "ü": ["心", "\udc80"]}


@pytest.mark.parametrize(
    "ending", [".jsonl", ".txt", ".parquet", ".jsonl.gz", ".jsonl.zst", ".json"]
)
def test_a_git_lfs_pointer_in_a_corpus_is_named(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text(POINTER)
    with pytest.raises(UserError, match=r"is a Git LFS pointer.*: run `git lfs pull`"):
        list(read_documents(CorpusConfig(kind="files", path=str(path))))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".json"])
def test_a_git_lfs_pointer_in_the_data_of_a_task_is_named(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text(POINTER)
    with pytest.raises(UserError, match="a Git LFS pointer"):
        list(read_file(Task("t", "choice"), CorpusFile(str(path), path.name)))


def test_a_git_lfs_pointer_among_pairs_is_named(tmp_path):
    (tmp_path / "part-00000.parquet").write_text(POINTER)
    for read in (read_parts, read_rows):
        with pytest.raises(UserError, match=r"part-00000\.parquet is a Git LFS pointer"):
            list(read(tmp_path))


def test_a_text_about_git_lfs_is_no_pointer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("version https://git-lfs.github.com/spec/v1 is how a pointer begins.")
    assert len(list(read_documents(CorpusConfig(kind="files", path=str(path))))) == 1
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part-0.parquet")
    assert list(read_parts(Path(tmp_path))) == [{"text": "a"}]


def test_a_tilde_in_the_data_of_a_task_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Task("t", "choice", "~/rows.jsonl").path == tmp_path / "rows.jsonl"
