/* What a reader changed is kept while the page is open, over the reloads of a watched page; tables are sorted by their
   headings; a watched page reloads itself. */
"use strict";
document.documentElement.classList.add("js");

const memory = {
  get(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`${location.pathname} ${name}`));
    } catch {
      return null; // the browser keeps nothing for files
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(`${location.pathname} ${name}`, JSON.stringify(value));
    } catch {
      // as above
    }
  },
};

document.querySelectorAll("table.sortable").forEach((table, number) => {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const value = (row, column) => {
    const given = row.cells[column].dataset.sort;
    return given === undefined ? row.cells[column].textContent : given === "" ? null : Number(given);
  };
  const compared = (one, other) =>
    typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en", { numeric: true });

  function sort(column, order) {
    const sign = order === "descending" ? -1 : 1;
    const missing = (row) => (value(row, column) === null ? 1 : 0); // last in both orders
    const sorted = [...rows].sort(
      (one, other) => missing(one) - missing(other) || (missing(one) ? 0 : sign * compared(value(one, column), value(other, column))),
    );
    body.append(...(order === "none" ? rows : sorted));
    headings.forEach((heading, index) => heading.setAttribute("aria-sort", index === column ? order : "none"));
    memory.set(`table ${number}`, { column, order });
  }

  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      sort(column, next[heading.getAttribute("aria-sort")]);
    });
  });
  const saved = memory.get(`table ${number}`);
  if (saved && saved.column < headings.length) sort(saved.column, saved.order);
});

/* A page that nobody writes any more stops reloading. */
const watched = document.querySelector("[data-reload]");
if (watched) {
  const seconds = Number(watched.dataset.reload), age = Date.now() / 1000 - Number(watched.dataset.written);
  if (age < Math.max(3600, 20 * seconds)) setTimeout(() => location.reload(), 1000 * seconds);
}
