// The state of the page, and what happens when it changes. The server keeps none of it: each request says all.

import { buildAttention, drawAttention } from "./attention.js";
import { buildBars, drawBars, tokenOfRank } from "./bars.js";
import { buildCompare, drawCompare } from "./compare.js";
import { byId, element, percent, tokenSpan, visible } from "./elements.js";
import { LensGrid } from "./lens.js";
import { complain, forget, resultOf, texts, whenReady, work } from "./passes.js";
import * as python from "./python.js";
import { draw, NEUTRAL, order } from "./sampling.js";
import { askModel, askTokens } from "./server.js";
import { buildSwitches, countText, drawSwitches } from "./switches.js";

const TYPING = 120; // milliseconds without a key before a text is sent
const RETRY = 2000; // milliseconds after which the page looks for the server again, if it has not begun

let model = null;
let lens = null;
let probs = null; // of the next token, as the bars show them
const first = { box: byId("prompt"), text: null, tokens: [], chosen: [] }; // chosen: ids added to the prompt
const other = { box: byId("other"), text: "", tokens: [], chosen: [] }; // text: that of the tokens
const changes = { heads: [], feed_forward: [], scales: [], patches: [] };
const sampling = { ...NEUTRAL };

const tokensOf = (prompt) => [...prompt.tokens, ...prompt.chosen.map((id) => texts.get(id))];
const idsOf = (prompt) => [...prompt.tokens.map((token) => token.id), ...prompt.chosen];
const hasChanges = () => Object.values(changes).some((list) => list.length);
const isOpen = (view) => byId(`${view}-view`).open;

// requests

function requestOf(prompt, withChanges, views) {
  const request = { ids: idsOf(prompt), ...views };
  if (withChanges) request.changes = { ...changes, ...(changes.patches.length && { other: idsOf(other) }) };
  return request;
}

// Brings the tokens of a prompt up to its text. An empty second prompt is none at all.
async function readText(prompt, signal) {
  const text = prompt.box.value;
  if (text === prompt.text) return;
  const tokens = text === "" && prompt === other ? [] : await askTokens(text, signal);
  Object.assign(prompt, { text, tokens, chosen: [] });
  changes.patches = [];
  drawTokens(); // at once: the pass may take a while
}

// Runs what the views need, and draws them when all of it is there. If it fails, all stays as it was drawn.
async function update(delay = 0) {
  const failed = await work(async (signal) => {
    await new Promise((resolve) => setTimeout(resolve, delay));
    signal.throwIfAborted();
    for (const prompt of [first, other]) await readText(prompt, signal);
    const views = { lens: isOpen("lens") || isOpen("compare") };
    if (isOpen("attention")) views.attention = Number(byId("layer").value);
    const now = await resultOf(requestOf(first, hasChanges(), views), signal);
    const before = hasChanges() ? await resultOf(requestOf(first, false, { lens: false }), signal) : null;
    const comparing = isOpen("compare") && other.tokens.length;
    const second = comparing ? await resultOf(requestOf(other, false, { lens: true }), signal) : null;
    return () => drawAll(now, before, second);
  });
  if (failed) restore();
}

// What the results that are drawn were computed from. The state may be ahead of them while a pass runs.
let drawn = null; // {now, before, prompt, other, changes, align, layer, head}

const copyOf = ({ text, tokens, chosen }) => ({ text, tokens, chosen: [...chosen] });

// Takes back what has led to no result. A text stays in its box, to be read with the next request.
function restore() {
  if (!drawn) return;
  Object.assign(first, copyOf(drawn.prompt));
  Object.assign(other, copyOf(drawn.other));
  Object.assign(changes, structuredClone(drawn.changes));
  byId("align").value = drawn.align;
  byId("layer").value = drawn.layer;
  byId("head").value = drawn.head;
  drawTokens();
  drawSwitches(model, changes);
}

// drawing

function drawAll(now, before, second) {
  const tokens = tokensOf(first);
  const [layer, head] = [Number(byId("layer").value), Number(byId("head").value)];
  drawTokens();
  drawSwitches(model, changes);
  byId("changes-note").textContent = countText(changes) || "nothing is changed";
  if (isOpen("lens")) lens.draw(tokens, now.lens, texts);
  if (isOpen("attention")) drawAttention(tokens, now.attention, layer, head);
  if (isOpen("compare")) {
    const b = second && { tokens: tokensOf(other), result: second };
    drawCompare({ tokens, result: now }, b, before?.logits ?? null, changes, texts);
  }
  const [align, prompt] = [byId("align").value, copyOf(first)];
  const from = { prompt, other: copyOf(other), changes: structuredClone(changes), align, layer, head };
  drawn = { now, before, ...from };
  drawNext();
}

function drawNext() {
  if (!drawn) return;
  const { now, before } = drawn;
  probs = drawBars(now.logits, before?.logits ?? null, sampling, texts);
  const top = texts.get(order(now.logits)[0]);
  byId("status").textContent = `${idsOf(drawn.prompt).length} tokens, then ${visible(top.text)} ${percent(probs[top.id])}`;
  drawPython();
}

function drawPython() {
  const state = { load: model.load, sampling, ...drawn };
  byId("next-python").textContent = python.nextPython(state);
  byId("lens-python").textContent = python.lensPython(state);
  byId("attention-python").textContent = python.attentionPython(state, drawn.layer, drawn.head);
  byId("compare-python").textContent = drawn.other.tokens.length ? python.comparePython(state) : "";
}

function drawTokens() {
  const chosenFrom = first.tokens.length;
  const items = tokensOf(first).map((token, position) => {
    const id = element("span", { className: "id" }, String(token.id));
    const parts = [tokenSpan(token), id, element("span", { className: "bytes" }, token.bytes || "special")];
    if (position < chosenFrom) return element("li", {}, ...parts);
    const button = element("button", { type: "button", title: "Go back to before this token" }, ...parts);
    button.addEventListener("click", () => goBack(position - chosenFrom));
    return element("li", { className: "chosen" }, button);
  });
  byId("tokens").replaceChildren(...items);
  byId("back").disabled = first.chosen.length === 0;
}

// what the reader does

function choose(id) {
  if (id === undefined) return;
  if (idsOf(first).length >= model.max_tokens) {
    complain(`The page takes ${model.max_tokens} tokens at most. Take some back, or shorten the prompt.`);
    return;
  }
  first.chosen.push(id);
  update();
}

function goBack(length) {
  first.chosen.length = length;
  const count = idsOf(first).length;
  changes.patches = changes.patches.filter(([, , target]) => target < count);
  update();
}

function onTyping(box) {
  fit(box);
  forget();
  update(TYPING);
}

function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

const ACTIONS = {
  take: () => choose(order(drawn.now.logits)[0]),
  sample: () => choose(draw(probs)),
  back: () => goBack(Math.max(0, first.chosen.length - 1)),
};
const KEYS = { n: "take", s: "sample", Backspace: "back" };

function onKey(event) {
  const isTyping = event.target.closest("textarea, select, input:not([type=range], [type=checkbox])");
  if (isTyping || !byId("keys").checked || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const isDigit = /^[0-9]$/.test(event.key);
  if (!action && !isDigit) return;
  const chooseRank = () => choose(tokenOfRank((Number(event.key) + 9) % 10));
  whenReady(action ? ACTIONS[action] : chooseRank, event.repeat);
  event.preventDefault();
}

function onPromptKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  whenReady(ACTIONS.take, event.repeat);
}

function onSampling() {
  for (const name of Object.keys(sampling)) {
    const input = byId(name);
    sampling[name] = input.valueAsNumber;
    const isOff = name !== "temperature" && sampling[name] === NEUTRAL[name];
    input.nextElementSibling.textContent = isOff ? "off" : sampling[name].toFixed(name === "top_k" ? 0 : 2);
  }
  drawNext();
}

function onPatch(patch) {
  const at = changes.patches.findIndex((it) => it[0] === patch[0] && it[2] === patch[2]);
  const same = at >= 0 && changes.patches[at][1] === patch[1];
  if (at >= 0) changes.patches.splice(at, 1);
  if (!same) changes.patches.push(patch);
  update();
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text); // without HTTPS there is no clipboard, except on this machine
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function reset(...names) {
  for (const name of names) changes[name] = [];
  update();
}

// the beginning

function listen() {
  first.box.addEventListener("input", () => onTyping(first.box));
  first.box.addEventListener("keydown", onPromptKey);
  other.box.addEventListener("input", () => onTyping(other.box));
  document.addEventListener("keydown", onKey);
  addEventListener("online", () => update());
  for (const [id, action] of Object.entries(ACTIONS)) byId(id).addEventListener("click", () => whenReady(action));
  byId("sampling").addEventListener("input", onSampling);
  byId("undo-changes").addEventListener("click", () => reset("heads", "feed_forward", "scales", "patches"));
  byId("undo-patches").addEventListener("click", () => reset("patches"));
  byId("align").addEventListener("change", () => reset("patches"));
  byId("copy-prompt").addEventListener("click", () => {
    other.box.value = first.box.value;
    onTyping(other.box);
  });
  for (const view of document.querySelectorAll("details.view")) view.addEventListener("toggle", () => update());
  for (const part of document.querySelectorAll(".python")) {
    part.querySelector("button").addEventListener("click", (event) => copy(event.target, part.querySelector("pre")));
  }
}

function showModel() {
  document.title = `${model.name} · llama3_raw live`;
  const facts = {
    model: model.name,
    weights: model.n_weights.toLocaleString("en"),
    layers: model.n_layers,
    heads: model.n_heads,
    vocabulary: model.vocab_size.toLocaleString("en"),
    "computed in": model.dtype,
  };
  for (const [name, value] of Object.entries(facts)) {
    byId("facts").append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
  }
}

async function begin() {
  const failed = await work(async () => {
    model = await askModel();
    return () => {
      showModel();
      if (model.is_large) byId("lens-view").open = false; // it reads the output matrix once for each layer
      buildBars((id) => whenReady(() => choose(id)));
      buildAttention(model, () => update());
      buildSwitches(model, changes, () => update());
      buildCompare(onPatch);
      lens = new LensGrid(byId("lens"), "Logit lens", byId("lens-readout"));
      listen();
      onSampling();
      fit(first.box);
      update();
    };
  });
  if (failed && !model) setTimeout(begin, RETRY);
}

begin();
