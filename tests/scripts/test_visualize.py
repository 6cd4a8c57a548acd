"""scripts/visualize.py: what it writes, what it refuses, and the server's manners."""
import base64
import http.client
import json
import re
import shutil
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models
from helpers import ROOT
from ops import AttentionRecord
from scripts import visualize
from scripts.viewer.encoding import TOLERANCE, encode_factors, factors, pack, spread_tokens
from scripts.viewer.page import make_page
from scripts.viewer.photos import Looker, stride_of
from scripts.viewer.server import Server, hosts_of

CHURCH = ROOT / "docs" / "church.jpg"
SMALL = ("--input_size", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def looker():
    torch.manual_seed(0)
    return Looker(timm.create_model("biformer_nano", num_classes=3).eval(), 64)


def unpacked(data):
    """What a browser makes of a pack."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(data)), np.uint8).reshape(2, -1).astype(np.int32)
    return (planes[0] | planes[1] << 8).astype(np.int16)


# --- what a page holds ------------------------------------------------------------------------------------------------


def test_numbers_are_packed():
    values = torch.tensor([0.0, 0.26, -0.24, 1e9, -1e9, 100.125])
    assert unpacked(pack(values, 0.25)).tolist() == [0, 1, -1, 32767, -32767, 400]


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_factors_give_the_weights(spread):
    """For keys that are nearly alike, and for such as are far apart."""
    torch.manual_seed(0)
    record = AttentionRecord(spread * torch.randn(1, 9, 7, 2, 32), spread * torch.randn(1, 5, 8, 2, 32) + 3, 32**-0.5)
    query, key = factors(record)
    logits = torch.einsum("ndq,ndk->nqk", query, key).softmax(-1)
    expected = torch.stack([record.weights(i // 7, i % 7)[0].flatten(1) for i in range(63)], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-5)
    encoded = encode_factors(record)
    whole = torch.from_numpy(unpacked(encoded["data"])).float().view(2, encoded["rank"], 63 + 40) * encoded["step"]
    found = torch.einsum("ndq,ndk->nqk", whole[..., :63], whole[..., 63:]).softmax(-1)
    assert encoded["error"] <= TOLERANCE
    assert ((found - expected).abs().amax(-1) / expected.amax(-1)).max() < 1.5 * TOLERANCE  # all tokens, not samples


@pytest.mark.parametrize("height,width", [(96, 96), (48, 48), (24, 24), (14, 14), (1, 60), (60, 1)])
def test_errors_are_measured_all_over_the_map(height, width):
    """In all columns and rows alike: a multiple of the width between two samples would leave them in one column."""
    tokens = spread_tokens(height, width)
    assert len(set(tokens)) == len(tokens) >= min(48, height * width) // 2
    for at, count in zip(zip(*tokens, strict=True), (height, width), strict=True):
        assert len(set(at)) >= min(count, 12)
        halves = sum(index < count / 2 for index in at)
        assert count == 1 or abs(2 * halves - len(at)) <= len(at) / 5


def test_weights_of_sharp_attention_are_as_near_as_is_possible():
    """No step is fine and wide enough for all of it; the best one is for most."""
    torch.manual_seed(0)
    record = AttentionRecord(40 * torch.randn(1, 14, 14, 1, 32), 40 * torch.randn(1, 14, 14, 1, 32), 32**-0.5)
    encoded = encode_factors(record)
    rank = encoded["rank"]
    whole = torch.from_numpy(unpacked(encoded["data"])).float().view(1, rank, 2 * 196) * encoded["step"]
    found = torch.einsum("ndq,ndk->nqk", whole[..., :196], whole[..., 196:]).softmax(-1)
    expected = torch.stack([record.weights(i // 14, i % 14)[0].flatten(1) for i in range(196)], 1)
    errors = (found - expected).abs().amax(-1) / expected.amax(-1)
    assert errors.quantile(0.9) < 0.1


@pytest.mark.parametrize("size,shape,stride", [
    ((64, 64), (16, 16), 4), ((75, 110), (19, 28), 4), ((75, 110), (3, 4), 32), ((384, 577), (98, 147), 4),
    ((32, 32), (1, 1), 32),
])
def test_strides(size, shape, stride):
    assert stride_of(size, shape) == stride


def test_photographs_keep_their_shape(looker):
    assert looker.size_of(Image.new("RGB", (300, 150)), "") == (64, 128)
    assert looker.size_of(Image.new("RGB", (1000, 10)), "") == (64, 6400)
    assert Looker(looker.network, (96, 64)).size_of(Image.new("RGB", (300, 150)), "") == (96, 64)


def test_what_a_page_holds(looker):
    photo = looker.look(Image.open(CHURCH).convert("RGB"), "church.jpg")
    json.dumps(photo)
    assert (photo["height"], photo["width"]) == (64, 96) and len(photo["guesses"]) == 3
    routing = models.collect_routing(looker.network, looker.tensor(Image.open(CHURCH).convert("RGB"), "church.jpg"))
    held = {layer["module"]: layer for layer in photo["layers"] if layer["routes"] is not None}
    assert {name: found.routes[0].tolist() for name, found in routing.items()} == {
        name: layer["routes"] for name, layer in held.items()
    }
    places = [(layer["stage"], layer["block"]) for layer in photo["layers"]]
    assert places == [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (4, 1)]


def test_the_page_stands_alone(looker):
    name = "</script><script>alert(1)</script>.jpg"
    page = make_page("</script><b>", [looker.look(Image.new("RGB", (64, 64)), name)])
    assert page.count("</script>") == 2 and "alert(1)" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    data = re.search(r'<script type="application/json" id="data">\n(.*)\n</script>', page)[1]
    assert json.loads(data)["photos"][0]["name"] == name


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_of_several_photographs(tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    shutil.copy(CHURCH, photos / "more" / "church.jpg")
    Image.new("L", (90, 50), 100).save(photos / "grey.png")
    (photos / "broken.jpg").write_bytes(CHURCH.read_bytes()[:500])
    Image.new("RGB", (9000, 1)).save(photos / "line.png")
    page = tmp_path / "routes.html"
    assert visualize.main([str(photos), *SMALL, "--routes_only", "--output", str(page)]) == 1
    said = capsys.readouterr().err
    assert "broken.jpg" in said and "line.png: 576000 x 64 pixels are too many, give fewer" in said
    assert "error: 2 of 4 images could not be shown" in said
    assert f"{page}: 2 photographs, 0." in said
    names = re.findall(r'"name":"([\w.]+)"', page.read_text())
    assert names == ["grey.png", "church.jpg"] and '"data":null' in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "pdf", "svg"])
@pytest.mark.parametrize("model", ["biformer_nano", "debiformer_nano"])
def test_a_figure(tmp_path, kind, model):
    path = tmp_path / f"figure.{kind}"
    command = [str(CHURCH), *SMALL, "--model", model, "--figure", str(path), "--query", "100", "319"]
    assert visualize.main(command) == 0
    head = path.read_bytes()[:100]
    assert {"png": b"\x89PNG", "jpg": b"JFIF", "jpeg": b"JFIF", "pdf": b"%PDF", "svg": b"<?xml"}[kind] in head


@pytest.mark.slow
@pytest.mark.parametrize("photo", [(1200, 90), (90, 1200)], ids=["wide", "tall"])
def test_a_figure_of_a_narrow_photograph(tmp_path, photo):
    """Is no larger than a page, and has room for the predictions."""
    Image.effect_noise(photo, 50).convert("RGB").save(tmp_path / "narrow.png")
    command = [str(tmp_path / "narrow.png"), *SMALL, "--figure", str(tmp_path / "f.png"), "--query", "80", "80"]
    assert visualize.main(command) == 0
    with Image.open(tmp_path / "f.png") as figure:
        assert 350 < figure.height < 2400 and figure.width < 2400


@pytest.mark.slow
def test_a_name_is_printed_without_its_escape_codes(tmp_path, capsys):
    path = tmp_path / "esc\033[31mred.jpg"
    shutil.copy(CHURCH, path)
    assert visualize.main([str(path), *SMALL, "--routes_only", "--output", str(tmp_path / "routes.html")]) == 0
    assert "\033" not in capsys.readouterr().err


def test_what_can_be_read_is_served(tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.jpg").write_bytes(CHURCH.read_bytes()[:500])
    served = []
    monkeypatch.setattr("scripts.viewer.server.serve", lambda looker, name, photos, port: served.extend(photos))
    assert visualize.main([str(CHURCH), str(tmp_path / "broken.jpg"), *SMALL, "--serve", "0"]) == 0
    assert [photo["name"] for photo in served] == ["church.jpg"]
    said = capsys.readouterr().err
    assert "broken.jpg" in said and "1 of 2 images could not be shown" in said


@pytest.mark.parametrize("arguments,code,message", [
    ([], 2, "give photographs or folders of them, or --serve PORT"),
    (["none.jpg"], 1, "none.jpg: no such file or folder"),
    ([CHURCH, "--model", "bvit_5m"], 2, "bvit_5m has no routed attention; BiFormer and DeBiFormer have"),
    ([CHURCH, "--model", "biformer_nan"], 2, "did you mean biformer_nano"),
    ([CHURCH, "--model", "debiformer_tiny"], 1, "--checkpoint takes a file of weights"),
    ([CHURCH, "--checkpoint", "none.pth"], 1, "none.pth"),
    ([CHURCH, "--input_size", "8"], 1, "the network takes images from 32 pixels a side, not 8"),
    ([CHURCH, "--figure", "a.png"], 2, "--figure and --query go together"),
    ([CHURCH, "--figure", "a.gif", "--query", 1, 1], 2, "a.gif is none of the formats of a figure: .png, .jpg"),
    ([CHURCH, CHURCH, "--figure", "a.png", "--query", 1, 1], 1, "--figure draws one photograph, not 2"),
    ([CHURCH, "--figure", "a.png", "--query", 1, 1, "--routes_only"], 2, "--routes_only is of a page"),
    ([CHURCH, "--figure", "a.png", "--query", 1, 1, "--output", "a.html"], 2, "--output and --figure are mutually"),
    (["--serve", 0, "--output", "a.html"], 2, "--output and --serve are mutually exclusive"),
    ([CHURCH, "--output", "folder"], 2, "folder is a folder"),
    ([CHURCH, "--figure", "folder.png", "--query", 1, 1], 2, "folder.png is a folder"),
    (["line.png", "--figure", "a.png", "--query", 0, 1], 1, "line.png: 480000 x 160 pixels are too many, give fewer"),
    ([CHURCH, "--figure", "a.png", "--query", 213, 0], 1, "lies outside of a photograph of 213 rows and 320 columns"),
    ([CHURCH, "--figure", "a.png", "--query", 1, 1, "--serve", 0], 2, "mutually exclusive"),
    (["--serve", 70000], 1, "cannot serve on port 70000"),
])
def test_what_is_refused(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (9000, 3)).save("line.png")
    try:
        status = visualize.main([*map(str, arguments), "--device", "cpu"])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == code and message in said and "Traceback" not in said


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(looker):
    with Server(looker, "biformer_nano", [], 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host,is_ours", [
    ("127.0.0.1", True), ("localhost", True), ("127.0.0.1:80", True), ("127.0.0.1:81", False), ("evil.example", False),
])
def test_browsers_leave_out_port_80(host, is_ours):
    assert (host in hosts_of(80)) == is_ours


def test_no_other_page_may_frame_it(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    reply = connection.getresponse()
    assert reply.getheader("X-Frame-Options") == "DENY" and reply.getheader("X-Content-Type-Options") == "nosniff"
    connection.close()


def ask(port, method, path, body=None, **headers):
    """(status, what it says)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    is_json = reply.getheader("Content-Type") == "application/json"
    return reply.status, json.loads(content) if is_json else content.decode()


def test_it_takes_photographs(port):
    status, photo = ask(port, "POST", "/photos", CHURCH.read_bytes(), X_Name="une%20%C3%A9glise.jpg")
    assert status == 201 and photo["name"] == "une église.jpg" and len(photo["layers"]) == 6
    status, page = ask(port, "GET", "/")
    assert status == 200 and "une \\u00e9glise.jpg" in page


def test_a_browser_that_goes_away_is_no_error(port, capfd):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
        connection.sendall(b"GET / HT")
        time.sleep(0.2)
    assert ask(port, "GET", "/")[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("method,path,body,headers,status,message", [
    ("GET", "/", None, dict(Host="evil.example"), 403, "this machine alone"),
    ("POST", "/photos", b"x", dict(Origin="http://evil.example"), 403, "this machine alone"),
    ("POST", "/photos", b"x", dict(Origin="null"), 403, "this machine alone"),
    ("GET", "/etc/passwd", None, {}, 404, "there is one page"),
    ("POST", "/", b"x", {}, 404, "/photos"),
    ("POST", "/photos", b"no image", dict(X_Name="a.jpg"), 422, "a.jpg"),
    ("POST", "/photos", b"x", dict(Content_Length="200000000"), 413, "more than 100 MB"),
    ("POST", "/photos", b"x", dict(Content_Length="-1"), 411, "how long"),
])
def test_what_the_server_refuses(port, method, path, body, headers, status, message):
    found, said = ask(port, method, path, body, **headers)
    assert found == status and message in said["error"]
