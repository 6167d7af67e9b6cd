// From logits to the distribution to sample from, as decoding/sampling.py computes it. The server sends the logits of
// the whole vocabulary (0.5 MB for Llama 3), so that a slider needs no answer: with fewer, top-p and the sum of softmax
// would be wrong.

export const NEUTRAL = { temperature: 1, top_k: 0, top_p: 1, min_p: 0 };

const orders = new WeakMap(); // a temperature does not change the order, so each pass is sorted once

// Returns the token ids, the most likely first; among equal logits the lower id.
export function order(logits) {
  if (!orders.has(logits)) {
    orders.set(logits, Uint32Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b));
  }
  return orders.get(logits);
}

// Returns the probability of each token [vocab]. They apply in the order temperature, top-k, top-p, min-p.
export function probabilities(logits, { temperature, top_k, top_p, min_p }) {
  const ids = order(logits);
  const probs = new Float64Array(logits.length);
  if (temperature === 0) {
    probs[ids[0]] = 1;
    return probs;
  }
  const kept = top_k > 0 ? ids.subarray(0, top_k) : ids;
  const highest = logits[ids[0]];
  for (const id of kept) probs[id] = Math.exp((logits[id] - highest) / temperature);
  normalize(probs, kept);
  let before = 0;
  for (const id of kept) {
    const mass = probs[id];
    if (top_p < 1 && before >= top_p) probs[id] = 0;
    before += mass;
  }
  const least = min_p * probs[ids[0]];
  for (const id of kept) if (probs[id] < least) probs[id] = 0;
  normalize(probs, kept);
  return probs;
}

function normalize(probs, ids) {
  let sum = 0;
  for (const id of ids) sum += probs[id];
  for (const id of ids) probs[id] /= sum;
}

// Draws a token id.
export function draw(probs) {
  let left = Math.random();
  let last = 0;
  for (const [id, prob] of probs.entries()) {
    if (prob === 0) continue;
    last = id;
    left -= prob;
    if (left < 0) break;
  }
  return last;
}
