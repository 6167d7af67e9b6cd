// Small helpers: elements, tokens and numbers as text.

// element("span", {className: "token", title: "…"}, "text", child): text is never read as HTML.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

const NAMES = { " ": "␣", "\n": "↵", "\t": "⇥" };

// Returns a text with every character visible: ␣ for a space, ↵ for a newline, escapes for what cannot be printed.
export function visible(text) {
  const escape = (character) => `\\u{${character.codePointAt(0).toString(16)}}`;
  return text.replace(/[\p{C}\p{Z}]/gu, (character) => NAMES[character] ?? escape(character));
}

export function tokenSpan(token) {
  const span = element("span", { className: "token" }, visible(token.text));
  span.style.setProperty("--hue", String((token.id * 47) % 360)); // a token has the same colour wherever it occurs
  return span;
}

// One decimal; below 0.1 % two digits, as far as the third decimal.
export function percent(prob) {
  const value = 100 * prob;
  if (value >= 0.095 || value === 0) return `${value.toFixed(1)} %`;
  return value < 0.0005 ? "<0.001 %" : `${value.toFixed(value < 0.0095 ? 3 : 2)} %`;
}

// Shades a cell by a number from 0 to 1.
export function shade(cell, prob) {
  cell.style.setProperty("--p", prob.toFixed(3));
}
