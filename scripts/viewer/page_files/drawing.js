// The photograph with what a token attends to.

// ---- colours -----------------------------------------------------------------------------------

// Viridis, which grows evenly in lightness and is told apart by the colour-blind.
const VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((value, i) => Math.round(value + (VIRIDIS[low + 1][i] - value) * (at - low)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
// How much of the heat map is its colours; the rest is the photograph. The same everywhere, or light parts of the
// photograph would change which of two colours is the lighter.
const OPACITY = 0.78;
const QUERY = "#ff5fa2";

// ---- what is drawn -----------------------------------------------------------------------------

const photo = () => photos[state.photo];
const layerNow = () => photo().layers[state.layer];

// A region or token of a map as [left, top, width, height] in pixels of the network's input, without its padding.
function boxOf(map, region, perToken = false) {
  const columns = perToken ? map.width : map.cols;
  const tall = perToken ? 1 : map.region_height, wide = perToken ? 1 : map.region_width;
  const top = Math.floor(region / columns) * tall * map.stride, left = (region % columns) * wide * map.stride;
  const bottom = Math.min(top + tall * map.stride, map.height * map.stride, photo().height);
  const right = Math.min(left + wide * map.stride, map.width * map.stride, photo().width);
  return [left, top, right - left, bottom - top];
}

function outline(pen, box, width, inner, outer) {
  pen.strokeStyle = outer;
  pen.lineWidth = 1.9 * width;
  pen.strokeRect(...box);
  pen.strokeStyle = inner;
  pen.lineWidth = width;
  pen.strokeRect(...box);
}

// Everything outside of some boxes in the dark.
function dim(pen, boxes, darkness = 68) {
  pen.fillStyle = `rgb(0 0 0 / ${darkness}%)`;
  pen.beginPath();
  pen.rect(0, 0, photo().width, photo().height);
  for (const [x, y, w, h] of boxes) {  // the other way round, which leaves them out
    pen.moveTo(x, y);
    pen.lineTo(x, y + h);
    pen.lineTo(x + w, y + h);
    pen.lineTo(x + w, y);
    pen.closePath();
  }
  pen.fill("nonzero");
}

function heat(pen, layer, { keys, weights }) {
  const map = layer.keys, largest = Math.max(...weights) || 1;
  const small = new OffscreenCanvas(map.width, map.height), inner = small.getContext("2d");
  const pixels = inner.createImageData(map.width, map.height);
  keys.forEach((key, i) => {
    pixels.data.set([...colour(weights[i] / largest), 255 * OPACITY], 4 * key);
  });
  inner.putImageData(pixels, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, map.width * map.stride, map.height * map.stride);
}

function label(pen, text, x, y, pixel) {
  pen.font = `600 ${11 * pixel}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  pen.lineWidth = 3 * pixel;
  pen.strokeStyle = "rgb(0 0 0 / 80%)";
  pen.strokeText(text, x + 3 * pixel, y + 2 * pixel);
  pen.fillStyle = "#fff";
  pen.fillText(text, x + 3 * pixel, y + 2 * pixel);
}

const onPhoto = ([y, x]) => [((x + 1) / 2) * photo().width, ((y + 1) / 2) * photo().height];

function dot(pen, [x, y], radius, fill, pixel) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fillStyle = fill;
  pen.fill();
  pen.strokeStyle = "#000";
  pen.lineWidth = 1.2 * pixel;
  pen.stroke();
}

const groupsShown = (layer) =>
  state.head < 0 ? [...layer.points.keys()] : [groupOf(layer, state.head)];

// Agents that look: each one's point, and how far it lies from the middle of its cell.
function drawOffsets(pen, layer, chosen, pixel) {
  for (const group of groupsShown(layer)) {
    layer.points[group].forEach((point, agent) => {
      const [left, top, width, height] = boxOf(layer.queries, agent, true);
      const [x, y] = onPhoto(point);
      const isChosen = agent === chosen;
      pen.strokeStyle = isChosen ? QUERY : "rgb(255 255 255 / 40%)";
      pen.lineWidth = (isChosen ? 2.5 : 1) * pixel;
      pen.beginPath();
      pen.moveTo(left + width / 2, top + height / 2);
      pen.lineTo(x, y);
      pen.stroke();
      dot(pen, [x, y], (isChosen ? 5 : 2) * pixel, isChosen ? QUERY : "#fff", pixel);
    });
  }
}

// Agents that are looked at: the more weight, the larger.
function drawPull(pen, layer, { keys, weights }, pixel) {
  const largest = weights ? Math.max(...weights) : 1;
  const groups = groupsShown(layer);
  keys.forEach((key, i) => {
    const share = weights ? weights[i] / largest : 0.3;
    for (const group of groups) dot(pen, onPhoto(layer.points[group][key]), (1.5 + 7 * Math.sqrt(share)) * pixel, css(colour(share)), pixel);
  });
}

function drawRoutes(pen, layer, routes, pixel) {
  routes.map((region, rank) => [region, rank]).reverse().forEach(([region, rank]) => {
    const [x, y, w, h] = boxOf(layer.keys, region);
    const inset = 1.5 * pixel;
    const strength = 100 - (65 * rank) / routes.length;
    outline(pen, [x + inset, y + inset, w - 2 * inset, h - 2 * inset], 2 * pixel, `rgb(255 255 255 / ${strength}%)`, "rgb(0 0 0 / 60%)");
    if (Math.min(w, h) > 17 * pixel) label(pen, String(rank + 1), x, y, pixel);
  });
}

const images = new Map();

function imageOf(one) {
  if (!images.has(one)) {
    images.set(one, new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.src = one.image;
    }));
  }
  return images.get(one);
}

// The view on a canvas whose `scale` pixels show one of the network's input.
function paint(pen, scale, image, layer, found, shade = 1) {
  const pixel = shade / scale;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.imageSmoothingEnabled = true;
  pen.drawImage(image, 0, 0, photo().width, photo().height);
  const { queries, keys } = layer, region = regionOf(queries, state.row, state.col);
  const routes = routesOf(layer, state.row, state.col), token = state.row * queries.width + state.col;
  const isPulled = layer.points !== null && layer.bias !== null;
  if (routes !== null) dim(pen, routes.map((one) => boxOf(keys, one)));
  else dim(pen, [], isPulled ? 40 : 68);
  if (isPulled) drawPull(pen, layer, found, pixel);
  else if (state.weights && found.weights) heat(pen, layer, found);
  if (routes !== null) drawRoutes(pen, layer, routes, pixel);
  if (layer.points !== null && !isPulled) drawOffsets(pen, layer, token, pixel);
  if (!isPerToken(queries)) outline(pen, boxOf(queries, region), 2.5 * pixel, "#fff", "#000");
  outline(pen, boxOf(queries, token, true), 1.5 * pixel, QUERY, "#000");
}
