"""storage/weights.py: checkpoints from URLs, once for all processes, compared with their hashes."""
import errno
import hashlib
import multiprocessing
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn

from helpers.web import served
from storage import remote, weights
from storage.weights import UnreadableError, WeightsError, check_finite, fetch, read_checkpoint


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder; downloads that fail are tried again without waiting."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub"


def test_a_url_is_downloaded_once(tmp_path, hub, capfd):
    """Two files of one name at different addresses are two files in the cache."""
    for place in "ab":
        (tmp_path / place).mkdir()
        torch.save({"place": place}, tmp_path / place / "content")
    with served(tmp_path) as url:
        for place in "ab":
            assert read_checkpoint(f"{url}/{place}/content")["place"] == place
    assert capfd.readouterr().err.count("downloading http") == 2
    assert read_checkpoint(f"{url}/a/content")["place"] == "a", "the server is gone"
    with pytest.raises(WeightsError, match=r"http.*/c.pth: cannot be downloaded: .*refused"):
        read_checkpoint(f"{url}/c.pth")


def test_a_cache_of_ones_own(tmp_path, hub):
    torch.save({"epoch": 1}, tmp_path / "c.pth")
    for _ in range(2):
        assert read_checkpoint((tmp_path / "c.pth").as_uri(), tmp_path / "own")["epoch"] == 1
    assert len(list((tmp_path / "own" / "checkpoints").glob("*-c.pth"))) == 1 and not hub.exists()


def test_a_bad_download_is_not_kept(tmp_path, hub):
    page = tmp_path / "c.pth"
    page.write_text("no")
    with served(tmp_path) as url:
        with pytest.raises(WeightsError, match="not a PyTorch checkpoint"):
            read_checkpoint(f"{url}/c.pth")
        torch.save({"epoch": 1}, page)
        assert read_checkpoint(f"{url}/c.pth")["epoch"] == 1


def test_a_copy_that_the_system_cannot_read_is_kept(tmp_path, hub, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    torch.save({"epoch": 1}, tmp_path / "c.pth")
    with served(tmp_path) as url:
        copy = fetch(f"{url}/c.pth")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", fail)
            with pytest.raises(UnreadableError):
                read_checkpoint(f"{url}/c.pth")
    assert copy.exists() and read_checkpoint(f"{url}/c.pth")["epoch"] == 1


def test_a_download_is_compared_with_its_hash(tmp_path, hub):
    torch.save({"epoch": 1}, tmp_path / "c.pth")
    digest = hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest()
    with served(tmp_path) as server:
        url = f"{server}/c.pth"
        for expected in (digest, digest[:8], digest.upper()):
            assert read_checkpoint(f"{url}#sha256={expected}")["epoch"] == 1
        with pytest.raises(WeightsError, match=r"cannot be downloaded: .*invalid hash value"):
            read_checkpoint(f"{url}#sha256={digest[::-1]}")


@pytest.mark.parametrize("fragment", [
    "", "sha256:{}", "SHA256={}", "md5={}", "sha256=", "sha256={:.2}", "sha256={:.7}", "sha256={}0", "sha256={:.7}g",
    " sha256={}", "sha256={} ", "sha256={}#", "{}",
])
def test_a_hash_in_any_other_form_is_refused(hub, fragment):
    """And is not passed over: whoever gives one relies on it."""
    digest = hashlib.sha256(b"").hexdigest()
    with pytest.raises(WeightsError, match=r"^http://host/c.pth#.*: after # must stand sha256= and the file's SHA-256"):
        fetch(f"http://host/c.pth#{fragment.format(digest)}")
    assert not hub.exists()


def test_a_damaged_copy_is_downloaded_again_at_the_next_start(tmp_path, hub, capfd):
    torch.save({"epoch": 1}, tmp_path / "c.pth")
    digest = hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest()
    with served(tmp_path) as url:
        for source in (f"{url}/c.pth", f"{url}/c.pth#sha256={digest[:8]}"):
            copy = fetch(source)
            os.truncate(copy, 3)
            weights._cache_in.cache_clear()  # of a program that starts now
            assert read_checkpoint(source)["epoch"] == 1
    assert capfd.readouterr().err.count("downloading") == 4


def test_a_signature_is_not_shown_and_need_not_be_given_again(tmp_path, hub, monkeypatch, capfd):
    """Where a hash says which file it is; without, another query may be another file."""
    torch.save({"epoch": 1}, tmp_path / "c.pth")
    digest = hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest()
    with served(tmp_path) as url:
        signed = url.replace("//", "//user:secret@")
        copies = {fetch(f"{signed}/c.pth?secret={number}#sha256={digest}") for number in range(2)}
        others = {fetch(f"{signed}/c.pth?secret={number}") for number in range(2)}
        assert len(copies) == 1 and len(others) == 2
        assert fetch(remote.public(f"{signed}/c.pth?secret=2#sha256={digest}")) in copies
        with pytest.raises(WeightsError) as error:
            fetch(f"{signed}/d.pth?secret=1")
    model = nn.Linear(1, 1)
    model.bias.data.fill_(torch.nan)
    with pytest.raises(WeightsError) as other:
        check_finite(model, f"{signed}/c.pth?secret=1")
    shown = f"{capfd.readouterr().err} {error.value} {other.value} {copies} {others}"
    assert "secret" not in shown and "c.pth?***" in shown


def test_a_folder_that_cannot_be_written(tmp_path, hub):
    hub.touch()
    with served(tmp_path) as url, pytest.raises(WeightsError, match=r"cannot be downloaded: .*Not a directory"):
        fetch(f"{url}/hub")


def fetch_and_report(url, start, found):
    start.wait(30)
    found.put(fetch(url).read_bytes())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_that_ask_at_once_download_once(hub):
    """As the ranks of a run do; each would else wait for as many copies over one line."""
    content, requests = os.urandom(1000), []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(0.5)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        ranks = [context.Process(target=fetch_and_report, args=(url, start, found), daemon=True) for _ in range(4)]
        for rank in ranks:
            rank.start()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [found.get(timeout=60) for _ in ranks] == [content] * 4
        server.shutdown()
    for rank in ranks:
        rank.join(10)
    assert requests == ["/weights.pth"]
    assert sorted(path.suffix for path in (hub / "checkpoints").iterdir()) == [".lock", ".pth"]
