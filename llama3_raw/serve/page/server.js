// Asks the server: tokens of a text, and passes, which report their progress while they run.

const KEY = "llama3_raw key";

// The key comes in the fragment, which browsers do not send. It leaves the address bar, which a class may see.
function takeKey() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!key) return false;
  sessionStorage.setItem(KEY, key);
  history.replaceState(null, "", location.pathname);
  return true;
}

takeKey();
// another fragment in the same tab loads nothing anew
addEventListener("hashchange", () => takeKey() && location.reload());

let modelId = null; // of the model that the page shows; the server refuses requests for another one

// A message for the reader, on one line.
export class ServerError extends Error {}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  if (modelId) headers["Model-Id"] = modelId;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.status === 429 || response.status === 503) {
    await pause(Number(response.headers.get("Retry-After")) || 1, signal);
    return ask(path, body, signal);
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new ServerError("The server wants its key: open the address that it printed, which ends in #key=…");
  }
  throw new ServerError(messageOf(await response.json().catch(() => null)) ?? `The server answers ${response.status}.`);
}

function messageOf(answer) {
  return answer?.error?.message;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

export async function askModel() {
  const model = await (await ask("/live/model")).json();
  modelId = model.id;
  return model;
}

export async function askTokens(text, signal) {
  return (await (await ask("/live/tokens", { text }, signal)).json()).tokens;
}

// Runs a pass. onProgress(done, total) is called while it runs. Aborting the signal ends the pass on the server too.
export async function askPass(request, signal, onProgress) {
  const response = await ask("/live/pass", request, signal);
  for await (const line of linesOf(response.body, signal)) {
    const message = JSON.parse(line);
    if (message.progress) onProgress(...message.progress);
    if (message.error) throw new ServerError(messageOf(message));
    if (message.result) return decoded(message.result);
  }
  throw new ServerError("The server broke off its answer. Is it still running?");
}

async function* linesOf(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true })); // the connection broke
    signal.throwIfAborted();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

function decoded(result) {
  result.logits = floats(result.logits);
  if (result.attention) result.attention = floats(result.attention);
  return result;
}

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
