// Two prompts side by side: a cell of the other prompt's lens patches its residual stream into the first prompt.

import { byId, element, percent, shade, tokenSpan, visible } from "./elements.js";
import { LensGrid, stageLabel } from "./lens.js";
import { order, probabilities, NEUTRAL } from "./sampling.js";

const LISTED = 5;
let first = null;
let other = null;
let lengths = [0, 0];

// onPick([stage, source, target]): a cell of the other prompt was chosen.
export function buildCompare(onPick) {
  const pickCell = (stage, source) => {
    const target = targetOf(source);
    if (target !== null) onPick([stage, source, target]);
  };
  const rowLabel = (stage) => (stage === 0 ? "emb." : String(stage - 1)); // two grids side by side are narrow
  const readout = byId("pair-readout");
  first = new LensGrid(byId("lens-a"), "Logit lens of the first prompt", readout, { rowLabel });
  other = new LensGrid(byId("lens-b"), "Logit lens of the other prompt; Enter patches a cell", readout, {
    onPick: pickCell,
    rowLabel,
  });
}

// Returns the position of the first prompt that a position of the other one belongs to, or null.
function targetOf(source) {
  const target = byId("align").value === "end" ? source + lengths[0] - lengths[1] : source;
  return target >= 0 && target < lengths[0] ? target : null;
}

// a, b: {tokens, result}; without: the logits of the first prompt without changes. changes.patches are marked.
export function drawCompare(a, b, without, changes, texts) {
  lengths = [a.tokens.length, b?.tokens.length ?? 0];
  const { patches } = changes;
  byId("patched-note").textContent = patches.length ? `, patched: ${patches.map(patchText).join("; ")}` : "";
  first.draw(a.tokens, a.result.lens, texts, (cell, stage, position) => {
    cell.classList.toggle("patched", patches.some(([at, , target]) => at === stage && target === position));
  });
  byId("lens-b").hidden = byId("comparison").hidden = !b;
  if (!b) return;
  other.draw(b.tokens, b.result.lens, texts, (cell, stage, position) => {
    const isPatched = patches.some(([at, source]) => at === stage && source === position);
    const isPossible = targetOf(position) !== null;
    cell.classList.toggle("patched", isPatched);
    cell.classList.toggle("pickable", isPossible);
    const state = isPatched ? "; patched" : isPossible ? "" : "; the first prompt has no such position";
    cell.setAttribute("aria-label", cell.getAttribute("aria-label") + state);
  });
  drawTable(a.result.logits, without, b.result.logits, texts);
}

function patchText([stage, source, target]) {
  return `${stageLabel(stage)}, position ${source === target ? target : `${source} into ${target}`}`;
}

// The most likely tokens of either prompt, and their probabilities in both.
function drawTable(now, without, second, texts) {
  const columns = [["first", without ?? now], ...(without ? [["with the changes", now]] : []), ["other", second]];
  const probs = columns.map(([, logits]) => probabilities(logits, NEUTRAL));
  const ids = new Set(columns.flatMap(([, logits]) => [...order(logits).subarray(0, LISTED)]));
  const listed = [...ids].filter((id) => texts.has(id));
  const names = ["next token", ...columns.map(([name]) => name)];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const rows = listed.map((id) => {
    const cells = probs.map((of) => {
      const cell = element("td", { className: "shade" }, element("data", { value: String(of[id]) }, percent(of[id])));
      shade(cell, of[id]);
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row", title: `id ${id}` }, tokenSpan(texts.get(id))), ...cells);
  });
  const caption = element("caption", {}, "Probability of the next token, at temperature 1");
  const table = element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...rows));
  byId("comparison").replaceChildren(table);
}
