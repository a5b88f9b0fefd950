"""Stores behind URLs: an in-memory file system and a real web server that lists nothing."""

import multiprocessing
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tokens_cases import write

from ipt.tokens import remote as remote_module
from ipt.tokens.cache import FileCache
from ipt.tokens.shards import EncodedDocument, Origin, ShardWriter
from ipt.tokens.store import TokenStore

DOCUMENTS = [[number] * (number % 7 + 1) for number in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "store", DOCUMENTS, 8)


class Server(SimpleHTTPRequestHandler):
    """Sends files and counts what is asked for; it lists no folders, and no file may be read before
    it has its last byte.
    """

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def list_directory(self, _):
        self.send_error(403)

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    handler = type("Counting", (Server,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()


@pytest.fixture(params=["memory", "http"])
def url(request, folder):
    """The URL of a copy of `folder`, and what was asked of its server."""
    if request.param == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", "/far/store/", recursive=True)
        yield "memory://far/store"
        fsspec.filesystem("memory").rm("/far", recursive=True)
        return
    with serving(folder.parent) as (address, _):
        yield f"{address}/store/"


def cached(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.iterdir() if path.is_file()}


def different_files(store: TokenStore) -> set[str]:
    return {file["sha256"] for index in store.indices for file in index.files.values()}


def all_tokens(store: TokenStore) -> list[list[int]]:
    return [store.tokens(number).tolist() for number in range(len(store))]


def test_the_same_store_as_in_the_folder_itself(folder, url):
    here, there = TokenStore(folder), TokenStore.open(url)
    assert len(there.indices) == len(here.indices) > 5
    assert all_tokens(there) == DOCUMENTS and there.digest == here.digest
    assert there.positions(np.arange(31)).tolist() == here.positions(np.arange(31)).tolist()
    there.verify()


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
def test_a_store_on_this_machine_is_not_copied(folder, cache, prefix):
    assert (
        all_tokens(TokenStore.open(f"{prefix}{folder}"))
        == all_tokens(TokenStore.open(folder))
        == DOCUMENTS
    )
    assert not cache.exists()


def test_more_shards_than_are_asked_for_at_a_time(url, monkeypatch):
    for probed in (1, 3, 12, 13):
        monkeypatch.setattr(remote_module, "PROBED", probed)
        assert len(TokenStore.open(url)) == 30


def test_files_are_copied_once_and_only_when_needed(folder, cache):
    with serving(folder.parent) as (address, asked):
        store = TokenStore.open(f"{address}/store")
        assert {path.rpartition("/")[2] for path in asked} == {"index.json"} and not cache.exists()
        asked.clear()
        store.positions(np.array([0, 30]))
        assert sorted(asked) == sorted(
            {"/store/shard-00000/offsets.npy", f"/store/{store.indices[-1].shard}/offsets.npy"}
        )
        assert all_tokens(store) == DOCUMENTS
        assert len(asked) == len(set(asked)) == len(different_files(store))
        asked.clear()
        assert all_tokens(TokenStore.open(f"{address}/store")) == DOCUMENTS
        assert not [path for path in asked if "index.json" not in path]


def test_files_larger_than_a_block(tmp_path):
    """The server sends files as a whole only, as simple ones do."""
    folder = write(tmp_path / "large", [list(range(1_500_000)), [7]], 10)
    assert (folder / "shard-00000/tokens.bin").stat().st_size > fsspec.filesystem("http").block_size
    with serving(tmp_path) as (address, _):
        store = TokenStore.open(f"{address}/large")
        store.verify()
        assert store.tokens(0, 1_234_567, 1_234_569).tolist() == [1_234_567, 1_234_568]


def test_a_copy_that_was_cut_short_is_made_anew(url, cache):
    assert all_tokens(TokenStore.open(url)) == DOCUMENTS
    victim = next(path for path in cache.iterdir() if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert all_tokens(TokenStore.open(url)) == DOCUMENTS


# Damage
# ----------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_tried_twice_and_named(folder, cache):
    path = folder / "shard-00001/tokens.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with serving(folder.parent) as (address, asked):
        store = TokenStore.open(f"{address}/store")
        with pytest.raises(
            ValueError, match=r"http://.*/store/shard-00001/tokens\.bin has SHA-256 .*, 2 times"
        ) as caught:
            all_tokens(store)
        assert asked.count("/store/shard-00001/tokens.bin") == 2 and "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=r"not what was written: shard-00001/tokens\.bin;"):
            store.verify()
    index = store.indices[1].files["tokens.bin"]
    assert index["sha256"] not in cached(cache) and not [
        name for name in cached(cache) if "unfinished" in name
    ]


def test_a_transfer_that_fails_once_is_repeated(url, monkeypatch):
    hash_file, failures = remote_module.hash_file, iter([True])
    monkeypatch.setattr(
        remote_module, "hash_file", lambda path: "" if next(failures, False) else hash_file(path)
    )
    assert all_tokens(TokenStore.open(url)) == DOCUMENTS


def test_a_shard_that_is_not_there_is_named(folder):
    with serving(folder.parent) as (address, _):
        store = TokenStore.open(f"{address}/store")
        (folder / "shard-00001/tokens.bin").unlink()
        with pytest.raises(
            ValueError, match=r"shard-00001/tokens\.bin cannot be read \(FileNotFoundError"
        ):
            all_tokens(store)
        with pytest.raises(ValueError, match=r"not what was written: shard-00001/tokens\.bin;"):
            store.verify()


def test_a_store_whose_last_shards_are_missing_is_named(tmp_path):
    for part in range(2):
        with ShardWriter(
            tmp_path / f"store/shard-{part:05d}",
            Origin("f", rows={"texts": "t", "part": part, "parts": 3}),
        ) as shard:
            shard.write(EncodedDocument(np.array([part], np.uint32)))
    with (
        serving(tmp_path) as (address, _),
        pytest.raises(ValueError, match="shard-00002 is missing, the store is not finished"),
    ):
        TokenStore.open(f"{address}/store")


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("memory://nowhere", "is not a token store"),
        ("abc://bucket/store", "Protocol not known: abc"),
        ("oss://bucket/store", "package is missing.*ossfs"),
        ("http://127.0.0.1:9/store", "cannot be reached"),
    ],
)
def test_a_url_without_a_store_is_named(location, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        TokenStore.open(location)
    assert location in str(caught.value) and "\n" not in str(caught.value)


# Cache
# ----------------------------------------------------------------------------------------------


def gib(size: int) -> float:
    return size / 2**30


def test_the_cache_keeps_to_its_limit_and_all_can_be_read(url, cache, capfd):
    limit = 600
    store = TokenStore.open(url, gib(limit))
    assert "copied again and again" in capfd.readouterr().err
    for number in np.random.default_rng(0).permutation(30):
        assert store.tokens(int(number)).tolist() == DOCUMENTS[number]
        assert sum(cached(cache).values()) <= limit
    assert sum(cached(cache).values()) > limit / 2


@pytest.fixture
def small(tmp_path) -> FileCache:
    (tmp_path / "small").mkdir()
    return FileCache(tmp_path / "small", 30)


def put(cache: FileCache, name: str) -> np.ndarray:
    """A file of ten bytes, mapped as stores do."""
    import mmap

    with cache.open(name * 64, 10, lambda path: path.write_bytes(name.encode() * 10)) as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def test_what_was_opened_longest_ago_goes_first(small):
    for name in "abcad":  # `a` is opened again before there is no room left
        put(small, name)
    assert {name[0] for name in cached(small.folder)} == set("acd")


def test_what_is_open_stays(small):
    held = put(small, "a")
    for name in "bcdef":
        put(small, name)
    assert {name[0] for name in cached(small.folder)} == set("aef") and held[0] == ord("a")
    del held
    put(small, "g")
    assert {name[0] for name in cached(small.folder)} == set("efg")


def test_what_is_open_stays_beyond_the_limit(small):
    held = [put(small, name) for name in "abcde"]
    assert sum(cached(small.folder).values()) == 50
    assert [array[0] for array in held] == [ord(name) for name in "abcde"]


def test_what_another_process_has_open_stays(small):
    context = multiprocessing.get_context("spawn")
    opened, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(small, "a", opened, done))
    process.start()
    assert opened.wait(300)
    for name in "bcdef":
        put(small, name)
    assert {name[0] for name in cached(small.folder)} == set("aef")
    done.set()
    process.join()
    put(small, "g")
    assert {name[0] for name in cached(small.folder)} == set("efg")


def _hold(cache, name, opened, done) -> None:
    held = put(cache, name)
    opened.set()
    done.wait(300)
    assert held[0] == ord(name)


def test_a_file_that_cannot_be_fetched_leaves_nothing(small):
    def fail(path):
        path.write_bytes(b"half")
        raise ValueError("the line broke")

    with pytest.raises(ValueError, match="the line broke"):
        small.open("a" * 64, 10, fail)
    assert cached(small.folder) == {}
    assert put(small, "a")[0] == ord("a")


def test_several_processes_copy_each_file_once(folder):
    with serving(folder.parent) as (address, asked):
        context = multiprocessing.get_context("spawn")
        results, start = context.SimpleQueue(), context.Event()
        processes = [
            context.Process(target=_read, args=(f"{address}/store", start, results))
            for _ in range(2)
        ]
        for process in processes:
            process.start()
        start.set()
        assert [results.get() for _ in processes] == [DOCUMENTS, DOCUMENTS]
        for process in processes:
            process.join()
        data = [path for path in asked if "index.json" not in path]
        assert len(data) == len(set(data)) == len(different_files(TokenStore(folder)))


def test_a_forked_process_can_copy_too(folder):
    """As a worker of a data loader does."""
    with serving(folder.parent) as (address, _):
        store = TokenStore.open(f"{address}/store")
        assert store.tokens(0).tolist() == DOCUMENTS[0]
        context = multiprocessing.get_context("fork")
        results, start = context.SimpleQueue(), context.Event()
        start.set()
        process = context.Process(target=_read, args=(store, start, results))
        process.start()
        assert results.get() == DOCUMENTS
        process.join()


def _read(store, start, results) -> None:
    start.wait(300)
    results.put(all_tokens(store if isinstance(store, TokenStore) else TokenStore.open(store)))
