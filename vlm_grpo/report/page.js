"use strict";
document.documentElement.classList.add("scripted");

const byWords = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

/** What a row sorts by in a column: a number, a text, or null where it has neither; null stays last both ways. */
function keyOf(row, place, kind) {
  const cell = row.cells[place];
  if (kind === "number") return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  return cell.textContent.trim().toLowerCase() || null;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : byWords.compare(a, b);
}

/** A picture comes with the page once; its other places copy it when they are shown. */
function fill(row) {
  for (const element of row.querySelectorAll("[data-same]")) {
    if (!element.hasAttribute("src")) {
      const source = document.querySelector(`[data-key="${element.dataset.same}"]`);
      if (source) element.src = source.src;
    }
  }
}

function prepare(table) {
  const name = table.id.replace(/-table$/, "");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const filter = document.querySelector(`[data-filters="${name}"]`);
  const count = document.querySelector(`[data-counts="${name}"]`);

  /** Of adjacent rows of one group only the first shows what they share. */
  function show() {
    let last = null;
    let shown = 0;
    for (const row of body.rows) {
      if (row.hidden) continue;
      shown += 1;
      row.classList.toggle("again", row.dataset.group === last);
      last = row.dataset.group;
      if (!row.classList.contains("again")) fill(row);
    }
    count.textContent = shown === original.length ? `${shown} lines` : `${shown} of ${original.length} lines`;
  }

  function sort(place) {
    const heading = headings[place];
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const keyed = original.map((row) => [keyOf(row, place, heading.dataset.kind), row]);
    const known = keyed.filter(([key]) => key !== null).sort(([a], [b]) => sign * compare(a, b));
    body.append(...[...known, ...keyed.filter(([key]) => key === null)].map(([, row]) => row));
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    show();
  }

  headings.forEach((heading, place) => {
    if (heading.dataset.kind === "media") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(place));
    heading.append(button);
  });
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of original) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    show();
  });
  show();
}

document.querySelectorAll("table.sortable").forEach(prepare);
