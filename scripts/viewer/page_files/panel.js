// What is said beside the picture, and the controls there.

// ---- what is said ------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const place = (columns, region) => `${Math.floor(region / columns) + 1}, ${(region % columns) + 1}`;

function shares(layer, { keys, weights }, routes) {
  const sums = new Map(routes.map((region) => [region, 0]));
  keys.forEach((key, i) => {
    const region = regionOf(layer.keys, Math.floor(key / layer.keys.width), key % layer.keys.width);
    sums.set(region, sums.get(region) + weights[i]);
  });
  return routes.map((region) => sums.get(region));
}

function say(layer, found) {
  const { queries, keys } = layer, routes = routesOf(layer, state.row, state.col);
  const who = layer.kind === "agents" ? "agent" : "token";
  const region = regionOf(queries, state.row, state.col);
  element("asker").textContent = isPerToken(queries)
    ? `${who} ${state.row + 1}, ${state.col + 1}`
    : `Region ${place(queries.cols, region)}, ${who} ${state.row + 1}, ${state.col + 1}`;
  const list = element("routes");
  list.replaceChildren();
  if (routes === null) {
    element("said").textContent = layer.bias
      ? `attends to all ${size(keys)} agents, by what they hold and where they were read`
      : `attends to all ${size(keys)} tokens of the map`;
  } else {
    element("said").textContent = `attends to ${routes.length} of ${keys.rows * keys.cols} regions, the most similar first:`;
    const sums = found.weights ? shares(layer, found, routes) : null;
    list.append(...routes.map((target, rank) => {
      const item = document.createElement("li");
      item.textContent = `${rank + 1}. (${place(keys.cols, target)})${sums ? " " + percent(sums[rank]) : ""}`;
      return item;
    }));
  }
}

// For a reader of screens, after a key: the pointer would have it speak without end.
function sayAloud() {
  const first = [...element("routes").children].slice(0, 3).map((item) => item.textContent);
  element("spoken").textContent = [element("asker").textContent, element("said").textContent, ...first].join(" ");
}

// ---- controls ----------------------------------------------------------------------------------

function layerLabel(layer) {
  if (layer.half === null && layer.kind === "map") return String(layer.block ?? layer.module);
  const half = layer.half === null ? "" : layer.half === "first" ? "a" : "b";
  return `${layer.block}${half}${layer.kind === "agents" ? " agents" : layer.bias ? " tokens" : ""}`;
}

function radio(group, text, choose, title = "") {
  const label = document.createElement("label"), input = document.createElement("input");
  label.className = "button";
  label.title = title;
  input.type = "radio";
  input.name = group;
  input.addEventListener("change", choose);
  label.append(input, text);
  return label;
}

// All photographs have the same layers.
function fillControls() {
  const rows = new Map();
  photo().layers.forEach((layer, index) => {
    const stage = layer.stage ?? "";
    if (!rows.has(stage)) {
      const row = document.createElement("div"), name = document.createElement("span");
      row.className = "stage";
      name.textContent = `Stage ${stage}`;
      row.append(name);
      rows.set(stage, row);
    }
    rows.get(stage).append(radio("layer", layerLabel(layer), () => chooseLayer(index), layer.module));
  });
  element("layers").replaceChildren(...rows.values());
  const most = Math.max(...photo().layers.map((layer) => layer.heads));
  const heads = Array.from({ length: most }, (_, head) => radio("head", String(head + 1), () => chooseHead(head)));
  element("heads").replaceChildren(radio("head", "mean", () => chooseHead(-1)), ...heads);
}

// In place: what has the focus keeps it.
function showChoices() {
  const { heads } = layerNow();
  element("layers").querySelectorAll("input")[state.layer].checked = true;
  element("heads").querySelectorAll("input")[state.head + 1].checked = true;
  [...element("heads").children].forEach((label, index) => { label.hidden = index > heads; });
  element("heads").hidden = element("headTitle").hidden = heads < 2;
}

function fillPhoto() {
  element("guesses").replaceChildren(...photo().guesses.map(([name, probability]) => {
    const item = document.createElement("li"), text = document.createElement("span"), value = document.createElement("span");
    const bar = document.createElement("meter");
    text.textContent = name;
    value.textContent = percent(probability);
    bar.value = probability;
    item.append(text, value, bar);
    return item;
  }));
  const thumbnails = [...element("photos").children];
  thumbnails.forEach((button, index) => button.setAttribute("aria-pressed", String(index === state.photo)));
  if (thumbnails.length) scrollWithin(element("photos"), thumbnails[state.photo].getBoundingClientRect());
  element("size").textContent = `${photo().width} \u00d7 ${photo().height} pixels to the network`;
  view.style.setProperty("--aspect", photo().width / photo().height);
  document.title = `${photo().name}: what ${page.network} attends to`;
  view.setAttribute("aria-label", `${photo().name}, with what ${page.network} attends to`);
}

// Scroll a list, and nothing around it, so far that a box in it is seen.
function scrollWithin(list, box) {
  const seen = list.getBoundingClientRect();
  list.scrollTop += Math.min(box.top - seen.top, 0) + Math.max(box.bottom - seen.bottom, 0);
  list.scrollLeft += Math.min(box.left - seen.left, 0) + Math.max(box.right - seen.right, 0);
}

function fillThumbnails() {
  const nav = element("photos");
  nav.hidden = photos.length < 2;
  nav.replaceChildren(...photos.map((one, index) => {
    const button = document.createElement("button"), image = document.createElement("img"), name = document.createElement("span");
    button.type = "button";
    image.src = one.image;
    image.alt = "";
    image.loading = "lazy";
    name.textContent = `${one.name}: ${one.guesses.length ? one.guesses[0][0] : ""}`;
    button.title = name.textContent;
    button.append(image, name);
    button.addEventListener("click", () => choosePhoto(index));
    return button;
  }));
}

// In its middle, or where another was held.
function choosePhoto(index) {
  const before = photo(), [x, y] = tokenCentre();
  state.photo = index;
  const { width, height } = photo();
  if (state.held) moveTo((x / before.width) * width, (y / before.height) * height);
  else moveTo(width / 2, height / 2);
  fillPhoto();
  draw();
}

function tokenCentre() {
  const { queries } = layerNow(), [x, y, w, h] = boxOf(queries, state.row * queries.width + state.col, true);
  return [x + w / 2, y + h / 2];
}

// The same place of the photograph, in another layer's map.
function chooseLayer(index) {
  const centre = tokenCentre();
  state.layer = (index + photo().layers.length) % photo().layers.length;
  if (state.head >= layerNow().heads) state.head = -1;
  moveTo(...centre);
  showChoices();
  draw();
}

function chooseHead(head) {
  state.head = head;
  showChoices();
  draw();
}

function moveTo(x, y) {
  const { queries } = layerNow();
  const clamp = (value, count) => Math.min(Math.max(Math.floor(value / queries.stride), 0), count - 1);
  state.row = clamp(y, queries.height);
  state.col = clamp(x, queries.width);
}

// To the same token of the next region, or to the next token.
function step(rows, columns, byToken) {
  const { queries } = layerNow();
  const tall = byToken ? 1 : queries.region_height, wide = byToken ? 1 : queries.region_width;
  const next = (at, by, side, count) => {
    const target = at + by * side;
    if (byToken || (target >= 0 && target < count)) return Math.min(Math.max(target, 0), count - 1);
    return by > 0 && Math.floor(at / side) < Math.ceil(count / side) - 1 ? count - 1 : at;  // a last region is smaller
  };
  state.row = next(state.row, rows, tall, queries.height);
  state.col = next(state.col, columns, wide, queries.width);
  draw();
}

function hold(isHeld) {
  state.held = isHeld;
  element("hold").setAttribute("aria-pressed", String(isHeld));
  writeHash();
}

function toggleWeights() {
  state.weights = !state.weights;
  element("weights").setAttribute("aria-pressed", String(state.weights));
  draw();
}
