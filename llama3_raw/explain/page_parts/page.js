// The head picker fills the heatmap with the numbers of any layer and head, from the JSON data in the page.
// A tap, a click or the arrow keys show the Python expression of a number, on touch screens and keyboards too.
"use strict";

const data = JSON.parse(document.getElementById("heads-data").textContent);
const layerList = document.getElementById("layer");
const headList = document.getElementById("head");
const thumbnails = document.getElementById("thumbnails");
const table = document.getElementById("heatmap");
const python = document.getElementById("heatmap-python");
const chosen = document.getElementById("chosen");
const large = document.createElement("span"); // an enlarged thumbnail, for a layer without numbers in the page
const pythonBar = document.getElementById("python");
const { length, n_heads: heads } = data;
const NUMBERS = "data[title], #heatmap td[data-python]";

// Decodes the unmasked values [heads, length * (length + 1) / 2] to float32. A bfloat16 is the upper half of a float32.
function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  if (!data.bfloat16) return new Float32Array(bytes.buffer);
  const halves = new Uint16Array(bytes.buffer);
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}

// Shows the thumbnail of one head in an element. The thumbnails of a layer are one image, side by side.
function showThumbnail(element, layer, head) {
  element.style.backgroundImage = `url(${data.layers[layer].thumbnails})`;
  element.style.backgroundSize = `${heads * 100}% 100%`;
  element.style.backgroundPosition = heads > 1 ? `${(100 * head) / (heads - 1)}% 0` : "0 0";
}

function thumbnailButton(head) {
  const button = document.createElement("button");
  button.type = "button";
  const thumbnail = document.createElement("span");
  thumbnail.className = "thumbnail";
  button.append(thumbnail, String(head));
  button.setAttribute("aria-label", `head ${head}`);
  button.addEventListener("click", () => {
    headList.value = String(head);
    show();
  });
  return button;
}

function show() {
  const layer = Number(layerList.value);
  const head = Number(headList.value);
  const what = document.querySelector("input[name=what]:checked").value;
  [...thumbnails.children].forEach((button, i) => {
    showThumbnail(button.firstChild, layer, i);
    button.setAttribute("aria-pressed", String(i === head));
  });
  python.textContent = `trace["layers.${layer}.attention.${what}"][${head}]`;
  const packed = data.layers[layer][what];
  large.hidden = packed !== null;
  table.tBodies[0].hidden = table.tHead.hidden = packed === null;
  chosen.textContent = `layer ${layer}, head ${head}: ${what === "probs" ? "probabilities" : "scores"}`;
  if (packed === null) {
    chosen.textContent =
      `layer ${layer}, head ${head}: thumbnail only; the numbers of all layers are too large for a page`;
    large.setAttribute("aria-label", `thumbnail of the probabilities of layer ${layer}, head ${head}`);
    showThumbnail(large, layer, head);
    return;
  }
  const size = (length * (length + 1)) / 2;
  const values = decode(packed).subarray(head * size, (head + 1) * size);
  const limit = what === "probs" ? 1 : Math.max(...values.map(Math.abs));
  for (let row = 0, at = 0; row < length; row++) {
    const cells = [...table.tBodies[0].rows[row].cells].slice(1);
    for (const cell of cells.slice(row + 1)) cell.textContent = what === "probs" ? "·" : "−∞";
    for (const [column, cell] of cells.slice(0, row + 1).entries()) {
      const value = values[at++];
      cell.dataset.python = `${python.textContent.slice(0, -1)}, ${row}, ${column}]`;
      cell.tabIndex = row + column === 0 ? 0 : -1;
      cell.textContent = value.toFixed(2).replace("-", "−");
      cell.title = String(value);
      cell.style.setProperty("--p", String(Math.abs(value) / limit));
      cell.style.setProperty("--tint", what === "scores" && value > 0 ? "var(--orange)" : "var(--blue)");
    }
  }
}

large.className = "thumbnail large";
large.setAttribute("role", "img");
table.before(large);
thumbnails.append(...Array.from({ length: heads }, (_, head) => thumbnailButton(head)));
for (const control of [layerList, headList, ...document.querySelectorAll("input[name=what]")]) {
  control.addEventListener("change", show);
}
show();

// Shows the Python expression of a number; null hides the bar.
function showPython(number) {
  pythonBar.hidden = number === null;
  if (number !== null) pythonBar.textContent = `${number.dataset.python ?? number.title} = ${number.value ?? number.title}`;
}

// A group is a table, or the numbers of a step outside its tables. Tab moves between groups, arrow keys within a group.
function groupOf(number) {
  return number.closest("table") ?? number.closest("section");
}
const groups = new Set();
for (const number of document.querySelectorAll("data[title]")) {
  number.tabIndex = groups.has(groupOf(number)) ? -1 : 0;
  groups.add(groupOf(number));
}

// Returns the number that an arrow key moves to: the next or previous in the group; in a table, also above or below.
function neighbour(number, key) {
  const group = groupOf(number);
  const all = [...group.querySelectorAll(NUMBERS)].filter((other) => groupOf(other) === group);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[key];
  const cell = number.closest("td");
  if (cell === null || key === "ArrowLeft" || key === "ArrowRight") return all[all.indexOf(number) + step];
  const column = all.filter((other) => other.closest("td").cellIndex === cell.cellIndex);
  return column[column.indexOf(number) + step];
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") showPython(null);
  if (!event.key.startsWith("Arrow") || !event.target.matches(NUMBERS)) return;
  event.preventDefault(); // no scrolling
  const next = neighbour(event.target, event.key);
  if (next === undefined) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
document.addEventListener("focusin", (event) => showPython(event.target.closest(NUMBERS)));
document.addEventListener("click", (event) => showPython(event.target.closest(NUMBERS)));
