// What runs: one task at a time, the newest. It shows how far a slow pass is, and an error as one line.

import { byId } from "./elements.js";
import { askPass, ServerError } from "./server.js";

const SLOW = 300; // milliseconds after which progress shows
const KEPT = 12; // results

export const texts = new Map(); // id -> token, of every token that the server has told
const results = new Map(); // request -> result: going back needs no pass
let busy = null; // the AbortController of what runs
const waiting = []; // what to do when it is done, the first thing first

export async function resultOf(request, signal) {
  const key = JSON.stringify(request);
  if (!results.has(key)) {
    byId("steps").textContent = "waiting for the model";
    const result = await askPass(request, signal, showProgress);
    for (const token of [...result.tokens, ...result.top, ...(result.lens?.tokens ?? [])]) texts.set(token.id, token);
    results.set(key, result);
    if (results.size > KEPT) results.delete(results.keys().next().value);
  }
  return results.get(key);
}

// Runs a task, which ends the one before it, and then what it returns. Returns whether it failed, with one line as error.
export async function work(task) {
  busy?.abort();
  const mine = (busy = new AbortController());
  byId("columns").ariaBusy = "true";
  const slow = setTimeout(() => document.body.classList.add("slow"), SLOW);
  try {
    const finish = await task(mine.signal);
    if (busy !== mine) return;
    byId("error").textContent = "";
    finish?.();
  } catch (error) {
    if (busy !== mine) return;
    complain(error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
    if (!(error instanceof ServerError)) console.error(error);
    return true;
  } finally {
    clearTimeout(slow);
    if (busy === mine) idle();
  }
}

// Shows an error. What was to be done does not count any more.
export function complain(message) {
  byId("error").textContent = message;
  forget();
}

function idle() {
  busy = null;
  byId("columns").ariaBusy = "false";
  document.body.classList.remove("slow");
  byId("progress").removeAttribute("value");
  while (!busy && waiting.length) waiting.shift()();
}

// A key that is pressed during a pass means the tokens that come of it. A key that is held does not run ahead.
export function whenReady(action, isHeld = false) {
  if (!busy) action();
  else if (!isHeld) waiting.push(action);
}

// Drops what waits.
export function forget() {
  waiting.length = 0;
}

function showProgress(done, total) {
  byId("steps").textContent = `step ${done} of ${total}`;
  byId("progress").max = total;
  byId("progress").value = done;
}
