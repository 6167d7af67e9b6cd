// Heads and MLPs that can be switched off, and a slider for what each layer hands on.

import { byId, element } from "./elements.js";
import { Grid } from "./grid.js";

let grid = null;
let sliders = [];

// changes: {heads, feed_forward, scales, patches}, changed in place; onChange is called afterwards.
export function buildSwitches(model, changes, onChange) {
  const onPick = (layer, column) => {
    if (column < model.n_heads) toggle(changes.heads, [layer, column]);
    else toggle(changes.feed_forward, layer);
    onChange();
  };
  grid = new Grid(byId("switches"), "Heads and MLPs by layer; Enter switches one off or on", { onPick });
  byId("switches").classList.toggle("many", model.n_layers > 12);
  drawSwitches(model, changes);
  sliders = [...grid.table.tBodies[0].rows].map((row, layer) => addSlider(row, layer, changes, onChange));
  grid.table.tHead.rows[0].append(element("th", { scope: "col" }, "output"));
}

function addSlider(row, layer, changes, onChange) {
  const input = element("input", { type: "range", min: "0", max: "2", step: "0.1", value: "1" });
  const output = element("output", {}, "× 1");
  input.setAttribute("aria-label", `factor of the output of layer ${layer}`);
  input.addEventListener("input", () => {
    changes.scales = changes.scales.filter(([at]) => at !== layer);
    if (input.valueAsNumber !== 1) changes.scales.push([layer, input.valueAsNumber]);
    onChange();
  });
  row.append(element("td", { className: "slider" }, input, output));
  return { input, output };
}

function toggle(list, value) {
  const at = list.findIndex((other) => String(other) === String(value));
  if (at >= 0) list.splice(at, 1);
  else list.push(value);
}

export function drawSwitches(model, changes) {
  const columns = [...Array(model.n_heads).keys()].map(String).concat("MLP");
  const rows = Array.from({ length: model.n_layers }, (_, layer) => `layer ${layer}`);
  grid.draw("head", rows, columns, (cell, layer, column) => {
    const isHead = column < model.n_heads;
    const isOff = isHead
      ? changes.heads.some(([i, j]) => i === layer && j === column)
      : changes.feed_forward.includes(layer);
    cell.className = isOff ? "switch off" : "switch";
    cell.textContent = isOff ? "×" : "";
    cell.setAttribute("aria-label", `layer ${layer}, ${isHead ? `head ${column}` : "MLP"}: ${isOff ? "off" : "on"}`);
  });
  sliders.forEach(({ input, output }, layer) => {
    const factor = changes.scales.find(([at]) => at === layer)?.[1] ?? 1;
    input.value = String(factor);
    output.textContent = `× ${factor}`;
  });
}

export function countText(changes) {
  const { heads, feed_forward, scales, patches } = changes;
  const parts = [
    [heads.length, "head off", "heads off"],
    [feed_forward.length, "MLP off", "MLPs off"],
    [scales.length, "layer scaled", "layers scaled"],
    [patches.length, "cell patched", "cells patched"],
  ];
  const some = parts.filter(([count]) => count);
  return some.map(([count, one, several]) => `${count} ${count === 1 ? one : several}`).join(", ");
}
