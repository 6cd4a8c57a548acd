// The page begins.

function start(index = null) {
  element("picture").hidden = element("panel").hidden = !photos.length;
  if (!photos.length) return;
  fillThumbnails();
  if (index !== null) {
    choosePhoto(index);
    return;
  }
  readHash();
  fillPhoto();
  fillLayers();
  draw();
}

const scaleCanvas = element("scale"), scalePen = scaleCanvas.getContext("2d");
for (let x = 0; x < 256; x++) {
  scalePen.fillStyle = css(colour(x / 255));
  scalePen.fillRect(x, 0, 1, 1);
}
element("network").textContent = page.network;
element("add").hidden = !page.served;
addEventListener("resize", () => photos.length && draw());
addEventListener("hashchange", () => start());
start();
