// The link that restores a view.

let writing = 0;

// Browsers let a page say it no more than a hundred times in half a minute, so not at every token on the way.
function writeHashSoon() {
  clearTimeout(writing);
  writing = setTimeout(writeHash, 300);
}

function writeHash() {
  clearTimeout(writing);
  const layer = layerNow();
  const said = new URLSearchParams({
    photo: state.photo + 1, layer: layer.module, kind: layer.kind, head: state.head < 0 ? "mean" : state.head + 1,
    token: `${state.row},${state.col}`, held: Number(state.held), attention: Number(state.weights),
  });
  history.replaceState(null, "", `#${said.toString().replaceAll("%2C", ",")}`);
}

// Of what the hash does not say, or says of what is not there: photograph and layer stay, head and place are as at first.
function readHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  const whole = (text, count, otherwise) => (/^\d+$/.test(text ?? "") && Number(text) < count ? Number(text) : otherwise);
  state.photo = whole(String(Number(said.get("photo")) - 1), photos.length, state.photo);
  const found = photo().layers.findIndex((layer) => layer.module === said.get("layer") && layer.kind === (said.get("kind") ?? "map"));
  if (found >= 0) state.layer = found;
  state.head = whole(String(Number(said.get("head")) - 1), layerNow().heads, -1);
  const [row, col] = (said.get("token") ?? "").split(",");
  moveTo(photo().width / 2, photo().height / 2);
  state.row = whole(row, layerNow().queries.height, state.row);
  state.col = whole(col, layerNow().queries.width, state.col);
  state.weights = said.get("attention") !== "0";
  state.held = said.get("held") === "1";
  element("weights").setAttribute("aria-pressed", String(state.weights));
  element("hold").setAttribute("aria-pressed", String(state.held));
}
