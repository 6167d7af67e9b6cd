// The ten most likely next tokens as bars. The rows stay, so that the focus keeps its rank from step to step.

import { byId, element, percent, tokenSpan, visible } from "./elements.js";
import { NEUTRAL, order, probabilities } from "./sampling.js";

const COUNT = 10;
const SCALES = [0.2, 0.5, 1];
const rows = [];

export function buildBars(onPick) {
  for (let rank = 0; rank < COUNT; rank++) {
    const row = {
      token: element("span"),
      now: element("span", { className: "bar now" }),
      before: element("span", { className: "bar before" }),
      prob: element("data"),
      was: element("data", { className: "was" }),
    };
    const track = element("span", { className: "track" }, row.now, row.before);
    const key = element("kbd", {}, String((rank + 1) % 10));
    row.button = element("button", { type: "button", className: "row" }, key, row.token, track, row.prob, row.was);
    row.button.addEventListener("click", () => onPick(row.id));
    row.item = element("li", {}, row.button);
    rows.push(row);
    byId("bars").append(row.item);
  }
}

// now: the logits shown. without: those of the pass without changes, or null. texts: tokens by id.
export function drawBars(now, without, sampling, texts) {
  const probs = probabilities(now, sampling);
  const isNeutral = Object.entries(NEUTRAL).every(([name, value]) => sampling[name] === value);
  const before = without ? probabilities(without, sampling) : isNeutral ? null : probabilities(now, NEUTRAL);
  const ids = order(now).subarray(0, COUNT);
  const highest = Math.max(...[...ids].map((id) => Math.max(probs[id], before?.[id] ?? 0)));
  const scale = SCALES.find((limit) => highest <= limit) ?? 1;
  rows.forEach((row, rank) => drawRow(row, texts.get(ids[rank]), probs, before, scale));
  const second = without ? "Outlined: without the changes." : before && "Outlined: the model's own distribution.";
  byId("next-note").textContent = `A full bar is ${100 * scale} %. ${second ?? ""}`;
  return probs;
}

function drawRow(row, token, probs, before, scale) {
  row.item.hidden = token === undefined; // a vocabulary of fewer than ten
  if (token === undefined) return;
  row.id = token.id;
  const prob = probs[token.id];
  const was = before?.[token.id];
  row.token.replaceChildren(tokenSpan(token));
  setBar(row.now, prob / scale);
  setBar(row.before, (was ?? 0) / scale);
  setNumber(row.prob, prob);
  setNumber(row.was, was);
  const beside = was === undefined ? "" : `, outlined ${numberText(was)}`;
  row.button.setAttribute("aria-label", `${visible(token.text)}, id ${token.id}, ${numberText(prob)}${beside}`);
  row.button.title = `id ${token.id}, bytes ${token.bytes}`;
}

function setBar(bar, length) {
  bar.style.setProperty("--length", length.toFixed(4));
}

function setNumber(data, prob) {
  data.value = prob === undefined ? "" : String(prob);
  data.textContent = prob === undefined ? "" : numberText(prob);
}

// A token that sampling cuts off has no probability at all.
function numberText(prob) {
  return prob === 0 ? "cut off" : percent(prob);
}

export function tokenOfRank(rank) {
  return rows[rank]?.id;
}
