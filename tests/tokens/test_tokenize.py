"""Texts to stores: with any number of workers, after a kill, and in bounded memory."""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokens_cases import contents, texts_of

from ipt.config import TokensConfig
from ipt.errors import UserError
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text
from ipt.tokens import workers as workers_module
from ipt.tokens.encode import Encoder
from ipt.tokens.store import TokenStore
from ipt.tokens.tasks import make_tasks, read_rows
from ipt.tokens.tokenize import add_texts, check_tokens, store_settings, tokenize_texts
from ipt.tokens.workers import TokenizeJob, run_jobs

CONFIG = TokensConfig(bos=True, shard_tokens=800, workers=1)


@pytest.fixture(scope="module")
def texts(make_texts):
    return make_texts(200)


@pytest.fixture(scope="module")
def whole(texts, tiny_model, tmp_path_factory):
    """The store that one worker makes, and what it says of it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, tokenize_texts(CONFIG, texts, tiny_model, folder)


def test_a_store_holds_each_text_as_it_is_alone(texts, whole, encoding):
    folder, stats = whole
    store, expected = (
        TokenStore(folder),
        [document.tokens.tolist() for document in Encoder(encoding).encode(_rows(texts))],
    )
    assert [store.tokens(number).tolist() for number in range(len(store))] == expected
    tokens = sum(map(len, expected))
    assert stats == {
        "documents": 200,
        "tokens": tokens,
        "tokenizer": encoding.fingerprint,
        "shards": len(store.indices),
    }
    sizes = [index.n_tokens for index in store.indices]
    # about as large as asked for
    assert 4 < len(sizes) < tokens / 500 and 400 < np.mean(sizes) < 2500
    origin = store.indices[1].origin
    assert (origin.bos, origin.eos) == (encoding.bos, encoding.eos)
    assert (
        origin.rows["first"] == store.indices[0].n_docs
        and origin.rows["end"] == origin.rows["first"] + store.indices[1].n_docs
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(texts, whole, tiny_model, tmp_path, workers):
    assert tokenize_texts(replace(CONFIG, workers=workers), texts, tiny_model, tmp_path) == whole[1]
    assert contents(tmp_path) == contents(whole[0])
    assert store_settings(CONFIG) == store_settings(replace(CONFIG, workers=workers))


def test_finished_shards_are_kept_and_others_made_again(texts, whole, tiny_model, tmp_path):
    tokenize_texts(CONFIG, texts, tiny_model, tmp_path)
    foreign, cut, absent = (tmp_path / f"shard-0000{number}" for number in (1, 2, 3))
    index = json.loads((foreign / "index.json").read_text())
    (foreign / "index.json").write_text(
        json.dumps({**index, "rows": {**index["rows"], "texts": "others"}})
    )
    (cut / "tokens.bin").write_bytes(b"")
    (absent / "index.json").unlink()
    (tmp_path / ".shard-00003.1.unfinished").mkdir()
    (tmp_path / "shard-00099").mkdir()
    before = _times(tmp_path)
    tokenize_texts(CONFIG, texts, tiny_model, tmp_path)
    after = _times(tmp_path)
    assert contents(tmp_path) == contents(whole[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in whole[0].iterdir()
    )
    again = {name for name in after if before.get(name) != after[name]}
    assert {name.split("/")[0] for name in again} == {foreign.name, cut.name, absent.name}


def test_another_tokenizer_or_rule_makes_all_shards_again(texts, tiny_model, tmp_path):
    tokenize_texts(CONFIG, texts, tiny_model, tmp_path)
    tokenize_texts(replace(CONFIG, eos=False), texts, tiny_model, tmp_path)
    assert all(index.origin.eos is None for index in TokenStore(tmp_path).indices)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(make_texts, tiny_model, tmp_path):
    texts = make_texts(2500, words=200, row_group=50)
    command = [sys.executable, "-m", "ipt.tokens", "add", str(tmp_path / "killed"), str(texts)]
    command += ["--model", tiny_model, "--bos", "--shard-tokens", "6000", "--workers"]
    process = subprocess.Popen([*command, "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    children = _wait_for_shards(random.Random(0).randint(1, 6), process, tmp_path / "killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    _wait_until(lambda: not any(_is_alive(child) for child in children), "its workers went on")
    before = _times(tmp_path / "killed", "shard-*")
    config = TokensConfig(bos=True, shard_tokens=6000, workers=1)
    assert 0 < len({name.split("/")[0] for name in before}) < len(make_tasks(texts, 6000)), (
        "the kill came too early or too late"
    )
    add_texts(config, texts, tiny_model, tmp_path / "killed")
    tokenize_texts(config, texts, tiny_model, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    after = _times(tmp_path / "killed", "shard-*")
    assert before.items() <= after.items() and len(before) < len(after)


def _wait_for_shards(number: int, process, folder) -> list[int]:
    """The processes below `process` once so many shards are finished."""
    _wait_until(
        lambda: (
            process.poll() is not None or len(list(folder.glob("shard-*/index.json"))) >= number
        ),
        "no shard was finished",
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in children.split()]


def _wait_until(is_so, otherwise: str) -> None:
    deadline = time.monotonic() + 500
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.002)


def _is_alive(process: int) -> bool:
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_gives_one_line(texts, encoding, tmp_path):
    jobs = [
        TokenizeJob(task, tmp_path / f"shard-{number:05d}")
        for number, task in enumerate(make_tasks(texts, 800) * 50)
    ]
    killed: list[int] = []

    def kill_one(_: float) -> None:
        children = [child.pid for child in multiprocessing.active_children()]
        if children and not killed:
            killed.append(children[0])
            os.kill(children[0], signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"was killed by signal 9: .*lower tokens\.workers"
    ) as caught:
        run_jobs(jobs, encoding, 2, kill_one)
    assert killed and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_what_a_worker_raises_is_raised_here(tmp_path, encoding):
    rows = [{"text": f"document {i}"} for i in range(40)] + [{"text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00000.parquet", row_group_size=10)
    jobs = [
        TokenizeJob(task, tmp_path / f"shard-{task.part:05d}") for task in make_tasks(tmp_path, 1)
    ]
    for workers in (1, 2):
        with pytest.raises(
            ValueError, match=r"part-00000\.parquet row 40: has neither text nor examples"
        ):
            run_jobs(jobs, encoding, workers, lambda _: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_each_row_once(texts, encoding, tmp_path, workers):
    jobs = [
        TokenizeJob(task, tmp_path / f"shard-{task.part:05d}") for task in make_tasks(texts, 800)
    ]
    counted: list[float] = []
    run_jobs(jobs, encoding, workers, counted.append)
    assert sum(counted) == 200


def test_threads_of_the_tokenizer_are_those_that_are_left(texts, encoding, tmp_path, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(
        workers_module, "_write_shard", lambda *_: seen.append(os.environ["TOKENIZERS_PARALLELISM"])
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    job = TokenizeJob(make_tasks(texts, 800)[0], tmp_path / "shard-00000")
    for workers in (1, 2):
        run_jobs([job], encoding, workers, lambda _: None)
    assert seen == ["false", "true"]
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


# Tasks
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 300, 10**9])
def test_tasks_cover_all_rows_in_order(texts, shard_tokens):
    tasks = make_tasks(texts, shard_tokens)
    assert [row["text"] for task in tasks for row in read_rows(task)] == texts_of(texts)
    assert [task.first for task in tasks] == [0, *(task.end for task in tasks[:-1])] and tasks[
        -1
    ].end == 200
    assert all(sum(1 for _ in read_rows(task)) == task.end - task.first for task in tasks)
    assert (len(tasks) == 1) is (shard_tokens == 10**9)


def test_other_texts_have_another_identity(make_texts):
    one, same, other = make_texts(30), make_texts(30), make_texts(30, seed=1)
    assert make_tasks(one, 9)[0].rows == make_tasks(same, 9)[0].rows != make_tasks(other, 9)[0].rows


def test_no_rows_make_a_store_without_documents(tmp_path, tiny_model):
    (tmp_path / "texts").mkdir()
    pq.write_table(
        pa.table({"text": pa.array([], pa.string())}), tmp_path / "texts/part-00000.parquet"
    )
    assert (
        tokenize_texts(CONFIG, tmp_path / "texts", tiny_model, tmp_path / "out")["documents"] == 0
    )
    assert len(TokenStore(tmp_path / "out")) == 0


def test_examples_keep_their_targets_in_every_shard(tmp_path, tiny_model, tokenizer):
    examples = [
        [
            {
                "prompt": context_text(f"Text {i}."),
                "response": pairs_text([Pair(f"What is {i}?", f"A {j}.")]),
            }
            for j in range(i % 3 + 1)
        ]
        for i in range(20)
    ]
    rows = [
        {"examples": some, "fill_to": 160 if i % 2 else None} for i, some in enumerate(examples)
    ]
    (tmp_path / "texts").mkdir()
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "texts/part-00000.parquet", row_group_size=4
    )
    tokenize_texts(
        replace(CONFIG, shard_tokens=50, workers=2),
        tmp_path / "texts",
        tiny_model,
        tmp_path / "out",
    )
    store = TokenStore(tmp_path / "out")
    assert len(store.indices) > 2
    for number, some in enumerate(examples):
        trained = store.tokens(number)[store.is_target(number)]
        assert tokenizer.decode(trained) == "".join(
            f"{example['response']}{tokenizer.eos_token}" for example in some
        )
        assert number % 2 == 0 or len(store.tokens(number)) == 160


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"holds no \*\.parquet"),
        (b"PAR1", "not a readable Parquet file"),
        ({"words": ["a"]}, "has the columns words"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path, tiny_model, content, said):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / "part-00000.parquet")
    elif content:
        (tmp_path / "part-00000.parquet").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        tokenize_texts(CONFIG, tmp_path, tiny_model, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"), [("workers", 0), ("shard_tokens", 0), ("cache_gib", 0.0)]
)
def test_values_that_cannot_be_are_named(key, value):
    check_tokens(CONFIG)
    with pytest.raises(ValueError, match=rf"tokens\.{key}={value}"):
        check_tokens(replace(CONFIG, **{key: value}))


# Adding
# ----------------------------------------------------------------------------------------------


def test_more_texts_come_behind_the_others_once(make_texts, tiny_model, tmp_path, whole, texts):
    more = make_texts(50, seed=1)
    for some in (texts, more, more, texts):
        stats = add_texts(CONFIG, some, tiny_model, tmp_path)
    store, first = TokenStore(tmp_path), TokenStore(whole[0])
    assert stats["documents"] == len(store) == 250 and len(store.indices) > len(first.indices)
    assert contents(whole[0]).items() <= contents(tmp_path).items()
    added = add_texts(CONFIG, more, tiny_model, tmp_path / "more")
    assert added["tokens"] == store.n_tokens - first.n_tokens
    assert store.tokens(200).tolist() == TokenStore(tmp_path / "more").tokens(0).tolist()


def test_what_does_not_fit_the_store_is_not_added(make_texts, tiny_model, tmp_path, texts):
    add_texts(CONFIG, texts, tiny_model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="shard-00000 was made with eos"):
        add_texts(replace(CONFIG, eos=False), make_texts(5, seed=2), tiny_model, tmp_path)
    with pytest.raises(ValueError, match="holds these texts already, cut into"):
        add_texts(replace(CONFIG, shard_tokens=10**6), texts, tiny_model, tmp_path)
    assert contents(tmp_path) == before
    last = sorted(tmp_path.glob("shard-*"))[-1]
    (last / "index.json").unlink()
    with pytest.raises(ValueError, match=rf"{last.name} is missing, the store is not finished"):
        add_texts(CONFIG, make_texts(5, seed=2), tiny_model, tmp_path)


# Memory
# ----------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_input(make_texts, encoding, tmp_path):
    """Ten times the text, all of it one shard, in a process of its own. Its token ids alone are
    more than the limit.
    """
    small, large = (
        make_texts(2000, words=300, row_group=500),
        make_texts(20_000, words=300, row_group=500),
    )
    context = multiprocessing.get_context("spawn")
    peaks = context.SimpleQueue()
    # the first one warms up
    process = context.Process(
        target=_measure, args=(encoding, (small, small, large), tmp_path, peaks)
    )
    process.start()
    process.join()
    _, first, second = peaks.get(), peaks.get(), peaks.get()
    assert TokenStore(tmp_path / "2").n_tokens * 4 > 16 << 20
    assert second - first < 6 << 20


def _measure(encoding, folders, output, peaks) -> None:
    for number, folder in enumerate(folders):
        (task,) = make_tasks(folder, 10**9)
        seen: list[int] = []
        run_jobs(
            [TokenizeJob(task, output / str(number) / "shard-00000")],
            encoding,
            1,
            lambda _, seen=seen: seen.append(_memory()),
        )
        peaks.put(max(seen))


def _memory() -> int:
    """Memory of this process in bytes, without what was freed and is kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def _rows(folder):
    return [{"text": text} for text in texts_of(folder)]


def _times(folder, pattern="*") -> dict[str, int]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob(f"{pattern}/*")
    }
