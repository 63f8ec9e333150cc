"use strict";
// Every table sorts by a click, or Enter or Space, on a column's head.
const said = document.getElementById("said");
const sortable = (cell) => {
  if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
  const text = cell.textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return /^[-+<]?\s*[\d.]/.test(text) && !Number.isNaN(number) ? number : text.toLowerCase();
};
// Numbers before words, so that "not recorded" stands last when a column rises.
const order = (a, b) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1);
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => order(sortable(a.cells[column]), sortable(b.cells[column])) * (rising ? 1 : -1));
      table.tBodies[0].append(...rows);
      said.textContent = `Sorted by ${head.textContent}, ${rising ? "rising" : "falling"}`;
    });
  });
}

// A figure reads out its values: the one nearest to the pointer, or one by one with the arrow keys.
for (const figure of document.querySelectorAll("figure")) {
  const reading = figure.querySelector(".reading");
  for (const panel of figure.querySelectorAll(".panel")) {
    const marks = JSON.parse(panel.querySelector("script").textContent);
    const plot = panel.querySelector(".plot");
    const svg = panel.querySelector("svg");
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    cursor.setAttribute("class", "cursor off");
    cursor.setAttribute("r", "7");
    svg.append(cursor);
    let current = -1;
    const show = (index) => {
      current = index;
      cursor.setAttribute("cx", marks[index][0]);
      cursor.setAttribute("cy", marks[index][1]);
      cursor.classList.remove("off");
      reading.textContent = marks[index][2];
    };
    plot.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      const y = (event.clientY - box.top) * scale;
      let best = 0;
      let least = Infinity;
      marks.forEach(([a, b], index) => {
        const far = (a - x) ** 2 + (b - y) ** 2;
        if (far < least) [best, least] = [index, far];
      });
      if (marks.length && best !== current) show(best);
    });
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const end = { Home: 0, End: marks.length - 1 }[event.key];
      if (!marks.length || (step === undefined && end === undefined)) return;
      event.preventDefault();
      show(end ?? (current < 0 ? (step > 0 ? 0 : marks.length - 1) : (current + step + marks.length) % marks.length));
    });
    const leave = () => cursor.classList.add("off");
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
  }
  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const group of figure.querySelectorAll(`svg g.${button.dataset.series}`)) group.classList.toggle("off", !shown);
    });
  }
}
