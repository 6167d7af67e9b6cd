// The head picker: fills the heatmap with the numbers of any layer and head, from the data beside it. And on a touch
// screen, where one cannot point at a number, a tap shows the Python behind it.
"use strict";

const data = JSON.parse(document.getElementById("heads-data").textContent);
const layerList = document.getElementById("layer");
const headList = document.getElementById("head");
const thumbnails = document.getElementById("thumbnails");
const table = document.getElementById("heatmap");
const python = document.getElementById("heatmap-python");
const chosen = document.getElementById("chosen");
const { length, n_heads: heads } = data;

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
    showThumbnail(large, layer, head);
    return;
  }
  const size = (length * (length + 1)) / 2;
  const values = numbers(packed).subarray(head * size, (head + 1) * size);
  const limit = what === "probs" ? 1 : Math.max(...values.map(Math.abs));
  for (let row = 0, at = 0; row < length; row++) {
    const cells = [...table.tBodies[0].rows[row].cells].slice(1);
    for (const cell of cells.slice(row + 1)) cell.textContent = what === "probs" ? "0.00" : "−∞";
    for (const cell of cells.slice(0, row + 1)) {
      const value = values[at++];
      cell.textContent = value.toFixed(2).replace("-", "−");
      cell.title = String(value);
      cell.style.setProperty("--p", String(Math.abs(value) / limit));
      cell.style.setProperty("--tint", what === "scores" && value > 0 ? "var(--orange)" : "var(--blue)");
    }
  }
}

const large = document.createElement("span");
large.className = "thumbnail large";
table.before(large);
thumbnails.append(...Array.from({ length: heads }, (_, head) => thumbnailButton(head)));
for (const control of [layerList, headList, ...document.querySelectorAll("input[name=what]")]) {
  control.addEventListener("change", show);
}
show();

const told = document.getElementById("python");
document.addEventListener("click", (event) => {
  const number = event.target.closest("data[title]");
  told.hidden = number === null;
  told.textContent = number === null ? "" : `${number.title} = ${number.value}`;
});
