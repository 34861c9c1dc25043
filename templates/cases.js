"use strict";
// A case stays whole: its rows move together, by its own number or emotion or by what one of its systems got.
for (const section of document.querySelectorAll("section")) {
  const table = section.querySelector("table");
  const select = section.querySelector("select");
  const heads = [...table.tHead.rows[0].cells];
  const value = (body, place) => {
    if (place === 0) return Number(body.dataset.case);
    if (place === 1) return body.dataset.emotion;
    const row = body.rows[Number(select.value)];
    const text = row.cells[row.cells.length - (heads.length - place)].textContent.trim();  // counted from the end: rowspans
    if (text === "-") return -Infinity;
    return place > 4 ? Number(text) : text;
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : Number(a > b);
  function sort(place, direction) {
    heads.forEach((head, n) => {
      if (n === place) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const bodies = [...table.tBodies];
    bodies.sort((a, b) => direction * compare(value(a, place), value(b, place)) || a.dataset.case - b.dataset.case);
    table.append(...bodies);
    mark();
  }
  function mark() {
    for (const body of table.tBodies)
      [...body.rows].forEach((row, n) => row.classList.toggle("by", n === Number(select.value)));
  }
  heads.forEach((head, place) => head.querySelector("button")?.addEventListener("click", () => {
    // scores begin with the highest, the rest with the lowest
    const before = head.getAttribute("aria-sort");
    const first = place > 4 ? -1 : 1;
    sort(place, before ? (before === "ascending" ? -1 : 1) : first);
  }));
  select.addEventListener("change", () => {
    const place = heads.findIndex((head) => head.hasAttribute("aria-sort"));
    sort(place, heads[place].getAttribute("aria-sort") === "ascending" ? 1 : -1);
  });
  mark();
}
