// Attention of one layer: thumbnails of its heads, one head as a map, and one row of it as lines over the text.

import { byId, element, shade, tokenSpan, visible } from "./elements.js";
import { Grid } from "./grid.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 96; // pixels above the text, for the lines
const FAINT = 0.01; // a lower probability gets no line

let view = null; // {tokens, attention, layer, head, query, onQuery}
let map = null;

export function buildAttention(model, onChange) {
  const options = (count) => Array.from({ length: count }, (_, i) => element("option", {}, String(i)));
  byId("layer").append(...options(model.n_layers));
  byId("head").append(...options(model.n_heads));
  for (const id of ["layer", "head"]) byId(id).addEventListener("change", onChange);
  byId("thumbnails").append(...options(model.n_heads).map((_, head) => thumbnail(head, onChange)));
  map = new Grid(byId("map"), "Attention map: each row a token, each column one that it attends to", {
    onPoint: (row, column) => (byId("map-readout").textContent = reading(row, column)),
    onPick: (row) => choose(row),
  });
  new ResizeObserver(() => drawLines()).observe(byId("lines"));
}

function thumbnail(head, onChange) {
  const button = element("button", { type: "button" }, element("canvas", { className: "thumbnail" }), String(head));
  button.setAttribute("aria-label", `head ${head}`);
  button.addEventListener("click", () => {
    byId("head").value = String(head);
    onChange();
  });
  return button;
}

// attention: the unmasked probabilities of a layer, [n_heads, T * (T + 1) / 2].
export function drawAttention(tokens, attention, layer, head) {
  const query = Math.min(view?.query ?? Infinity, tokens.length - 1);
  const grew = view && tokens.length > view.tokens.length && view.query === view.tokens.length - 1;
  view = { tokens, attention, layer, head, query: grew ? tokens.length - 1 : query };
  byId("thumbnails").querySelectorAll("button").forEach((button, i) => {
    drawThumbnail(button.querySelector("canvas"), i);
    button.setAttribute("aria-pressed", String(i === head));
  });
  map.draw("token", tokens.map(tokenSpan), tokens.map(tokenSpan), drawCell);
  byId("map-readout").textContent = reading(view.query, view.query);
  drawLines();
}

function prob(head, row, column) {
  const { attention, tokens } = view;
  return attention[(head * tokens.length * (tokens.length + 1)) / 2 + (row * (row + 1)) / 2 + column];
}

function drawCell(cell, row, column) {
  const isMasked = column > row;
  cell.className = isMasked ? "cell masked" : row === view.query ? "cell chosen" : "cell";
  shade(cell, isMasked ? 0 : prob(view.head, row, column));
  cell.setAttribute("aria-label", reading(row, column));
}

function name(position) {
  return `${visible(view.tokens[position].text)} (${position})`;
}

function reading(row, column) {
  if (column > row) return `${name(row)} does not see ${name(column)}: it comes later`;
  return `${name(row)} attends to ${name(column)}: ${prob(view.head, row, column).toFixed(3)}`;
}

function drawThumbnail(canvas, head) {
  const size = view.tokens.length;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--blue");
  for (let row = 0; row < size; row++) {
    for (let column = 0; column <= row; column++) {
      context.globalAlpha = Math.sqrt(prob(head, row, column)); // makes small values visible
      context.fillRect(column, row, 1, 1);
    }
  }
}

function choose(row) {
  view.query = row;
  map.draw("token", view.tokens.map(tokenSpan), view.tokens.map(tokenSpan), drawCell);
  drawLines();
}

// The text in one line, the probability under each token, and an arc from the chosen token to each that it attends to.
function drawLines() {
  if (!view) return;
  const { tokens, query, head, layer } = view;
  const focused = [...byId("lines").querySelectorAll("button")].indexOf(document.activeElement);
  const buttons = tokens.map((token, position) => {
    const number = position > query ? "" : prob(head, query, position).toFixed(2);
    const button = element("button", { type: "button" }, tokenSpan(token), element("data", {}, number));
    button.setAttribute("aria-pressed", String(position === query));
    button.setAttribute("aria-label", position > query ? visible(token.text) : reading(query, position));
    button.addEventListener("click", () => choose(position));
    return button;
  });
  const text = element("div", { className: "text" }, ...buttons);
  const picture = document.createElementNS(SVG, "svg");
  byId("lines").replaceChildren(element("div", { className: "drawing" }, picture, text));
  if (focused >= 0) buttons[focused]?.focus();
  const centres = buttons.map((button) => button.offsetLeft + button.offsetWidth / 2);
  picture.setAttribute("width", text.scrollWidth);
  picture.setAttribute("height", HEIGHT);
  picture.setAttribute("aria-hidden", "true"); // the buttons have the numbers
  picture.append(...centres.slice(0, query + 1).map((to, i) => arc(centres[query], to, prob(head, query, i))));
  byId("attention-note").textContent =
    `Layer ${layer}, head ${head}: what ${name(query)} attends to. ` +
    "Choose another token in the text, or a row of the map.";
  showChosen(buttons[query]);
}

// Scrolls the text, not the page, so that the chosen token is in view.
function showChosen(button) {
  const host = byId("lines");
  const end = button.offsetLeft + button.offsetWidth - host.clientWidth;
  host.scrollLeft = Math.max(Math.min(host.scrollLeft, button.offsetLeft), end);
}

function arc(from, to, weight) {
  const path = document.createElementNS(SVG, "path");
  const top = HEIGHT - Math.min(HEIGHT - 6, 14 + Math.abs(from - to) / 4) * 1.33;
  const spread = from === to ? 10 : 0; // a token that attends to itself: a loop
  const [start, end] = [from - spread, to + spread];
  path.setAttribute("d", `M ${start} ${HEIGHT} C ${start} ${top}, ${end} ${top}, ${end} ${HEIGHT}`);
  path.style.strokeWidth = `${1 + 5 * weight}px`;
  path.style.opacity = weight < FAINT ? 0 : 0.25 + 0.75 * weight;
  return path;
}
