"""The page of scripts/visualize.py in a real browser."""
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models
from helpers import ROOT
from helpers.browser import Visit, browsing
from scripts.viewer.page import make_page
from scripts.viewer.photos import Looker
from scripts.viewer.server import Server

pytestmark = pytest.mark.slow

CHURCH = Image.open(ROOT / "docs/church.jpg").convert("RGB")
SIZE = (80, 112)
NETWORKS = ("biformer_nano", "debiformer_nano")


def make_looker(name, input_size=SIZE):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    for parameter in network.parameters():  # wide apart, so that weights are not all alike
        if parameter.ndim > 1:
            parameter.data *= 2
    return Looker(network, input_size)


@pytest.fixture(scope="module")
def browser():
    with browsing() as found:
        yield found


@pytest.fixture(scope="module", params=NETWORKS)
def looked(request, tmp_path_factory):
    """The address of a page of two photographs, and what looked at the first."""
    looker = make_looker(request.param)
    photos = [looker.look(CHURCH, "church.jpg"), looker.look(CHURCH.rotate(90, expand=True), "<b>turned</b>.jpg")]
    path = tmp_path_factory.mktemp("page") / "routes.html"
    path.write_text(make_page(request.param, photos), encoding="utf-8")
    return path.as_uri(), looker


@pytest.fixture
def visit(browser, looked):
    with Visit(browser, looked[0], viewport=dict(width=1200, height=900)) as found:
        found.page.wait_for_selector("#view[data-layer]")
        yield found
        assert not found.said
        assert all(url.startswith(("file:", "data:", "blob:")) for url in found.requests)


def until(page, condition):
    """Wait for a condition: Playwright's own way is to evaluate it in the page, which the page's policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def drawn(page, action, *arguments):
    """What the picture shows after an action: the layer, the query's region and the regions it is routed to."""
    before = page.evaluate("latest")
    action(*arguments)
    until(page, f"latest > {before} && Number(view.dataset.drawing) === latest")
    shown = page.evaluate("({ ...view.dataset })")
    return shown["layer"], int(shown["query"]), [int(region) for region in shown["routed"].split()]


def point_at(page, row, col, stride):
    """Move the pointer to a token of `stride` pixels of the network's input a side; the last may lie half outside."""
    box = page.locator("#view").bounding_box()
    scale = box["width"] / SIZE[1]
    page.mouse.move(0, 0)  # what moves nowhere says nothing
    y, x = (min((at + 0.5) * stride, side - 1) for at, side in zip((row, col), SIZE, strict=True))
    page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)


def test_the_regions_that_light_up_are_those_of_collect_routing(visit, looked):
    """In every block, under the pointer."""
    looker = looked[1]
    images = looker.tensor(CHURCH, "church.jpg")
    routing = models.collect_routing(looker.network, images)
    layers = visit.page.evaluate("photos[0].layers.map((layer) => [layer.module, layer.kind, layer.queries.stride])")
    seen = set()
    for index, (module, kind, stride) in enumerate(layers):
        layer, _, routed = drawn(visit.page, visit.page.evaluate, f"chooseLayer({index})")
        assert layer == f"{module}:{kind}"
        if module not in routing or (kind == "map") == (routing[module].points is not None):
            assert routed == []  # everything attends to everything
            continue
        seen.add(module)
        grid, routes = routing[module].query_grid, routing[module].routes[0]
        for row, col in ((0, 0), (grid.height - 1, grid.width // 2), (grid.height // 2, grid.width - 1)):
            _, query, routed = drawn(visit.page, point_at, visit.page, row, col, stride)
            region = row // grid.region_height * grid.cols + col // grid.region_width
            assert (query, routed) == (region, routes[region].tolist())
    assert seen == set(routing)


def test_attention_is_that_of_the_network(visit, looked):
    """Of single heads and their mean, to a hundredth of the largest weight."""
    looker = looked[1]
    records = models.collect_attention(looker.network, looker.tensor(CHURCH, "church.jpg"))
    kept = [(module, kind, record) for module, found in records.items() for kind, record in found.items()]
    for index, (module, kind, record) in enumerate(kept):
        height, width, heads = record.query.shape[1:4]
        for row, col, head in ((0, 0, -1), (height - 1, width // 2, heads - 1), (height // 2, width - 1, 0)):
            code = f"attention(photos[0].layers[{index}], {row}, {col}, {head})"
            found = visit.page.evaluate(f"{code}.then(({{ keys, weights }}) => [keys, [...weights]])")
            weights = torch.zeros(record.key.shape[1] * record.key.shape[2])
            weights[found[0]] = torch.tensor(found[1])
            expected = record.weights(row, col)[0].flatten(1)
            expected = expected.mean(0) if head < 0 else expected[head]
            assert (weights - expected).abs().max() <= 0.015 * expected.max(), (module, kind)
            assert weights.sum() == pytest.approx(1, abs=1e-5)


def test_keys(visit):
    page = visit.page
    layers = page.evaluate("photos[0].layers.length")
    first = drawn(page, page.keyboard.press, "]")[0]
    assert first == page.evaluate("photos[0].layers[1].module + ':' + photos[0].layers[1].kind")
    assert drawn(page, page.keyboard.press, "[")[0] != first
    assert drawn(page, page.keyboard.press, "[")[0] == page.evaluate(
        f"photos[0].layers[{layers - 1}].module + ':' + photos[0].layers[{layers - 1}].kind"
    )
    drawn(page, page.keyboard.press, "]")
    query = int(page.evaluate("view.dataset.query"))
    columns = page.evaluate("layerNow().queries.cols")
    assert drawn(page, page.keyboard.press, "ArrowLeft")[1] == query - 1
    assert drawn(page, page.keyboard.press, "ArrowDown")[1] == query - 1 + columns
    assert page.evaluate("state.held") and page.get_attribute("#hold", "aria-pressed") == "true"
    token = page.evaluate("[state.row, state.col]")
    drawn(page, page.keyboard.press, "Shift+ArrowRight")
    assert page.evaluate("[state.row, state.col]") == [token[0], token[1] + 1]
    page.keyboard.press("Escape")
    assert not page.evaluate("state.held")
    page.keyboard.press("Space")
    assert page.evaluate("state.held")
    drawn(page, page.keyboard.press, "a")
    assert page.get_attribute("#weights", "aria-pressed") == "false"
    drawn(page, page.evaluate, f"chooseLayer({layers - 1})")
    drawn(page, page.keyboard.press, "h")
    assert page.evaluate("state.head") == 0
    drawn(page, page.keyboard.press, "p")
    assert page.evaluate("state.photo") == 1


def test_every_region_is_reached_by_arrows(visit):
    """From one corner to the other, also where the last regions are smaller; and no further."""
    page = visit.page
    for index in range(page.evaluate("photos[0].layers.length")):
        page.evaluate(f"chooseLayer({index}); state.row = state.col = 0")
        rows, cols = page.evaluate("[layerNow().queries.rows, layerNow().queries.cols]")
        code = "Array.from({ length: %d }, () => (step(%d, %d), regionOf(layerNow().queries, state.row, state.col)))"
        assert page.evaluate(code % (cols, 0, 1)) == [*range(1, cols), cols - 1]
        last = [cols * row + cols - 1 for row in range(rows)]
        assert page.evaluate(code % (rows, 1, 0)) == [*last[1:], last[-1]]
        assert page.evaluate(code % (cols, 0, -1))[-1] == cols * (rows - 1)


def test_a_click_holds_and_another_lets_go(visit):
    page = visit.page
    _, first, _ = drawn(page, point_at, page, 1, 1, 4)
    page.mouse.down()
    page.mouse.up()
    assert page.evaluate("state.held")
    point_at(page, 18, 25, 4)
    page.wait_for_timeout(100)
    assert int(page.evaluate("view.dataset.query")) == first
    page.mouse.down()
    page.mouse.up()
    assert drawn(page, point_at, page, 18, 24, 4)[1] != first


def test_the_link_restores_the_view(browser, visit, looked):
    page = visit.page
    index = page.evaluate("photos[1].layers.findIndex((layer) => layer.stage === 3 && layer.routes !== null)")
    page.evaluate(f"choosePhoto(1); chooseLayer({index}); chooseHead(2); state.row = 4; state.col = 1")
    drawn(page, page.evaluate, "draw()")
    page.evaluate("hold(true)")
    expected = page.evaluate("({ ...state })")
    with Visit(browser, page.url, viewport=dict(width=1200, height=900)) as other:
        other.page.wait_for_selector("#view[data-layer]")
        assert other.page.evaluate("({ ...state })") == expected
        assert other.page.get_attribute("#hold", "aria-pressed") == "true"
        assert not other.said
    for hash_ in ("#photo=9&layer=none&head=99&token=1000,-3", "#token=x&photo=", "#%"):
        with Visit(browser, looked[0] + hash_) as other:
            other.page.wait_for_selector("#view[data-layer]")
            assert not other.said and other.page.evaluate("state.photo") == 0


def test_names_are_text(visit):
    assert visit.page.locator("#photos b").count() == 0
    assert "<b>turned</b>.jpg" in visit.page.locator("#photos").inner_text()
    assert visit.page.locator("#guesses li").count() == 5


def test_the_view_is_copied_or_saved_as_png(visit):
    page = visit.page
    page.evaluate("ClipboardItem = null")
    with page.expect_download() as download:
        page.click("#copy")
    assert download.value.suggested_filename.endswith(".png")
    with Image.open(download.value.path()) as image:
        assert image.width >= 1100 and np.asarray(image.convert("L")).std() > 10
    until(page, "document.getElementById('copied').textContent.startsWith('saved as church-')")


def test_colours_of_attention_grow_in_lightness(visit):
    """Over light and dark photographs alike, and as the scale shows them."""
    luminance = visit.page.evaluate("""["#fff", "#000", "#808080"].map((ground) => {
      const layer = layerNow(), count = layer.keys.width, canvas = new OffscreenCanvas(count * layer.keys.stride, 4);
      const pen = canvas.getContext("2d");
      pen.fillStyle = ground;
      pen.fillRect(0, 0, canvas.width, 4);
      const keys = Array.from({ length: count }, (_, i) => i);
      heat(pen, layer, { keys, weights: keys.map((i) => i / (count - 1)) });
      const row = pen.getImageData(0, 1, canvas.width, 1).data;
      return keys.map((i) => {
        const [r, g, b] = row.slice(4 * (i * layer.keys.stride + 1));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      });
    })""")
    assert all((np.diff(values) > 0).all() and values[-1] > values[0] + 100 for values in luminance)
    scale = visit.page.evaluate("[...scalePen.getImageData(0, 0, 256, 1).data]")
    shown = np.reshape(scale, (256, 4))[[0, -1], :3] @ [0.2126, 0.7152, 0.0722]
    np.testing.assert_allclose(shown, [luminance[2][0], luminance[2][-1]], atol=2)


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (32, 600)], ids=["wide", "portrait", "tall"])
def test_any_shape_fits_the_window(browser, tmp_path, shape):
    """But for the tallest, in which arrows bring the token into sight; and no PNG is of a size that nothing opens."""
    path = tmp_path / "routes.html"
    photo = Image.effect_noise(shape, 50).convert("RGB")
    path.write_text(make_page("biformer_nano", [make_looker("biformer_nano", 32).look(photo, "a.jpg")]))
    with Visit(browser, path.as_uri(), viewport=dict(width=1000, height=600)) as visit:
        page = visit.page
        page.wait_for_selector("#view[data-layer]")
        box, tools = page.locator("#view").bounding_box(), page.locator("#tools").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(shape[0] / shape[1], rel=0.05)
        if shape[1] < 600:
            assert tools["y"] + tools["height"] <= 600
        rows = page.evaluate("layerNow().queries.rows")
        for _ in range(rows):
            page.keyboard.press("ArrowDown")
        until(page, "Number(view.dataset.drawing) === latest")
        top = page.evaluate("view.getBoundingClientRect().top + tokenCentre()[1] / photo().height * view.clientHeight")
        assert 0 < top < 600
        size = page.evaluate("picture().then(createImageBitmap).then(({ width, height }) => [width, height])")
        assert max(size) <= 4096 + 34
        assert not visit.said


def test_choices_keep_the_focus(visit):
    """Radio buttons: arrows go from one to the next."""
    page = visit.page
    for group, chosen in (("layers", "state.layer"), ("heads", "state.head + 1")):
        if group == "heads":
            page.evaluate("chooseLayer(photos[0].layers.length - 1)")
        page.evaluate("hold(true)")
        place = page.evaluate("[state.row, state.col]")
        page.locator(f"#{group} input:checked").focus()
        before = page.evaluate(chosen)
        drawn(page, page.keyboard.press, "ArrowLeft" if group == "layers" and before else "ArrowRight")
        assert page.evaluate(chosen) != before
        assert page.evaluate(f"document.activeElement === document.querySelector('#{group} input:checked')")
        if group == "heads":
            assert page.evaluate("[state.row, state.col]") == place
    drawn(page, page.evaluate, "chooseLayer(0)")
    heads = page.evaluate("layerNow().heads")
    assert page.locator("#heads label:visible").count() == (heads + 1 if heads > 1 else 0)


def test_brackets_that_are_typed_with_other_keys(visit):
    """AltGr, as Windows and as others report it; not Ctrl alone, which is the browser's."""
    page = visit.page

    def press(key, **modifiers):
        page.evaluate("([key, rest]) => document.body.dispatchEvent(new KeyboardEvent('keydown', "
                      "{ key, bubbles: true, ...rest }))", [key, modifiers])
        return page.evaluate("state.layer")

    assert press("]", altKey=True, ctrlKey=True) == 1
    assert press("[", altKey=True) == 0
    assert press("]", ctrlKey=True) == press("]", metaKey=True) == press("h", altKey=True) == 0
    assert press("]") == 1


def test_a_reader_of_screens_hears_where_keys_lead(visit):
    page = visit.page
    drawn(page, page.keyboard.press, "ArrowLeft")
    first = page.text_content("#spoken")
    assert "Region " in first and " regions, the most similar first: 1. (" in first
    drawn(page, page.keyboard.press, "ArrowUp")
    assert page.text_content("#spoken") != first
    said = page.text_content("#spoken")
    page.evaluate("hold(false)")
    drawn(page, point_at, page, 1, 1, 4)
    assert page.text_content("#spoken") == said  # the pointer says nothing


def test_the_place_that_is_held_is_shown_in_the_next_photograph(visit):
    page = visit.page
    page.evaluate("moveTo(0.9 * photo().width, 0.1 * photo().height); hold(true)")
    drawn(page, page.keyboard.press, "p")
    x, y = page.evaluate("(([x, y]) => [x / photo().width, y / photo().height])(tokenCentre())")
    assert x == pytest.approx(0.9, abs=0.1) and y == pytest.approx(0.1, abs=0.1)


def test_the_thumbnail_of_the_photograph_is_in_sight(browser, looked, tmp_path):
    path = tmp_path / "many.html"
    photos = [looked[1].look(CHURCH, f"{i}.jpg") for i in range(2)] * 20
    path.write_text(make_page("x", photos))
    for width in (360, 1200):
        with Visit(browser, path.as_uri() + "#photo=31", viewport=dict(width=width, height=740)) as visit:
            visit.page.wait_for_selector("#view[data-layer]")
            strip, chosen = (visit.page.locator(at).bounding_box() for at in ("#photos", "#photos [aria-pressed=true]"))
            for side, length in (("x", "width"), ("y", "height")):
                assert strip[side] - 1 <= chosen[side]
                assert chosen[side] + chosen[length] <= strip[side] + strip[length] + 1
            assert strip["height"] < 200 and visit.page.evaluate("scrollY") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, looked, scheme):
    """Nothing is wider than the screen; a tap looks and holds."""
    with Visit(browser, looked[0], viewport=dict(width=360, height=740), has_touch=True, color_scheme=scheme) as visit:
        page = visit.page
        page.wait_for_selector("#view[data-layer]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        box = page.locator("#view").bounding_box()
        query = page.evaluate("view.dataset.query")
        swipe(visit, box["x"] + 200, box["y"] + 150, 0, -120)
        until(page, "scrollY > 50")
        assert page.evaluate("view.dataset.query") == query and not page.evaluate("state.held")
        until(page, "(scrollTo(0, 0), scrollY === 0)")
        swipe(visit, box["x"] + 200, box["y"] + 20, 140, 0)
        until(page, "state.held && Number(view.dataset.drawing) === latest")
        assert page.evaluate("state.col * layerNow().queries.stride") > SIZE[1] * 0.9
        page.evaluate("hold(false)")
        _, tapped, _ = drawn(page, page.touchscreen.tap, box["x"] + 5, box["y"] + 5)
        assert tapped == 0 != int(query) and page.evaluate("state.held")
        style = "getComputedStyle(document.body)"
        ground, text = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        brightness = [sum(map(int, colour[4:-1].split(","))) / 765 for colour in (ground, text)]
        assert (brightness[0] > brightness[1]) == (scheme == "light") and abs(brightness[0] - brightness[1]) > 0.7
        assert not visit.said


@pytest.mark.parametrize("name", NETWORKS)
def test_a_photograph_of_384_pixels(browser, tmp_path, name, record_property):
    """Its page has less than 6 MB, and shows what is under the pointer within 100 ms."""
    path = tmp_path / "routes.html"
    path.write_text(make_page(name, [make_looker(name, 384).look(CHURCH, "church.jpg")]), encoding="utf-8")
    assert path.stat().st_size < 6e6
    with Visit(browser, path.as_uri(), viewport=dict(width=1200, height=900)) as visit:
        page = visit.page
        page.wait_for_selector("#view[data-layer]")
        times = page.evaluate("""async () => {
          const times = [], box = view.getBoundingClientRect();
          for (let layer = 0; layer < photos[0].layers.length; layer++) {
            chooseLayer(layer);
            for (let i = 0; i < 5; i++) {
              const drawn = new Promise((done) => view.addEventListener("drawn", done, { once: true }));
              const start = performance.now();
              view.dispatchEvent(new PointerEvent("pointermove",
                { pointerType: "mouse", clientX: box.x + 40 * i + 9 * layer, clientY: box.y + 60 * i + 7 * layer }));
              await drawn;
              times.push(performance.now() - start);
            }
          }
          return times;
        }""")
        record_property("milliseconds", times)
        assert np.median(times) < 100
        assert not visit.said


# --- a server behind the page -----------------------------------------------------------------------------------------


def swipe(visit, x, y, right, down):
    """Move a finger in ten steps, as the browser gets it from a screen."""
    session = visit.context.new_cdp_session(visit.page)

    def send(kind, *points):
        found = [dict(x=at[0], y=at[1]) for at in points]
        session.send("Input.dispatchTouchEvent", dict(type=kind, touchPoints=found))

    send("touchStart", (x, y))
    for i in range(1, 11):
        send("touchMove", (x + right * i / 10, y + down * i / 10))
        visit.page.wait_for_timeout(16)
    visit.page.wait_for_timeout(200)  # at rest, or the page would go on scrolling
    send("touchEnd")


@contextmanager
def serving():
    with Server(make_looker("biformer_nano"), "biformer_nano", [], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_photographs_and_webcam_frames_are_added(browser, tmp_path):
    photo, text = tmp_path / "église.png", tmp_path / "notes.jpg"
    CHURCH.save(photo)
    text.write_text("no photograph")
    with serving() as server, Visit(browser, server.url, viewport=dict(width=1200, height=900)) as visit:
        page = visit.page
        assert page.locator("#view").is_hidden()
        assert "Add photographs" in page.inner_text("#hint")
        page.set_input_files("#files", [text, photo])
        page.wait_for_selector("#view[data-layer]")
        until(page, "document.getElementById('status').textContent.includes('notes.jpg: ')")
        assert "cannot be read" in page.inner_text("#status") or "image" in page.inner_text("#status")
        assert page.locator("#hint").is_hidden()
        page.click("#webcam")
        until(page, "document.getElementById('video').videoWidth > 0")
        page.click("#frame")
        until(page, "photos.length === 2")
        page.wait_for_selector("#photos:visible")
        assert page.locator("#photos button").count() == 2 and "église.png" in page.inner_text("#photos")
        assert [said for said in visit.said if "422" not in said] == []
        page.evaluate("""(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(bytes)], "dropped.png"));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""", [*photo.read_bytes()])
        until(page, "photos.length === 3")
        page.reload()  # what was added is still there
        until(page, "photos.length === 3")
        added = page.evaluate("photos[0]")
    assert added["layers"] == make_looker("biformer_nano").look(CHURCH, "").pop("layers")
