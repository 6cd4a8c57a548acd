// Drawing again, pointer, keys, and a picture of the view.

// ---- drawing -----------------------------------------------------------------------------------

let latest = 0;

async function draw() {
  const turn = ++latest, one = photo(), layer = layerNow();
  const [image, found] = await Promise.all([imageOf(one), attention(layer, state.row, state.col, state.head)]);
  if (turn !== latest) return;  // something else is to be shown by now
  const shown = view.clientWidth * devicePixelRatio, scale = Math.min(shown, 2400) / one.width;
  view.width = Math.round(one.width * scale);
  view.height = Math.round(one.height * scale);
  paint(view.getContext("2d"), scale, image, layer, found, devicePixelRatio);
  const drawsWeights = found.weights !== null && (state.weights || layer.bias !== null);
  element("legend").classList.toggle("unused", !drawsWeights);
  element("largest").textContent = found.weights ? `${percent(Math.max(...found.weights))} of attention` : "";
  element("weights").disabled = found.weights === null || layer.bias !== null;
  say(layer, found);
  view.dataset.drawing = turn;
  view.dataset.layer = `${layer.module}:${layer.kind}`;
  view.dataset.query = String(regionOf(layer.queries, state.row, state.col));
  view.dataset.routed = (routesOf(layer, state.row, state.col) ?? []).join(" ");
  writeHashSoon();
  view.dispatchEvent(new Event("drawn"));
}

// ---- pointer and keys --------------------------------------------------------------------------

function look(event) {
  const box = view.getBoundingClientRect();
  moveTo(((event.clientX - box.left) / box.width) * photo().width, ((event.clientY - box.top) / box.height) * photo().height);
  draw();
}

// Where a finger came down, and whether it moves along the picture: to scroll the page, it may begin here too.
let finger = null;

view.addEventListener("pointermove", (event) => {
  if (event.pointerType === "mouse") {
    if (!state.held) look(event);
  } else if (finger !== null && event.isPrimary) {
    const across = Math.abs(event.clientX - finger.x), along = Math.abs(event.clientY - finger.y);
    finger.moves ||= across > 8 && across > along;
    if (finger.moves) look(event);
  }
});
view.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button > 0) return;
  if (event.pointerType !== "mouse") {
    finger = { x: event.clientX, y: event.clientY, moves: false };
    return;
  }
  if (!state.held) look(event);
  hold(!state.held);
});
view.addEventListener("pointerup", (event) => {
  if (finger === null || !event.isPrimary) return;
  finger = null;
  look(event);
  hold(true);
});
view.addEventListener("pointercancel", () => { finger = null; });
element("hold").addEventListener("click", () => hold(!state.held));
element("weights").addEventListener("click", toggleWeights);
element("copy").addEventListener("click", copy);

const KEYS = {
  "[": () => chooseLayer(state.layer - 1),
  "]": () => chooseLayer(state.layer + 1),
  h: () => chooseHead(state.head + 1 < layerNow().heads ? state.head + 1 : -1),
  a: () => element("weights").disabled || toggleWeights(),
  c: () => copy(),
  p: () => choosePhoto((state.photo + 1) % photos.length),
  Escape: () => hold(false),
};
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

document.addEventListener("keydown", (event) => {
  // Many keyboards have brackets on AltGr, which is Ctrl and Alt on some systems and Option on others.
  const isBracket = "[]".includes(event.key) && event.altKey === (event.ctrlKey || event.altKey);
  if (event.metaKey || ((event.ctrlKey || event.altKey) && !isBracket) || !photos.length) return;
  const before = latest, onView = event.target === view || event.target === document.body;
  if (event.key in ARROWS && onView) {
    step(...ARROWS[event.key], event.shiftKey);
    hold(true);
    scrollToToken();
  } else if ((event.key === " " || event.key === "Enter") && onView) {
    hold(!state.held);
  } else if (event.key in KEYS) {
    KEYS[event.key]();
  } else {
    return;
  }
  if (latest > before) view.addEventListener("drawn", sayAloud, { once: true });
  event.preventDefault();
});

// Of a photograph that is higher than the window, the part with the token.
function scrollToToken() {
  const box = view.getBoundingClientRect(), y = box.top + (tokenCentre()[1] / photo().height) * box.height;
  const margin = innerHeight / 6;
  if (y < margin || y > innerHeight - margin) scrollBy(0, y - innerHeight / 2);
}

// ---- a picture of the view ---------------------------------------------------------------------

async function picture() {
  const one = photo(), layer = layerNow(), image = await imageOf(one);
  const found = await attention(layer, state.row, state.col, state.head);
  const scale = Math.min(Math.max(1, 1200 / one.width), 4096 / Math.max(one.width, one.height)), caption = 34;
  const canvas = new OffscreenCanvas(Math.round(one.width * scale), Math.round(one.height * scale) + caption);
  const pen = canvas.getContext("2d");
  paint(pen, scale, image, layer, found, 1.5);
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.fillStyle = "#fff";
  pen.fillRect(0, canvas.height - caption, canvas.width, caption);
  pen.fillStyle = "#1b1b1f";
  pen.font = "18px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const heads = state.head < 0 ? "mean of heads" : `head ${state.head + 1}`;
  pen.fillText(`${page.network}, stage ${layer.stage}, block ${layerLabel(layer)}, ${heads}: ${element("asker").textContent}`,
    8, canvas.height - caption / 2, canvas.width - 16);
  return canvas.convertToBlob({ type: "image/png" });
}

// Where the browser lets no page copy pictures, it is saved as a file instead.
async function copy() {
  const blob = await picture();
  let said = "copied";
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
  } catch {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${photo().name.replace(/\.\w+$/, "")}-${layerNow().module}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    said = `saved as ${link.download}`;
  }
  element("copied").textContent = said;
  setTimeout(() => { element("copied").textContent = ""; }, 3000);
}
