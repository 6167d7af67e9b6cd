// The Python that makes each view. It runs as it stands, from the folder in which the server was started.

const quote = (text) => JSON.stringify(text); // a string of JSON is one of Python
const list = (numbers) => `[${[...numbers].join(", ")}]`;

// prompt: {text, chosen}, where chosen are the ids that were added to it.
function idsOf(name, prompt) {
  const added = prompt.chosen.length ? ` + ${list(prompt.chosen)}` : "";
  return `${name} = model.tokenizer.encode(${quote(prompt.text)}, bos=True)${added}`;
}

export function stageName(stage) {
  return stage === 0 ? "tok_embeddings" : `layers.${stage - 1}.residual`;
}

// Returns the lines that define `changes`, none if there are none. They say what live_pass.replacements does.
function changesLines(changes) {
  const definitions = [];
  const entries = new Map();
  const layers = [...new Set(changes.heads.map(([layer]) => layer))].sort((a, b) => a - b);
  for (const layer of layers) {
    const off = changes.heads.filter(([at]) => at === layer).map(([, head]) => head).sort((a, b) => a - b);
    const name = `without_heads_${layer}`;
    definitions.push(...copying(name, "heads", "[T, n_heads, head_dim]", [`heads[:, ${list(off)}] = 0`]));
    entries.set(`layers.${layer}.attention.heads`, name);
  }
  for (const layer of changes.feed_forward) entries.set(`layers.${layer}.feed_forward.out`, "torch.zeros_like");
  for (const [layer, factor] of changes.scales) entries.set(stageName(layer + 1), `lambda x: x * ${factor}`);
  if (changes.patches.length) {
    definitions.push("", 'source = trace(model, other, "tok_embeddings", "layers.*.residual", ops=REFERENCE)');
  }
  for (const stage of [...new Set(changes.patches.map(([at]) => at))]) {
    const name = `patched_${stage}`;
    const factor = changes.scales.find(([layer]) => layer + 1 === stage)?.[1];
    const lines = changes.patches
      .filter(([at]) => at === stage)
      .map(([, source, target]) => `x[${target}] = source["${stageName(stage)}"][${source}]`);
    definitions.push(...copying(name, "x", "[T, dim]", lines, factor));
    entries.set(stageName(stage), name);
  }
  if (!entries.size) return [];
  const items = [...entries].map(([name, value]) => `    "${name}": ${value},`);
  return [...definitions, "", "changes = patch({", ...items, "})"];
}

// A function that changes a copy of a tensor.
function copying(name, argument, shape, lines, factor) {
  const copy = factor === undefined ? `${argument}.clone()` : `${argument} * ${factor}`;
  const body = [`${argument} = ${copy}`, ...lines, `return ${argument}`].map((line) => `    ${line}`);
  return ["", "", `def ${name}(${argument}):  # ${shape}`, ...body, ""];
}

// state: {load, prompt, other, changes, sampling}. Returns the lines up to `ids` and `changes`.
function start(state, { imports = [], needsOther = state.changes.patches.length > 0 } = {}) {
  const lines = changesLines(state.changes);
  return [
    "import torch",
    "import llama3_raw",
    `from llama3_raw import ${["REFERENCE", ...(lines.length ? ["patch"] : []), "trace"].join(", ")}`,
    ...imports,
    "",
    `model = ${state.load}`,
    idsOf("ids", state.prompt),
    ...(needsOther ? [idsOf("other", state.other)] : []),
    ...lines,
    ...(lines.length ? [""] : []),
  ];
}

const tapOf = (changes) => (changesLines(changes).length ? ", tap=changes" : "");
const joined = (lines) => lines.join("\n").replace(/\n{4,}/g, "\n\n\n") + "\n";

export function nextPython(state) {
  const { temperature, top_k, top_p, min_p } = state.sampling;
  const isPlain = temperature === 1 && top_k === 0 && top_p === 1 && min_p === 0;
  const options = `temperature=${temperature}, top_k=${top_k}, top_p=${top_p}, min_p=${min_p}`;
  let imports = [];
  let probs = "logits.softmax(-1)";
  if (temperature === 0) probs = "torch.nn.functional.one_hot(logits.argmax(), len(logits))";
  else if (!isPlain) {
    imports = ["from llama3_raw.decoding.sampling import Sampling, probabilities"];
    probs = `probabilities(logits, Sampling(${options}))`;
  }
  return joined([
    ...start(state, { imports }),
    `logits = trace(model, ids, "logits", ops=REFERENCE${tapOf(state.changes)})["logits"][-1]  # [vocab_size]`,
    `probs = ${probs}`,
    "for token in logits.sort(descending=True, stable=True).indices[:10].tolist():",
    "    print(token, repr(model.tokenizer.name(token)), float(probs[token]))",
  ]);
}

export function lensPython(state) {
  return joined([
    ...start(state),
    `kept = trace(model, ids, "tok_embeddings", "layers.*.residual", ops=REFERENCE${tapOf(state.changes)})`,
    "lens = llama3_raw.plots.read_logit_lens(kept, model)  # needs matplotlib",
    "print(lens.ids.shape, lens.probs.shape)  # both [stages, T, 5]",
  ]);
}

export function attentionPython(state, layer, head) {
  const name = `layers.${layer}.attention.probs`;
  return joined([
    ...start(state),
    `kept = trace(model, ids, "${name}", ops=REFERENCE${tapOf(state.changes)})`,
    `probs = kept["${name}"][${head}]  # [T, T]: row, the token that attends; column, the one attended to`,
    "print(probs)",
  ]);
}

export function comparePython(state) {
  const probsOf = (ids, tap = "") => `trace(model, ${ids}, "logits", ops=REFERENCE${tap})["logits"][-1].softmax(-1)`;
  const tap = tapOf(state.changes);
  const columns = ["first", ...(tap ? ["changed"] : []), "second"];
  return joined([
    ...start(state, { needsOther: true }),
    `first = ${probsOf("ids")}`,
    ...(tap ? [`changed = ${probsOf("ids", tap)}`] : []),
    `second = ${probsOf("other")}`,
    `columns = (${columns.join(", ")})`,
    "top = [probs.sort(descending=True, stable=True).indices[:5] for probs in columns]",
    "for token in dict.fromkeys(torch.cat(top).tolist()):",
    `    print(repr(model.tokenizer.name(token)), ${columns.map((name) => `float(${name}[token])`).join(", ")})`,
  ]);
}
