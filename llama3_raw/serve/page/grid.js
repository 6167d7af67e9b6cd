// A table whose cells the keyboard reaches: Tab goes to the table, the arrow keys to its cells. Cells are updated in
// place while the shape stays the same, so that nothing jumps and the focus stays.

import { element } from "./elements.js";

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class Grid {
  // onPoint(row, column): the pointer or the focus is at a cell. onPick(row, column): a click, Enter or Space.
  constructor(host, label, { onPoint = () => {}, onPick = () => {} } = {}) {
    this.table = element("table", { className: "grid", role: "grid" });
    this.table.setAttribute("aria-label", label);
    this.shape = "";
    this.at = [0, 0];
    host.append(this.table);
    this.table.addEventListener("keydown", (event) => this.#key(event, onPick));
    this.#listen("click", (row, column) => {
      this.#focus(row, column);
      onPick(row, column);
    });
    this.#listen("focusin", (row, column) => {
      this.#rove(row, column);
      onPoint(row, column);
    });
    this.#listen("mouseover", onPoint);
  }

  // rows, columns: heads, each a list of nodes or strings. fill(cell, row, column) writes a cell.
  draw(corner, rows, columns, fill) {
    const shape = `${rows.length} ${columns.length}`;
    if (shape !== this.shape) this.#build(rows.length, columns.length);
    this.shape = shape;
    this.table.tHead.rows[0].cells[0].replaceChildren(corner);
    columns.forEach((head, i) => this.table.tHead.rows[0].cells[i + 1].replaceChildren(head));
    rows.forEach((head, row) => {
      const line = this.table.tBodies[0].rows[row];
      line.cells[0].replaceChildren(head);
      for (let column = 0; column < columns.length; column++) fill(line.cells[column + 1], row, column);
    });
  }

  cell(row, column) {
    return this.table.tBodies[0]?.rows[row]?.cells[column + 1];
  }

  #build(rows, columns) {
    const hadFocus = this.table.contains(document.activeElement);
    const head = element("tr", {}, ...times(columns + 1, () => element("th", { scope: "col" })));
    const body = times(rows, () =>
      element("tr", {}, element("th", { scope: "row" }), ...times(columns, () => gridCell())),
    );
    this.table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
    this.at = [Math.min(this.at[0], rows - 1), Math.min(this.at[1], columns - 1)];
    this.#rove(...this.at);
    if (hadFocus) this.cell(...this.at).focus();
  }

  #listen(kind, handle) {
    this.table.addEventListener(kind, (event) => {
      const cell = event.target.closest("td");
      if (cell) handle(cell.parentNode.sectionRowIndex, cell.cellIndex - 1);
    });
  }

  #rove(row, column) {
    this.cell(...this.at)?.setAttribute("tabindex", "-1");
    this.cell(row, column)?.setAttribute("tabindex", "0");
    this.at = [row, column];
  }

  #focus(row, column) {
    this.cell(row, column)?.focus();
  }

  #key(event, onPick) {
    const [row, column] = this.at;
    const step = STEPS[event.key];
    if (event.key === "Enter" || event.key === " ") onPick(row, column);
    else if (step) this.#focus(row + step[0], column + step[1]);
    else if (event.key === "Home") this.#focus(row, 0);
    else if (event.key === "End") this.#focus(row, this.table.tHead.rows[0].cells.length - 2);
    else return;
    event.preventDefault(); // no scrolling
  }
}

function times(count, make) {
  return Array.from({ length: count }, make);
}

function gridCell() {
  return element("td", { role: "gridcell", tabIndex: -1 });
}
