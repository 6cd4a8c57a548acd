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
    return;
  }
  element("said").textContent = `attends to ${routes.length} of ${keys.rows * keys.cols} regions, the most similar first:`;
  const sums = found.weights ? shares(layer, found, routes) : null;
  routes.forEach((target, rank) => {
    const item = document.createElement("li"), swatch = document.createElement("i");
    swatch.style.background = rankColour(rank, routes.length);
    item.append(swatch, `${rank + 1}. (${place(keys.cols, target)})${sums ? " " + percent(sums[rank]) : ""}`);
    list.append(item);
  });
}

// ---- controls ----------------------------------------------------------------------------------

function layerLabel(layer) {
  if (layer.half === null && layer.kind === "map") return String(layer.block ?? layer.module);
  const half = layer.half === null ? "" : layer.half === "first" ? "a" : "b";
  return `${layer.block}${half}${layer.kind === "agents" ? " agents" : layer.bias ? " tokens" : ""}`;
}

function radio(text, isChosen, choose, title = "") {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.title = title;
  button.setAttribute("role", "radio");
  button.setAttribute("aria-checked", String(isChosen));
  button.addEventListener("click", choose);
  return button;
}

function fillLayers() {
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
    rows.get(stage).append(radio(layerLabel(layer), index === state.layer, () => chooseLayer(index), layer.module));
  });
  element("layers").replaceChildren(...rows.values());
  const layer = layerNow();
  element("heads").hidden = element("headTitle").hidden = layer.heads < 2;
  const heads = [radio("mean", state.head < 0, () => chooseHead(-1))];
  for (let head = 0; head < layer.heads; head++) heads.push(radio(String(head + 1), head === state.head, () => chooseHead(head)));
  element("heads").replaceChildren(...heads);
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
  [...element("photos").children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === state.photo)));
  document.title = `${photo().name}: what ${page.network} attends to`;
  view.setAttribute("aria-label", `${photo().name}, with what ${page.network} attends to`);
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

function choosePhoto(index) {
  state.photo = index;
  const { width, height } = photo();
  moveTo(width / 2, height / 2);
  fillPhoto();
  fillLayers();
  draw();
}

// The same place of the photograph, in another layer's map.
function chooseLayer(index) {
  const [x, y, w, h] = boxOf(layerNow().queries, state.row * layerNow().queries.width + state.col, true);
  state.layer = (index + photo().layers.length) % photo().layers.length;
  if (state.head >= layerNow().heads) state.head = -1;
  moveTo(x + w / 2, y + h / 2);
  fillLayers();
  draw();
}

function chooseHead(head) {
  state.head = head;
  fillLayers();
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
