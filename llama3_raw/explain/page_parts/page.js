// The head picker: fills the heatmap with the numbers of any layer and head, from the data beside it. And where one cannot
// point at a number, a tap or the keys show the Python behind it.
"use strict";

const data = JSON.parse(document.getElementById("heads-data").textContent);
const layerList = document.getElementById("layer");
const headList = document.getElementById("head");
const thumbnails = document.getElementById("thumbnails");
const table = document.getElementById("heatmap");
const python = document.getElementById("heatmap-python");
const chosen = document.getElementById("chosen");
const large = document.createElement("span"); // the picture of a head whose numbers the page does not have
const told = document.getElementById("python");
const { length, n_heads: heads } = data;
const NUMBERS = "data[title], #heatmap td[data-python]";

// The numbers [heads, length * (length + 1) / 2] of what is not masked, as float32. A bfloat16 is the upper half of one.
function numbers(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  if (!data.bfloat16) return new Float32Array(bytes.buffer);
  const halves = new Uint16Array(bytes.buffer);
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}

// Shows one head of the strip of a layer's pictures in an element.
function showThumbnail(element, layer, head) {
  element.style.backgroundImage = `url(${data.layers[layer].thumbnails})`;
  element.style.backgroundSize = `${heads * 100}% 100%`;
  element.style.backgroundPosition = heads > 1 ? `${(100 * head) / (heads - 1)}% 0` : "0 0";
}

function thumbnailButton(head) {
  const button = document.createElement("button");
  button.type = "button";
  const picture = document.createElement("span");
  picture.className = "thumbnail";
  button.append(picture, String(head));
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
    chosen.textContent = `layer ${layer}, head ${head}: the picture only; numbers of so many heads would be too much for a page`;
    large.setAttribute("aria-label", `probabilities of layer ${layer}, head ${head}, as a picture`);
    showThumbnail(large, layer, head);
    return;
  }
  const size = (length * (length + 1)) / 2;
  const values = numbers(packed).subarray(head * size, (head + 1) * size);
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

// Says what yields a number; nothing of anything else.
function tell(number) {
  told.hidden = number === null;
  if (number !== null) told.textContent = `${number.dataset.python ?? number.title} = ${number.value ?? number.title}`;
}

// Of each group of numbers, a table or what stands outside of one in a step, Tab reaches one; the arrow keys go on.
function groupOf(number) {
  return number.closest("table") ?? number.closest("section");
}
const groups = new Set();
for (const number of document.querySelectorAll("data[title]")) {
  number.tabIndex = groups.has(groupOf(number)) ? -1 : 0;
  groups.add(groupOf(number));
}

// The number that an arrow key leads to: the next one of the group, or in a table the one above or below.
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
  if (event.key === "Escape") tell(null);
  if (!event.key.startsWith("Arrow") || !event.target.matches(NUMBERS)) return;
  event.preventDefault(); // the page stays where it is
  const next = neighbour(event.target, event.key);
  if (next === undefined) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
document.addEventListener("focusin", (event) => tell(event.target.closest(NUMBERS)));
document.addEventListener("click", (event) => tell(event.target.closest(NUMBERS)));
