"""storage/remote.py: copies that are intact or not there; shards and weights test the rest of it."""
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from helpers.web import served
from storage import remote
from storage.remote import HashMismatchError, RemoteCache, TransferError, read_bytes, sha256_of


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    with served(tmp_path) as url:
        yield url


def test_bytes_of_a_small_file(server):
    assert read_bytes(f"{server}/a") == b"content"
    with pytest.raises(TransferError, match="404") as error:
        read_bytes(f"{server}/b")
    assert error.value.status == 404 and not error.value.transient


def test_a_copy_and_its_hash(server, tmp_path):
    downloads = []
    cache = RemoteCache(tmp_path / "cache", on_download=downloads.append)
    digest = hashlib.sha256(b"content").hexdigest()
    assert digest == sha256_of(tmp_path / "a")
    with pytest.raises(HashMismatchError, match='expected "00"'):
        cache.open(f"{server}/a", "a.x", "00")
    for _ in range(2):
        with cache.open(f"{server}/a", "a.x", digest[:10]) as file:
            assert file.read() == b"content"
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a.lock", "a.x"] and len(downloads) == 2
    cache.discard("a.x")
    cache.discard("a.x")
    assert cache.path(f"{server}/a", "a.x").read_bytes() == b"content" and len(downloads) == 3


@pytest.mark.parametrize("system", ["without locks", "without fcntl"])
def test_where_files_cannot_be_locked(server, tmp_path, monkeypatch, system):
    """Each process downloads for itself, and none writes over the part of another."""
    def refuse(*_):
        raise OSError(37, "No locks available")

    if system == "without locks":
        monkeypatch.setattr("fcntl.flock", refuse)
    else:
        monkeypatch.setattr(remote, "fcntl", None)
    cache = RemoteCache(tmp_path / "cache")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.path(f"{server}/a", "a.x").read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"content"] * 4
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a.lock", "a.x"]


def test_a_missing_local_file_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (60,))
    with pytest.raises(TransferError, match="No such file"):
        read_bytes((tmp_path / "none").as_uri())


def test_other_files_are_left_alone(server, tmp_path):
    cache = RemoteCache(tmp_path / "cache", max_bytes=10)
    cache.folder.mkdir()
    (cache.folder / "of the user").write_bytes(b"x" * 99)
    for name in ("1.x", "2.x"):
        cache.path(f"{server}/a", name)
    assert {path.name for path in cache.folder.iterdir()} == {".room.x.lock", "1.lock", "2.lock", "2.x", "of the user"}


def test_a_bound_holds_for_processes_that_download_at_once(tmp_path):
    """Each removes the others' copies, and none of them two at a time."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.bin").write_bytes(bytes(1000))
    with served(source) as url:
        fetch_one = partial(_open_and_close, url, cache)
        with ThreadPoolExecutor(6) as pool:
            for _ in range(5):
                list(pool.map(fetch_one, range(6)))
                assert len(list(cache.glob("*.bin"))) == 1


def _open_and_close(url, cache, number):
    RemoteCache(cache, max_bytes=1).open(f"{url}/{number}.bin", f"{number}.bin").close()
