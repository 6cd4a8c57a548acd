// The page begins.

function start(index = null) {
  element("picture").hidden = element("panel").hidden = !photos.length;
  element("hint").hidden = photos.length > 0 || !page.served;
  if (!photos.length) return;
  fillThumbnails();
  fillControls();
  if (index === null) readHash();
  showChoices();
  if (index !== null) {
    choosePhoto(index);
  } else {
    fillPhoto();
    draw();
  }
}

const scaleCanvas = element("scale"), scalePen = scaleCanvas.getContext("2d");
scalePen.fillStyle = "#808080";  // a photograph of middle grey
scalePen.fillRect(0, 0, 256, 1);
scalePen.globalAlpha = OPACITY;
for (let x = 0; x < 256; x++) {
  scalePen.fillStyle = css(colour(x / 255));
  scalePen.fillRect(x, 0, 1, 1);
}
element("network").textContent = page.network;
element("add").hidden = !page.served;
addEventListener("resize", () => photos.length && draw());
addEventListener("hashchange", () => start());
start();
