// What the page knows, and the attention of any token, computed from it.
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const photos = page.photos;
const element = (id) => document.getElementById(id);
const view = element("view");

// What is shown: the photograph, the layer, the head (-1: mean of all), and the token that looks.
const state = { photo: 0, layer: 0, head: -1, row: 0, col: 0, held: false, weights: true };

async function unpack(data) {
  const deflated = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = bytes.length / 2;
  const numbers = new Int16Array(count);
  for (let i = 0; i < count; i++) numbers[i] = bytes[i] | (bytes[count + i] << 8);
  return numbers;
}

const decoded = new Map();

function numbersOf(layer) {
  if (!decoded.has(layer)) {
    const parts = [layer.data ? unpack(layer.data) : null, layer.bias ? unpack(layer.bias.data) : null];
    decoded.set(layer, Promise.all(parts).then(([factors, table]) => ({ factors, table })));
  }
  return decoded.get(layer);
}

const size = (map) => map.height * map.width;
const isPerToken = (map) => map.region_height === 1 && map.region_width === 1;
const regionOf = (map, row, col) =>
  Math.floor(row / map.region_height) * map.cols + Math.floor(col / map.region_width);

// The tokens of a region that are of the map and not padding.
function tokensOf(map, region) {
  const top = Math.floor(region / map.cols) * map.region_height;
  const left = (region % map.cols) * map.region_width;
  const tokens = [];
  for (let row = top; row < Math.min(top + map.region_height, map.height); row++) {
    for (let col = left; col < Math.min(left + map.region_width, map.width); col++) tokens.push(row * map.width + col);
  }
  return tokens;
}

function routesOf(layer, row, col) {
  return layer.routes === null ? null : layer.routes[regionOf(layer.queries, row, col)];
}

function keysOf(layer, row, col) {
  const routes = routesOf(layer, row, col);
  if (routes === null) return Array.from({ length: size(layer.keys) }, (_, key) => key);
  return routes.flatMap((region) => tokensOf(layer.keys, region));
}

// A square table at (y, x) from -1 to 1, bilinearly, 0 outside of it.
function sampled(table, offset, side, y, x) {
  const row = ((y + 1) / 2) * (side - 1), col = ((x + 1) / 2) * (side - 1);
  const top = Math.floor(row), left = Math.floor(col);
  let sum = 0;
  for (const [r, wr] of [[top, top + 1 - row], [top + 1, row - top]]) {
    for (const [c, wc] of [[left, left + 1 - col], [left + 1, col - left]]) {
      if (r >= 0 && r < side && c >= 0 && c < side) sum += wr * wc * table[offset + r * side + c];
    }
  }
  return sum;
}

const position = (index, count) => (count > 1 ? (2 * index) / (count - 1) - 1 : 0);
const groupOf = (layer, head) => Math.floor((head * layer.points.length) / layer.heads);

// Weights of one head, for the keys in that order.
function headWeights(layer, numbers, row, col, head, keys) {
  const queries = size(layer.queries), both = queries + size(layer.keys), start = head * layer.rank * both;
  const logits = new Float64Array(keys.length);
  for (let plane = 0; plane < layer.rank; plane++) {
    const at = start + plane * both;
    const query = numbers.factors[at + row * layer.queries.width + col] * layer.step * layer.step;
    for (let i = 0; i < keys.length; i++) logits[i] += query * numbers.factors[at + queries + keys[i]];
  }
  if (layer.bias) {
    const y = position(row, layer.queries.height), x = position(col, layer.queries.width);
    const points = layer.points[groupOf(layer, head)], side = layer.bias.side;
    keys.forEach((key, i) => {
      const [keyY, keyX] = points[key];
      logits[i] += layer.bias.step * sampled(numbers.table, head * side * side, side, (y - keyY) / 2, (x - keyX) / 2);
    });
  }
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = logits.map((logit) => Math.exp(logit - largest));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

// {keys, weights}: the attention of the token in that row and column, of one head or (-1) the mean of all.
async function attention(layer, row, col, head) {
  const keys = keysOf(layer, row, col);
  if (!layer.data) return { keys, weights: null };
  const numbers = await numbersOf(layer);
  const heads = head < 0 ? [...Array(layer.heads).keys()] : [head];
  const weights = new Float64Array(keys.length);
  for (const one of heads) headWeights(layer, numbers, row, col, one, keys).forEach((w, i) => { weights[i] += w / heads.length; });
  return { keys, weights };
}
