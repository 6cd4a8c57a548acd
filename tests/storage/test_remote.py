"""storage/remote.py: copies that are intact or not there; shards and weights test the rest of it."""
import base64
import errno
import hashlib
import math
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from helpers.web import answered, served
from storage import locks, remote
from storage.remote import HashMismatchError, RemoteCache, TransferError, public, read_bytes, sha256_of


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
        monkeypatch.setattr(locks, "fcntl", None)
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


# --- copies that a disk has damaged -----------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, 3)


def flip_a_bit(path):
    path.write_bytes(b"bontent")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("is_hash_known", [True, False])
def test_a_damaged_copy_is_downloaded_again_by_the_next_run(server, tmp_path, damage, is_hash_known):
    """Without a hash that was asked for, it is compared with what was downloaded."""
    folder, digest = tmp_path / "cache", sha256_of(tmp_path / "a") if is_hash_known else None
    copy = RemoteCache(folder).path(f"{server}/a", "a.x", digest)
    damage(copy)
    downloads = []
    cache = RemoteCache(folder, on_download=downloads.append)
    for _ in range(2):
        with cache.open(f"{server}/a", "a.x", digest) as file:
            assert file.read() == b"content"
    assert len(downloads) == 1 and sorted(path.name for path in folder.iterdir()) == ["a.lock", "a.x"]


def test_a_copy_is_compared_once_by_all_processes_of_a_run(server, tmp_path, monkeypatch):
    RemoteCache(tmp_path / "cache").path(f"{server}/a", "a.x")
    compared, compare = [], remote._sha256
    monkeypatch.setattr(remote, "_sha256", lambda file: compared.append(file) or compare(file))
    run = RemoteCache(tmp_path / "cache")
    processes = [pickle.loads(pickle.dumps(run)) for _ in range(3)]
    for process in processes:
        assert process.path(f"{server}/a", "a.x").exists()
    assert len(compared) == 1


def test_a_copy_whose_hash_was_never_noted_is_kept(server, tmp_path):
    """Of an earlier release, or put there by hand; from now on its hash is known."""
    folder, downloads = tmp_path / "cache", []
    folder.mkdir()
    (folder / "a.x").write_bytes(b"by hand")
    for _ in range(2):
        assert RemoteCache(folder, on_download=downloads.append).path(f"{server}/a", "a.x").read_bytes() == b"by hand"
    truncate(folder / "a.x")
    assert RemoteCache(folder, on_download=downloads.append).path(f"{server}/a", "a.x").read_bytes() == b"content"
    assert len(downloads) == 1


def test_a_cache_that_can_only_be_read_serves_as_well(server, tmp_path, monkeypatch):
    copy = RemoteCache(tmp_path / "cache").path(f"{server}/a", "a.x")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for module in (locks, remote):
        monkeypatch.setattr(module, "open_lock", refuse)
    run = RemoteCache(copy.parent)
    assert run.path(f"{server}/a", "a.x").read_bytes() == b"content"
    monkeypatch.setattr(remote, "_sha256", None)
    assert run.path(f"{server}/a", "a.x").exists(), "compared once a process"


# --- what is not ours -------------------------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(server, tmp_path):
    folder, others = tmp_path / "cache", tmp_path / "of somebody else"
    folder.mkdir()
    others.write_bytes(b"precious")
    (folder / "a.part").symlink_to(others)
    assert RemoteCache(folder).path(f"{server}/a", "a.x").read_bytes() == b"content"
    (folder / "b.lock").symlink_to(others)
    (folder / ".room.x.lock").symlink_to(others)
    for name, bound, link in (("b.x", math.inf, "b.lock"), ("c.x", 99, ".room.x.lock")):
        with pytest.raises(OSError, match=f"{link} is a symbolic link; remove it"):
            RemoteCache(folder, bound).path(f"{server}/a", name)
    assert others.read_bytes() == b"precious"


def test_a_lock_keeps_what_it_holds(server, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "a.lock").write_bytes(b"precious")
    for _ in range(2):
        assert RemoteCache(folder).path(f"{server}/a", "a.x").read_bytes() == b"content"
    assert (folder / "a.lock").read_bytes() == b"precious"


# --- servers that send too much ---------------------------------------------------------------------------------------


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**20))


def boundless(handler):
    """In chunks, which have no length in all either."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"100000\r\n" + bytes(2**20) + b"\r\n")


def boastful(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**15))
    handler.end_headers()
    handler.wfile.write(bytes(100))


@pytest.mark.parametrize("answer", [endless, boundless])
def test_a_server_that_never_ends(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(remote, "MOST_IN_MEMORY", 3e6)
    monkeypatch.setattr(remote, "MOST_OF_UNKNOWN_SIZE", 5e6)
    cache = RemoteCache(tmp_path / "cache")
    with answered(answer) as url:
        with pytest.raises(TransferError, match=r"sends more than the 3\.0 MB"):
            read_bytes(url)
        with pytest.raises(TransferError, match=r"sends more than the 5\.0 MB"):
            cache.open(url, "a.x")
        with pytest.raises(TransferError, match=r"sends another size than its 2\.0 MB"):
            cache.open(url, "a.x", size=2 * 10**6)
    assert [path.name for path in cache.folder.iterdir()] == ["a.lock"]


def test_a_file_too_large_for_its_place_is_not_begun(tmp_path, monkeypatch):
    cache = RemoteCache(tmp_path / "cache")
    with answered(boastful) as url:
        with pytest.raises(TransferError, match=r"its 1,000,000,000\.0 MB are more than the 64\.0 MB that such a file"):
            read_bytes(url)
        with pytest.raises(TransferError, match=rf",000\.0 MB are more than the .* MB that are free in {tmp_path}"):
            cache.open(url, "a.x")
        with pytest.raises(TransferError, match=rf"has {10**15} bytes, not 100"):
            cache.open(url, "a.x", size=100)


def test_a_full_disk_says_so_before_a_download(server, tmp_path, monkeypatch):
    cache = RemoteCache(tmp_path / "cache")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=6))
    with pytest.raises(TransferError, match=r"are more than the 0\.0 MB that are free"):
        cache.open(f"{server}/a", "a.x")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(total=0, free=0))
    assert cache.path(f"{server}/a", "a.x").exists(), "a file system that does not say"


@pytest.mark.parametrize("length", ["-5", "many", "9" * 10000, "\u00b2", ""])
def test_a_length_that_is_no_number(length):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(b"content")

    with answered(answer) as url:
        assert read_bytes(url) == b"content"


# --- passwords and signatures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source,shown", [
    ("https://user:pass@host/x?X-Amz-Signature=1#sha256=12345678", "https://***@host/x?***#sha256=12345678"),
    ("HTTP://a@b@host:80/@x/y@z.pth", "HTTP://***@host:80/@x/y@z.pth"),
    ("https://host/x.pth", "https://host/x.pth"), ("https://host/x?", "https://host/x?"),
    ("https://user:pass@[broken/x", "https://***@[broken/x"),
    ("what?/a@b.pth", "what?/a@b.pth"), ("C:\\x?y", "C:\\x?y"), ("", ""),
])
def test_what_is_shown_of_an_address(source, shown):
    assert public(source) == public(shown) == shown


def test_a_password_is_sent_to_its_server_alone():
    seen = []

    def record(handler):
        seen.append(handler.headers["Authorization"])
        handler.send_response(200)
        handler.end_headers()

    with answered(record) as other:
        def redirect(handler):
            seen.append(handler.headers["Authorization"])
            handler.send_response(302)
            handler.send_header("Location", other)
            handler.end_headers()

        with answered(redirect) as url:
            read_bytes(url.replace("//", "//user:p%40ss@"))
    assert seen == [f"Basic {base64.b64encode(b'user:p@ss').decode()}", None]


@pytest.mark.parametrize("url", [
    "http://user:secret@host:port/x", "http://host/a b?secret", "http://[secret/x", "http://secret..host/x",
])
def test_no_error_shows_a_password(url):
    with pytest.raises(TransferError) as error:
        read_bytes(url)
    assert "secret" not in str(error.value) and not error.value.transient


def test_what_is_left_of_a_signed_address_is_not_fetched():
    with pytest.raises(TransferError, match="password or signature is not kept: give the whole address again"):
        read_bytes(public("http://127.0.0.1/x?signature=1"))
