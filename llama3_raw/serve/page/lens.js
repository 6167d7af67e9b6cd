// The logit lens as a grid: a row for each layer, a column for each position.

import { element, percent, shade, tokenSpan, visible } from "./elements.js";
import { Grid } from "./grid.js";

export function stageLabel(stage) {
  return stage === 0 ? "embedding" : `layer ${stage - 1}`;
}

export class LensGrid {
  // readout: the element that shows the five tokens of the cell at which the pointer or the focus is.
  constructor(host, label, readout, { onPick = () => {}, rowLabel = stageLabel } = {}) {
    this.host = host;
    this.readout = readout;
    this.rowLabel = rowLabel;
    this.grid = new Grid(host, label, { onPoint: (row, column) => this.point(row, column), onPick });
  }

  // tokens: of the prompt. lens: ids and probs [stages][T][5], and their tokens. mark(cell, stage, position) may add.
  draw(tokens, lens, texts, mark = () => {}) {
    const grew = this.data?.tokens.length !== tokens.length;
    this.data = { tokens, lens, texts };
    const rows = lens.ids.map((_, stage) => this.rowLabel(stage));
    this.grid.draw("after", rows, tokens.map(tokenSpan), (cell, stage, position) => {
      const token = texts.get(lens.ids[stage][position][0]);
      const prob = lens.probs[stage][position][0];
      cell.className = "shade";
      cell.replaceChildren(element("span", {}, visible(token.text)));
      shade(cell, prob);
      cell.setAttribute("aria-label", `${this.place(stage, position)}: ${visible(token.text)} ${percent(prob)}`);
      mark(cell, stage, position);
    });
    if (grew) this.host.scrollLeft = this.host.scrollWidth; // to the last position, which decides the next token
    this.point(...(this.pointed ?? [lens.ids.length - 1, tokens.length - 1]));
  }

  place(stage, position) {
    return `${stageLabel(stage)}, after ${visible(this.data.tokens[position].text)} (${position})`;
  }

  point(row, column) {
    const { lens, tokens, texts } = this.data;
    const [stage, position] = [Math.min(row, lens.ids.length - 1), Math.min(column, tokens.length - 1)];
    this.pointed = [row, column];
    const items = lens.ids[stage][position].map((id, rank) => {
      const prob = lens.probs[stage][position][rank];
      const bar = element("span", { className: "bar now" });
      bar.style.setProperty("--length", prob.toFixed(4));
      const track = element("span", { className: "track" }, bar);
      const number = element("data", { value: String(prob) }, percent(prob));
      return element("li", {}, tokenSpan(texts.get(id)), track, number);
    });
    this.readout.replaceChildren(element("p", {}, this.place(stage, position)), element("ol", {}, ...items));
  }
}
